"""open_clip's ViT alone: dropping equals masking, nothing else changes, and methods choose as in a LLaVA's tower."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vtprune
from tests.clip_towers import masked, random_clip, watched
from vtprune.assets import EXAMPLE_IMAGE, TINY_LLAVA
from vtprune.evals.zero_shot.tower import from_transformers
from vtprune.loading.model import load_model
from vtprune.loading.pictures import open_picture

METHODS: dict[str, dict[str, Any]] = {
    "flowcut": {"keep": 9},
    "turbo": {"keep": 9},
    "tome": {"keep": 9},
    "visionzip": {"keep": 9},
    "vispruner": {"keep": 9},
    "mustdrop": {"merge_threshold": 0.1},
}
LAYOUTS = list(product(("tok", "avg"), (True, False)))


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize(("pool", "batch_first"), LAYOUTS)
def test_dropping_equals_masking(
    pool: str, batch_first: bool, pixels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_clip(pool, batch_first=batch_first)
    alive = watched(monkeypatch, len(pixels), layers=6, tokens=36)
    with vtprune.wrapped(model, "flowcut", keep=7):
        found = model.encode_image(pixels)
        report = vtprune.report(model)
    assert [one.images[0].kept for one in report.samples] == [row.nonzero().flatten().tolist() for row in alive[-1]]
    # Images lose different counts on the way, so that the batch is ragged.
    assert len({tuple(layer.sum(dim=1).tolist()) for layer in alive if len(set(layer.sum(dim=1).tolist())) > 1}) > 0
    torch.testing.assert_close(found, masked(model, pixels, alive), atol=2e-6, rtol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("pool", "batch_first"), LAYOUTS)
def test_both_layouts_and_batches_agree(method: str, pool: str, batch_first: bool, pixels: Tensor) -> None:
    with vtprune.wrapped(random_clip(pool), method, **METHODS[method]) as model:
        alone = torch.cat([model.encode_image(image[None]) for image in pixels])
    with vtprune.wrapped(random_clip(pool, batch_first=batch_first), method, **METHODS[method]) as model:
        torch.testing.assert_close(model.encode_image(pixels), alone, atol=5e-6, rtol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("pool", "batch_first"), LAYOUTS)
def test_keeping_everything_changes_no_bit(method: str, pool: str, batch_first: bool, pixels: Tensor) -> None:
    model = random_clip(pool, batch_first=batch_first)
    plain = model.encode_image(pixels)
    with vtprune.wrapped(model, method, keep=1.0):
        assert torch.equal(model.encode_image(pixels), plain)


def test_texts_and_an_unwrapped_model_know_nothing_of_it(pixels: Tensor) -> None:
    model = random_clip()
    texts = torch.randint(1, 99, (4, 16), generator=torch.Generator().manual_seed(0))
    image, text, before = model.encode_image(pixels), model.encode_text(texts), traces(model)
    vtprune.wrap(model, "turbo", keep=9)
    assert torch.equal(model.encode_text(texts), text)
    assert not torch.equal(model.encode_image(pixels), image)
    with pytest.raises(vtprune.VTPruneError, match="unwrap"):
        pickle.dumps(model)
    vtprune.unwrap(model)
    assert traces(model) == before
    assert torch.equal(model.encode_image(pixels), image)
    assert torch.equal(copy.deepcopy(model).encode_image(pixels), image)


def traces(model: Any) -> list[Any]:
    """What hooks and overrides would leave behind."""
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    modules = model.named_modules()
    return [(name, sorted(vars(one)), [len(getattr(one, kind)) for kind in hooks]) for name, one in modules]


@pytest.mark.parametrize("method", METHODS)
def test_flops_are_what_torch_counts(method: str, pixels: Tensor) -> None:
    model = random_clip("avg")
    for given in ({}, METHODS[method]):
        counter = FlopCounterMode(display=False)
        # Without gradients nn.MultiheadAttention runs as one operation, and its fast kernels are not counted by torch.
        alike = torch.enable_grad(), sdpa_kernel(SDPBackend.MATH)
        with vtprune.wrapped(model, method if given else "none", **given), alike[0], alike[1], counter:
            model.encode_image(pixels[:1])
            report = vtprune.report(model)
        own = report.flops - report.flops_breakdown.scoring
        # What a method multiplies for itself is counted apart; torch counts both.
        assert own <= counter.get_total_flops() <= 1.01 * own + report.flops_breakdown.scoring
    assert "vision encoder" in str(report)
    assert "decoder layers" not in str(report)


@pytest.fixture(scope="module")
def llava() -> Any:
    """The bundled LLaVA, the tower that its features come from as open_clip's, a prompt, and the prompt's pixels."""
    model, processor = load_model(TINY_LLAVA)
    tower = from_transformers(model.model.vision_tower, layers=5)
    # The LLaVA reads what the fifth layer puts out, as it is.
    tower.output_tokens, tower.ln_post = True, torch.nn.Identity()
    content = [{"type": "image", "image": open_picture(EXAMPLE_IMAGE)}, {"type": "text", "text": "how many shapes?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    return model, tower, inputs


@pytest.mark.parametrize("method", METHODS)
def test_the_same_tower_in_a_llava_keeps_the_same_tokens(method: str, llava: Any) -> None:
    model, tower, inputs = llava
    given = {"keep": 20} if method != "mustdrop" else {"merge_threshold": 0.9}
    with vtprune.wrapped(model, method, **given):
        features = model.model.get_image_features(inputs["pixel_values"]).pooler_output
        model(**inputs)
        theirs = vtprune.report(model).samples[0].images[0]
    with vtprune.wrapped(tower, method, **given):
        _, tokens = tower(inputs["pixel_values"])
        ours = vtprune.report(tower).samples[0].images[0]
    assert len(ours.kept) < 144
    assert ours.kept == theirs.kept
    assert ours.cls == theirs.cls
    assert [replace(one, weights=[]) for one in ours.merged] == [
        replace(one, weights=[]) for one in theirs.merged if one.stage == "encoder"
    ]
    projected = model.model.multi_modal_projector(tokens[0, ours.kept])
    torch.testing.assert_close(projected, features[0][ours.kept], atol=2e-4, rtol=1e-4)
    gone = [token for token in range(144) if token not in ours.kept]
    assert not tokens[0, gone].any()


@pytest.mark.parametrize("method", ["fopru", "divprune", "holov", "grid", "pool", "random"])
def test_select_chooses_what_a_wrapped_llava_keeps(method: str, llava: Any) -> None:
    model, tower, inputs = llava
    (tokens,) = vtprune.encoder_tokens(tower, inputs["pixel_values"])
    features = model.model.multi_modal_projector(tokens.features)
    with vtprune.wrapped(model, method, keep=20):
        model(**inputs)
        theirs = vtprune.report(model).samples[0].images[0]
    own = {"signals": tokens.signals, "pixels": inputs["pixel_values"][0]}
    chosen = vtprune.select(features, method, keep=20, grid=tokens.grid, **own)
    assert chosen.kept.tolist() == theirs.kept
    assert [merge.members for merge in chosen.merges] == [tuple(merge.members) for merge in theirs.merged]


def test_the_mean_of_merged_patches_counts_each_as_often_as_it_stands(pixels: Tensor) -> None:
    model = random_clip("avg")
    visual = model.visual
    with vtprune.wrapped(model, "turbo", keep=9):
        visual.output_tokens, proj = True, visual.proj
        visual.proj = None
        pooled, tokens = visual(pixels)
        images = [sample.images[0] for sample in vtprune.report(model).samples]
    visual.proj = proj
    for row, image in enumerate(images):
        sizes = dict.fromkeys(image.kept, 1) | {merge.into: len(merge.members) for merge in image.merged}
        assert sum(sizes.values()) == 36
        mean = sum(size * tokens[row, token] for token, size in sizes.items()) / 36
        torch.testing.assert_close(pooled[row], mean, atol=2e-6, rtol=0)


@pytest.mark.parametrize("method", ["fopru", "fastv", "d2o", "pmod", "gemfilter", "mustdrop:merge=False"])
def test_methods_of_a_decoder_are_refused(method: str) -> None:
    with pytest.raises(vtprune.VTPruneError, match=r"decoder|nothing to do"):
        vtprune.wrap(random_clip(), method)


@pytest.mark.parametrize("option", [{"positions": "compact"}, {"keep_prompt": 9}, {"newlines": "drop"}])
def test_what_is_a_prompts_is_refused(option: dict[str, Any]) -> None:
    with pytest.raises(vtprune.VTPruneError, match=next(iter(option))):
        vtprune.wrap(random_clip(), "flowcut", **option)


@pytest.mark.parametrize("tower", [{"attentional_pool": True}, {"block_type": "custom"}])
def test_towers_that_cannot_be_right_are_refused(tower: dict[str, Any]) -> None:
    with pytest.raises(vtprune.UnsupportedModelError, match=r"pool|blocks"):
        vtprune.wrap(random_clip(**tower), "flowcut")


def test_gradient_checkpointing_is_refused_where_it_would_run_blocks_again(pixels: Tensor) -> None:
    model = random_clip()
    model.set_grad_checkpointing(True)
    grad, wrapped = torch.enable_grad(), vtprune.wrapped(model, "flowcut", keep=9)
    with grad, wrapped, pytest.raises(vtprune.VTPruneError, match="checkpointing"):
        model.encode_image(pixels)


def test_gradients_flow_through_the_tokens_that_are_left(pixels: Tensor) -> None:
    model, pixels = random_clip("avg"), pixels.requires_grad_()
    with torch.enable_grad(), vtprune.wrapped(model, "flowcut", keep=9):
        model.encode_image(pixels).sum().backward()
        report = vtprune.report(model)
    assert pixels.grad is not None
    assert pixels.grad.isfinite().all()
    assert pixels.grad.any()
    assert len(report.samples[0].images[0].kept) == 9


def test_methods_that_choose_by_features_run_on_what_a_tower_makes(pixels: Tensor) -> None:
    model = random_clip()
    plain = model.visual.forward_intermediates(pixels, output_fmt="NLC", normalize_intermediates=False)
    for row, tokens in enumerate(vtprune.encoder_tokens(model, pixels, layer=-2)):
        torch.testing.assert_close(tokens.features, plain["image_intermediates"][-2][row])
        chosen = vtprune.select(tokens.features, "fopru", keep=9, grid=tokens.grid, signals=tokens.signals)
        assert len(chosen.kept) == 9
        assert torch.equal(chosen.features, tokens.features[chosen.kept])


def test_a_pool_of_features_is_their_mean() -> None:
    features = torch.randn(16, 8)
    chosen = vtprune.select(features, "pool", keep=4, grid=(4, 4))
    means = features.view(2, 2, 2, 2, 8).mean(dim=(1, 3)).flatten(0, 1)
    torch.testing.assert_close(chosen.features, means)
    assert [sorted(merge.members) for merge in chosen.merges] == [
        [0, 1, 4, 5],
        [2, 3, 6, 7],
        [8, 9, 12, 13],
        [10, 11, 14, 15],
    ]


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"pruner": "fastv"}, "decoder"),
        ({"pruner": "flowcut"}, "encoder"),
        ({"pruner": "covipal"}, "trained"),
        ({"pruner": "gemfilter"}, "decoder layer"),
        ({"pruner": "fopru"}, "signals"),
        ({"pruner": "random"}, "pixels"),
        ({"pruner": "grid", "grid": (3, 3)}, "shape"),
        ({"pruner": "grid+random"}, "one method"),
    ],
)
def test_what_select_cannot_do_is_said(given: dict[str, Any], word: str) -> None:
    with pytest.raises(vtprune.VTPruneError, match=word):
        vtprune.select(torch.randn(16, 8), **{"grid": (4, 4), **given})


def test_encoder_tokens_says_what_it_takes(pixels: Tensor) -> None:
    with pytest.raises(vtprune.UnsupportedModelError, match="open_clip"):
        vtprune.encoder_tokens(torch.nn.Linear(2, 2), pixels)
    with pytest.raises(vtprune.VTPruneError, match="6 blocks"):
        vtprune.encoder_tokens(random_clip(), pixels, layer=6)
