"""The accounting against torch's own counter, the real cache, and the numbers of the papers."""

from __future__ import annotations

import json
import math
from statistics import mean
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, GPT2Config, LlamaConfig, LlavaConfig, OPTConfig, ViTConfig

from tests.flop_helper import (
    build,
    counter,
    hybrid_config,
    llava_config,
    llava_inputs,
    measured_breakdown,
    measured_flops,
    qwen_config,
    qwen_inputs,
)
from vtprune.adapters import model_cost
from vtprune.cost.formulas import FlopsBreakdown
from vtprune.errors import VTPruneError
from vtprune.report.costs import flops, kv_bytes

GRIDS = [(1, 5, 7), (1, 3, 6), (1, 1, 2)]
TEXT = 11
# The accounting is meant to be exact; the promise to users is 1%.
MODELS: dict[str, tuple[Any, Any]] = {
    "llava-clip": (llava_config(), 1),
    "llava-clip, two images": (llava_config(), 2),
    "llava-clip, two feature layers": (llava_config(vision_feature_layer=[-2, -1]), 1),
    "llava-clip, CLS kept": (llava_config(vision_feature_select_strategy="full"), None),
    "llava-siglip": (llava_config("siglip"), 2),
    "qwen2.5-vl": (qwen_config(), [(1, 5, 7)]),
    "qwen2.5-vl, whole windows": (qwen_config(), [(1, 6, 3)]),
    "qwen2.5-vl, three images": (qwen_config(), GRIDS),
    "qwen2.5-vl, frames": (qwen_config(), [(3, 4, 5)]),
    "qwen2-vl, three images": (qwen_config("2"), GRIDS),
    "qwen3-vl, three images": (qwen_config("3"), GRIDS),
    "qwen3-vl, experts": (qwen_config("3, experts"), GRIDS),
    "text alone": (qwen_config(), []),
    "qwen3.5, three images": (hybrid_config(), GRIDS),
    "qwen3.5, more than a chunk": (hybrid_config(), [(1, 9, 11)]),
    "qwen3.5, experts": (hybrid_config(experts=True), GRIDS),
}


def _inputs(config: Any, images: Any) -> dict[str, torch.Tensor]:
    if isinstance(images, int):
        return llava_inputs(config, images, TEXT)
    inputs = qwen_inputs(config, images or GRIDS[:1], TEXT)
    if not images:
        text = inputs["input_ids"][:, :2]
        return {"input_ids": text, "mm_token_type_ids": torch.zeros_like(text)}
    return inputs


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "llava-clip, CLS kept"])
def test_every_part_equals_the_measured_flops(name: str, attention: str) -> None:
    config, images = MODELS[name]
    model, inputs = build(config, attention), _inputs(config, images)
    vision = int((inputs["input_ids"] == config.image_token_id).sum())
    text = inputs["input_ids"].shape[1] - vision
    counted = flops(config, vision, text_tokens=text, images=images)
    assert counted == measured_breakdown(model, inputs)
    assert counted.total == pytest.approx(measured_flops(model, inputs), rel=0.01)
    assert counted.total == measured_flops(model, inputs)


def test_cls_through_the_projector_where_the_features_keep_it() -> None:
    config, _ = MODELS["llava-clip, CLS kept"]
    counted = flops(config, 65, text_tokens=0, images=1)
    model = build(config).model
    with torch.no_grad(), counter() as count:
        model.get_image_features(torch.randn(1, 3, 48, 48))
    assert counted.vision_tower + counted.projector == count.get_total_flops()


def test_logits_and_projector_tokens_and_scoring_are_counted() -> None:
    config, inputs = llava_config(), llava_inputs(llava_config(), 1, TEXT)
    with torch.no_grad(), counter() as count:
        build(config)(**inputs)
    kwargs = {"text_tokens": TEXT, "images": 1}
    assert flops(config, 64, logits=64 + TEXT, **kwargs).total == count.get_total_flops()
    full, quarter = (flops(config, 64, projector_tokens=n, **kwargs) for n in (64, 16))
    assert full.projector == 4 * quarter.projector
    assert flops(config, 64, scoring=123, **kwargs).total == full.total + 123


def test_tower_that_drops_patches_equals_the_measured_flops() -> None:
    config = llava_config()
    tower = build(config).model.vision_tower
    for layer, left in ((1, 41), (2, 18)):
        tower.encoder.layers[layer].register_forward_pre_hook(lambda _, args, n=left: (args[0][:, :n], *args[1:]))
    with torch.no_grad(), counter() as count:
        tower(torch.randn(1, 3, 48, 48))
    kwargs = {"text_tokens": 5, "images": 1}
    # 41 tokens are 40 patches and CLS.
    pruned = flops(config, 64, encoder_tokens_per_layer=[[64, 40, 17]], **kwargs)
    assert pruned.vision_tower == count.get_total_flops()
    as_segments = flops(config, 64, encoder_tokens_per_layer=[[[65], [41], [18]]], **kwargs)
    assert as_segments == pruned


def test_window_segments_of_a_pruned_qwen_tower() -> None:
    config, grid = qwen_config(), (1, 5, 7)
    block = build(config).model.visual.blocks[0]
    segments = [36, 4, 28, 8]
    ends = torch.tensor([0, *segments]).cumsum(0)
    angles = torch.zeros(sum(segments), 12)
    with torch.no_grad(), counter() as count:
        block(torch.randn(sum(segments), 24), cu_seqlens=ends, position_embeddings=(angles, angles))
    kwargs = {"text_tokens": 5, "images": [grid]}
    full = flops(config, 35, **kwargs)
    assert flops(config, 35, encoder_tokens_per_layer=[[140] * 4], **kwargs) == full
    last_two = flops(config, 35, encoder_tokens_per_layer=[[140, 140, segments, 76]], **kwargs)
    patch = model_cost(config).vision
    kept = 140 * patch.patch_macs + sum(patch.blocks.layer_macs(patch.segments(grid, i)) for i in (0, 1))
    assert last_two.vision_tower == 2 * kept + count.get_total_flops() + 2 * patch.blocks.layer_macs([76])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llava-clip", "qwen2.5-vl, three images"])
def test_kv_bytes_equal_the_cache(name: str, dtype: torch.dtype) -> None:
    config, images = MODELS[name]
    model, inputs = build(config).to(dtype), _inputs(config, images)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    length = inputs["input_ids"].shape[1]
    assert kv_bytes(config, length, dtype) == real
    assert kv_bytes(config, [length] * 4, str(dtype)) == real
    assert kv_bytes(config, [length, 0, 0, 0], str(dtype).removeprefix("torch.")) == real // 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("experts", [False, True])
def test_kv_bytes_of_a_hybrid_equal_its_entries_and_states(experts: bool, dtype: torch.dtype) -> None:
    config = hybrid_config(experts=experts)
    model, inputs = build(config).to(dtype), _inputs(config, GRIDS)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    length, real = inputs["input_ids"].shape[1], 0
    for layer in cache.layers:
        states = [layer.conv_states[0], layer.recurrent_states[0]] if hasattr(layer, "conv_states") else []
        real += sum(part.nbytes for part in states or (layer.keys, layer.values))
    assert kv_bytes(config, length, dtype) == real
    assert kv_bytes(config, [0, length, 0, 0, length], dtype) == real
    assert kv_bytes(config, 2 * length, dtype) - real == real - kv_bytes(config, 0, dtype) > 0
    with pytest.raises(VTPruneError, match=r"is 0 in layers of linear attention, .* got 3 in layer 2"):
        kv_bytes(config, [0, length, 3, 0, length], dtype)


def test_a_formula_for_attention_alone_is_refused_for_a_hybrid() -> None:
    with pytest.raises(VTPruneError, match="'2ndm' is a formula for attention in every layer"):
        flops(hybrid_config(), 8, text_tokens=4, images=[(1, 2, 4)], convention="2ndm")


# ---- the papers' formulas and their numbers

VICUNA_7B = LlamaConfig()
VICUNA_13B = LlamaConfig(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40)
TOWER = CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)
LLAVA_7B = LlavaConfig(text_config=VICUNA_7B, vision_config=TOWER)
LLAVA_13B = LlavaConfig(text_config=VICUNA_13B, vision_config=TOWER)


def tera(vision: int | list[int], text: int, convention: str, config: LlavaConfig = LLAVA_7B) -> float:
    return flops(config, vision, text_tokens=text, images=1, convention=convention).decoder / 1e12


@pytest.mark.parametrize(
    ("text", "vision", "two", "three", "exact", "ratio", "mib"),
    [
        (0, 576, 2.9861, 3.8172, 7.6343, 1.0, 288),
        (0, 192, 0.9760, 1.2531, 2.5061, 0.3283, 96),
        (0, 128, 0.6485, 0.8332, 1.6664, 0.2183, 64),
        (0, 64, 0.3232, 0.4155, 0.8311, 0.1089, 32),
        (64, 576, 3.3286, 4.2520, 8.5040, 1.0, 320),
        (64, 192, 1.3057, 1.6750, 3.3501, 0.3939, 128),
        (64, 128, 0.9760, 1.2531, 2.5061, 0.2947, 96),
        (64, 64, 0.6485, 0.8332, 1.6664, 0.1960, 64),
    ],
)
def test_llava_7b_in_every_convention(
    text: int, vision: int, two: float, three: float, exact: float, ratio: float, mib: int
) -> None:
    assert round(tera(vision, text, "2ndm"), 4) == two
    assert round(tera(vision, text, "3ndm"), 4) == three
    assert round(tera(vision, text, "exact"), 4) == exact
    assert round(tera(vision, text, "3ndm") / tera(576, text, "3ndm"), 4) == ratio
    assert kv_bytes(LLAVA_7B, vision + text, "float16") == mib * 2**20


def test_exact_decoder_is_twice_3ndm_without_grouped_queries() -> None:
    lengths = [7 * i + 1 for i in range(32)]
    for config in (LLAVA_7B, LlavaConfig(text_config=LlamaConfig(head_dim=128), vision_config=TOWER)):
        exact, published = (flops(config, lengths, text_tokens=9, images=1, convention=c) for c in ("exact", "3ndm"))
        assert exact.decoder == 2 * published.decoder
        assert published.total == published.decoder


@pytest.mark.parametrize(
    ("text", "first", "drop", "tera_flops", "ratio"),
    [
        (0, 2, 0.50, 1.5660, 0.5244),
        (0, 2, 0.75, 0.8712, 0.2918),
        (0, 2, 0.90, 0.4611, 0.1544),
        (0, 3, 0.50, None, 0.5403),
        (0, 5, 0.50, None, 0.5720),
        (64, 2, 0.50, None, 0.5706),
        (64, 2, 0.75, None, 0.3606),
        (64, 2, 0.90, None, 0.2365),
        (64, 3, 0.50, None, 0.5850),
        (64, 5, 0.50, None, 0.6136),
    ],
)
def test_fastv(text: int, first: int, drop: float, tera_flops: float | None, ratio: float) -> None:
    pruned = tera([576] * first + [round(576 * (1 - drop))] * (32 - first), text, "2ndm")
    assert round(pruned / tera(576, text, "2ndm"), 4) == ratio
    assert tera_flops is None or round(pruned, 4) == tera_flops


def test_fastv_per_layer_as_printed_in_its_paper() -> None:
    giga = [1e3 * tera([612] * 2 + [612 - round(p * 576)] * 30, 0, "2ndm") / 32 for p in (0, 0.5, 0.75, 0.9)]
    assert [round(g, 1) for g in giga] == [99.3, 54.8, 33.0, 20.1]


@pytest.mark.parametrize(
    ("vision", "text", "ratio"),
    [(576, 0, 0.4656), (2880, 0, 0.4545), (576, 64, 0.5179), (2880, 64, 0.4652)],
)
def test_pyramid_drop(vision: int, text: int, ratio: float) -> None:
    stages = [vision >> stage for stage in range(4) for _ in range(8)]
    assert round(tera(stages, text, "3ndm") / tera(vision, text, "3ndm"), 4) == ratio


@pytest.mark.parametrize(
    ("kept", "reported", "executed"),
    [
        ((309, 204, 113), 1.2570, 1.3533),
        ((312, 117, 39), 0.8428, 0.9542),
        ((249, 55, 27), 0.6356, 0.7494),
        ((82, 32, 18), 0.4255, 0.5411),
    ],
)
def test_sparsevlm(kept: tuple[int, int, int], reported: float, executed: float) -> None:
    def stages(first: int) -> list[int]:
        """A layer that prunes (2, 6, 15) computes on all that reached it; the paper counts what it leaves."""
        return [576] * first + [kept[0]] * 4 + [kept[1]] * 9 + [kept[2]] * (19 - first)

    assert round(tera(stages(2), 0, "3ndm"), 4) == reported
    assert round(tera(stages(3), 0, "3ndm"), 4) == executed


def pmod_tokens(vision: int) -> list[int]:
    """p-MoD's shifted cosine: dense to layer 7, then int(n * ratio), at least 15%."""
    cosine = [0.5 * math.cos(math.pi * layer / 31) + 0.5 for layer in range(32)]
    return [vision if ratio > 0.85 else int(vision * max(ratio, 0.15)) for ratio in cosine]


@pytest.mark.parametrize(
    ("vision", "text", "ratio"),
    [
        (576, 0, 0.5339),
        (576, 64, 0.5794),
        (2880, 0, 0.5235),
        (2880, 64, 0.5329),
        (2144, 0, 0.5267),
        (2144, 64, 0.5394),
    ],
)
def test_pmod(vision: int, text: int, ratio: float) -> None:
    assert round(tera(pmod_tokens(vision), text, "3ndm") / tera(vision, text, "3ndm"), 4) == ratio


def test_pmod_flops_and_kv() -> None:
    assert round(tera(pmod_tokens(576), 64, "exact"), 3) == 4.928
    for vision, share in ((576, 0.5832), (2880, 0.5475)):
        kv = kv_bytes(LLAVA_7B, [n + 64 for n in pmod_tokens(vision)], "float16")
        assert round(kv / kv_bytes(LLAVA_7B, vision + 64, "float16"), 4) == share


def test_gamma_mod() -> None:
    dense, routed = (tera(lengths, 0, "exact") for lengths in (1400, [1400] * 3 + [869] * 29))
    assert (round(dense, 4), round(routed, 4)) == (19.1604, 12.3552)


@pytest.mark.parametrize(
    ("config", "full", "pruned", "ratio"),
    [(LLAVA_7B, 3.2280, 0.5122, 0.1563), (LLAVA_13B, 6.2813, 1.0020, 0.1571)],
)
def test_divprune(config: LlavaConfig, full: float, pruned: float, ratio: float) -> None:
    texts = [15, 15, 23, 83, 25, 113, 15, 39, 21, 91, 57]
    before = [tera(576, text, "2ndm", config) for text in texts]
    after = [tera(576 - round(0.902 * 576), text, "2ndm", config) for text in texts]
    assert (round(mean(before), 4), round(mean(after), 4)) == (full, pruned)
    assert round(mean(a / b for a, b in zip(after, before, strict=True)), 4) == ratio


def test_kv_bytes_of_one_token() -> None:
    text = {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
    qwen = type(qwen_config("2"))(text_config=text, vision_config={})
    assert kv_bytes(LLAVA_7B, 1, "float16") == 524288
    assert kv_bytes(LLAVA_13B, 1, "float16") == 819200
    assert kv_bytes(qwen, 1, "bfloat16") == 57344


# ---- the surface


def test_breakdown_is_json() -> None:
    breakdown = FlopsBreakdown(1, 2, 3, 4, 5)
    assert breakdown.total == 15
    assert json.loads(json.dumps(breakdown.to_dict())) == {
        "vision_tower": 1,
        "projector": 2,
        "decoder": 3,
        "head": 4,
        "scoring": 5,
        "total": 15,
    }


def test_layers_may_see_different_text() -> None:
    config = llava_config()
    two_layers = flops(config, [64, 64, 0, 0], text_tokens=[9, 9, 0, 0], images=1)
    assert 2 * two_layers.decoder == flops(config, 64, text_tokens=9, images=1).decoder


def test_grids_mean_the_same_as_a_number_of_fixed_images() -> None:
    config = llava_config()
    by_grid = flops(config, 128, text_tokens=4, images=[(1, 8, 8), [1, 8, 8]])
    assert by_grid == flops(config, 128, text_tokens=4, images=2)


LLAVA, QWEN = llava_config(), qwen_config()
OK: dict[str, Any] = {"tokens_per_layer": 8, "text_tokens": 4, "images": 1}


@pytest.mark.parametrize(
    ("config", "changes", "says"),
    [
        (LLAVA, {"tokens_per_layer": [8, 8]}, "4 of them"),
        (LLAVA, {"tokens_per_layer": -1}, "at least 0"),
        (LLAVA, {"tokens_per_layer": 2.5}, "at least 0"),
        (LLAVA, {"tokens_per_layer": True}, "at least 0"),
        (LLAVA, {"tokens_per_layer": "8"}, "one int or 4"),
        (LLAVA, {"text_tokens": -4}, "text_tokens"),
        (LLAVA, {"images": -1}, "images"),
        (LLAVA, {"images": [(1, 4, 4)]}, r"\(1, 8, 8\)"),
        (LLAVA, {"convention": "5ndm"}, "exact, 2ndm, 3ndm"),
        (LLAVA, {"logits": -1}, "logits"),
        (LLAVA, {"scoring": -1}, "scoring"),
        (LLAVA, {"projector_tokens": -1}, "projector_tokens"),
        (LLAVA, {"encoder_tokens_per_layer": [[64, 64]]}, "of 3 entries"),
        (LLAVA, {"encoder_tokens_per_layer": [[64, 65, 64]]}, "has 65 tokens"),
        (LLAVA, {"encoder_tokens_per_layer": []}, "1 lists"),
        (LLAVA, {"images": [(2, 8, 8)], "encoder_tokens_per_layer": [[60, 60, 60]]}, "lie in 2 crops or frames"),
        (LLAVA, {"images": [(2, 8, 9)]}, r"or \(n, 8, 8\) for n crops or frames, got \(2, 8, 9\)"),
        (QWEN, {}, r"grids \(t, h, w\)"),
        (QWEN, {"images": [(5, 7)]}, r"grids \(t, h, w\)"),
        (QWEN, {"images": [(1, 0, 7)]}, "at least 1"),
        (QWEN, {"images": [5]}, r"grids \(t, h, w\)"),
        (QWEN, {"images": [(1, 5, 7)], "encoder_tokens_per_layer": [[140, 140, 70, 70]]}, "lengths there"),
        (GPT2Config(), {}, "llava, llava_next, .*qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_vl_moe, qwen3_5, qwen3_5_moe"),
        (object(), {}, "llava, llava_next, .*qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_vl_moe, qwen3_5, qwen3_5_moe"),
        (LlavaConfig(text_config=VICUNA_7B, vision_config=ViTConfig()), {}, "clip_vision_model"),
        (LlavaConfig(text_config=OPTConfig(), vision_config=TOWER), {}, "llama"),
    ],
)
def test_bad_input_says_what_would_be_right(config: Any, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(VTPruneError, match=says):
        flops(config, **(OK | changes))


@pytest.mark.parametrize(
    ("entries", "dtype", "says"),
    [
        ([8, 8], "float16", "4 of them"),
        (-8, "float16", "at least 0"),
        (8, "half-ish", "float16"),
        (8, 16, "float16"),
    ],
)
def test_bad_kv_input_says_what_would_be_right(entries: Any, dtype: Any, says: str) -> None:
    with pytest.raises(VTPruneError, match=says):
        kv_bytes(LLAVA, entries, dtype)


def test_a_decoder_of_which_some_layers_have_no_experts_is_refused() -> None:
    config = qwen_config("3, experts")
    config.text_config.mlp_only_layers = [1]
    with pytest.raises(VTPruneError, match="some layers have experts and others have none"):
        flops(config, 10, text_tokens=3, images=[(1, 2, 5)])
