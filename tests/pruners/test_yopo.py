"""YOPO: heads, windows, channels and withdrawn layers equal a slow masked reference, and cost what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vtprune
from tests.flop_helper import counter, measured_flops
from tests.models import DECODER_LAYERS, IMAGE, PAST, ROWS, make, prompt
from tests.oracle import TOLERANCE, next_tokens, run_wrapped
from tests.pruners.slow_yopo import near, slow_logits
from vtprune.pruners import YOPO
from vtprune.tensors.apart import neighbours

KINDS = ("llava-clip", "qwen2.5-vl", "qwen3-vl")
# Of 2 key-value heads, by layer.
KEPT = {1: [1], 2: [], 3: [0]}


def heads_of(folder: Path, kept: dict[int, list[int]] | None = None, **changes: int) -> str:
    path = folder / "heads.json"
    own = {str(layer): heads for layer, heads in (KEPT if kept is None else kept).items()}
    path.write_text(json.dumps({"kv_heads": 2, "depth": DECODER_LAYERS, "kept": own, **changes}))
    return str(path)


SETTINGS: dict[str, dict[str, Any]] = {
    "channels": {"mlp": 3, "layer": 4},
    "heads": {"mlp": 1, "layer": 4, "heads": True},
    "window": {"mlp": 1, "layer": 4, "window": 3},
    "causal window": {"mlp": 1, "layer": 3, "window": 5, "causal": True},
    "all": {"heads": True, "window": 3},
    "released": {"heads": True, "variant": "released", "layer": 2},
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_plan_is_what_masking_everything_else_gives(kind: str, name: str, attention: str, tmp_path: Path) -> None:
    options = dict(SETTINGS[name])
    heads = options.pop("heads", False)
    pruner = YOPO(**options, head_file=heads_of(tmp_path) if heads else None)
    for place, row in enumerate(ROWS[kind]):
        inputs, model = prompt(kind, [row]), make(kind, attention)
        later = next_tokens(place + 1)[place]
        layer = options.get("layer", DECODER_LAYERS // 2)
        width = model.config.get_text_config().intermediate_size
        expected = slow_logits(
            kind, make(kind, attention), inputs, later, first=layer, heads=KEPT if heads else None,
            channels=None if options.get("mlp") == 1 else int(width / options.get("mlp", 2)),
            window=options.get("window"), causal=options.get("causal", False), grids=row.grids,
            released=options.get("variant") == "released",
        )  # fmt: skip
        logits, _, _ = run_wrapped(kind, vtprune.wrap(model, pruner), inputs, row=place)
        text = torch.cat([inputs["input_ids"][0], later]) != IMAGE
        torch.testing.assert_close(logits[0, text], expected[text], atol=TOLERANCE, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"heads": True, "variant": "released"}, {"heads": True, "window": 3}])
def test_a_ragged_batch_equals_each_row_alone(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    own = {name: value for name, value in options.items() if name != "heads"}
    own["head_file"] = heads_of(tmp_path) if "heads" in options else None
    model, inputs = vtprune.wrap(make(kind), YOPO(**own)), prompt(kind, ROWS[kind])
    together, _, _ = run_wrapped(kind, model, inputs)
    real = inputs["attention_mask"].bool()
    for place, row in enumerate(ROWS[kind]):
        alone, _, _ = run_wrapped(kind, model, prompt(kind, [row]), row=place)
        shown = torch.cat([real[place], real.new_ones(together.shape[1] - real.shape[1])])
        torch.testing.assert_close(together[place, shown][-9:], alone[0][-9:], atol=TOLERANCE, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_as_wide_as_the_image_with_causality_kept_is_the_unpruned_model(kind: str) -> None:
    inputs, model = prompt(kind, ROWS[kind]), make(kind)
    with torch.no_grad():
        expected = model(**inputs).logits
        with vtprune.wrapped(model, YOPO(window=47, causal=True, mlp=1, keep=0.999)):
            assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("name", SETTINGS)
def test_reported_flops_are_those_that_torch_counts(kind: str, name: str, tmp_path: Path) -> None:
    options = dict(SETTINGS[name])
    heads = options.pop("heads", False)
    model = vtprune.wrap(make(kind), YOPO(**options, head_file=heads_of(tmp_path) if heads else None))
    inputs = prompt(kind, ROWS[kind][-1:])
    measured = measured_flops(model, inputs)
    report = vtprune.report(model)
    assert report.flops == measured
    assert report.flops < report.flops_full


def test_a_later_turn_is_planned_and_counted_as_well(tmp_path: Path) -> None:
    kind = "llava-clip"
    model = vtprune.wrap(make(kind), YOPO(head_file=heads_of(tmp_path), window=3))
    one, two = (prompt(kind, [row]) for row in ROWS[kind][:2])
    for inputs in (one, two):
        inputs.pop("attention_mask", None)
    with torch.no_grad():
        cache = model(**one, use_cache=True).past_key_values
        with counter() as count:
            found = model(**two, **{PAST: cache}, use_cache=True, logits_to_keep=1).logits
    assert not found.isnan().any()
    assert vtprune.report(model).flops == pytest.approx(count.get_total_flops(), rel=0.01)


def test_neighbours_are_those_within_the_window() -> None:
    for grid, window, causal in (((4, 5), 3, False), ((4, 5), 5, True), ((3, 2), 4, False), ((1, 1), 7, False)):
        table, tokens = neighbours(grid, window, causal=causal), grid[0] * grid[1]
        seen = torch.zeros(tokens, tokens + 1, dtype=torch.bool).scatter_(1, table % (tokens + 1), True)[:, :tokens]
        assert torch.equal(seen, near([grid], window, causal=causal))


def test_the_cache_of_a_head_that_is_cut_holds_values_of_zero(tmp_path: Path) -> None:
    kind = "llava-clip"
    model, inputs = vtprune.wrap(make(kind), YOPO(head_file=heads_of(tmp_path), layer=4)), prompt(kind, ROWS[kind][:1])
    with torch.no_grad():
        layers = model(**inputs, use_cache=True).past_key_values.layers
    own = inputs["input_ids"][0] == IMAGE
    for layer, kept in KEPT.items():
        for head in range(2):
            values: Tensor = layers[layer].values[0, head, own]
            assert bool((values == 0).all()) == (head not in kept)
            assert bool((layers[layer].keys[0, head, own] != 0).any())


def test_what_cannot_be_is_refused_by_name(tmp_path: Path) -> None:
    for options, message in (
        ({"mlp": 0.5}, "yopo: mlp divides the channels of the MLP, a number of at least 1, got 0.5"),
        ({"window": 0}, "yopo: window is an int of at least 1"),
        ({"causal": 1}, "yopo: causal is one of"),
        ({"layer": 2, "keep": 0.5}, "yopo: layer=2 decides how much is kept, so keep=0.5 contradicts it"),
        ({"head_file": str(tmp_path / "none.json")}, "no file .*none.json, a file of the heads that read vision"),
        ({"head_file": heads_of(tmp_path, depth=7)}, "is of a decoder of 7 layers with 2 key-value heads"),
    ):
        with pytest.raises(vtprune.VTPruneError, match=message):
            vtprune.wrap(make("llava-clip"), YOPO(**options))  # type: ignore[arg-type]
    with pytest.raises(vtprune.VTPruneError, match=r"heads distinct ones of 0 to 1, got \[2\] in layer 1"):
        vtprune.wrap(make("llava-clip"), YOPO(head_file=heads_of(tmp_path / "..", {1: [2]})))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("qwen3-vl-moe", r"yopo computes with parts of the weights of torch.nn.Linear .* and this MLP has none"),
        ("qwen3.5", "yopo narrows the attention of decoder layers, .*linear attention"),
    ],
)
def test_models_that_cannot_be_taken_apart_are_refused(kind: str, message: str) -> None:
    with pytest.raises(vtprune.UnsupportedModelError, match=message):
        vtprune.wrap(make(kind), YOPO())


@pytest.mark.parametrize("target", ["v_proj", "up_proj"])
def test_adapters_that_come_after_wrapping_are_not_passed_over(target: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=[target], init_lora_weights=False)
    options: dict[str, Any] = {"mlp": 3, "layer": 4, "head_file": heads_of(tmp_path)}
    wrapped = vtprune.wrap(make("llava-clip"), YOPO(**options))
    torch.manual_seed(3)
    adapted, inputs = get_peft_model(wrapped, config).eval(), prompt("llava-clip", ROWS["llava-clip"])
    with torch.no_grad(), pytest.raises(vtprune.UnsupportedModelError, match=r"is a Linear; .*merge_and_unload"):
        adapted(**inputs)
    with torch.no_grad():
        merged = adapted.merge_and_unload()(**inputs).logits
        vtprune.unwrap(wrapped)
        assert torch.equal(vtprune.wrap(wrapped, YOPO(**options))(**inputs).logits, merged)


def test_a_window_is_refused_for_pictures_in_crops_and_videos() -> None:
    model = vtprune.wrap(make("llava-next"), YOPO(window=3))
    with torch.no_grad(), pytest.raises(vtprune.VTPruneError, match="yopo: window=3 is of neighbours on one grid"):
        model(**prompt("llava-next", ROWS["llava-next"]))


def test_nothing_that_reads_the_decoder_stands_beside_it() -> None:
    for other in (vtprune.FastV(keep=0.5), vtprune.D2O(keep=0.2)):
        with pytest.raises(vtprune.VTPruneError, match="yopo changes what decoder layers compute of vision"):
            vtprune.wrap(make("llava-clip"), [YOPO(), other])
    vtprune.wrap(make("llava-clip"), [vtprune.Grid(keep=9), YOPO()])


def test_gradients_are_the_same_with_checkpoints_and_flow_through_the_channels_that_are_left(tmp_path: Path) -> None:
    kind = "llava-clip"
    inputs, found = prompt(kind, ROWS[kind]), []
    for checkpoints in (False, True):
        model = vtprune.wrap(make(kind), YOPO(head_file=heads_of(tmp_path), window=3, layer=4, mlp=4))
        model.train()
        if checkpoints:
            model.gradient_checkpointing_enable()
        model(**inputs, use_cache=False).logits.float().pow(2).mean().backward()
        found.append({name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, atol=1e-6, rtol=1e-4)
