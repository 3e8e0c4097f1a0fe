"""Pictures in crops (LLaVA-NeXT, LLaVA-OneVision) and pooled videos: which patches a token is made of, what it is
scored by, and what an image keeps.

That what is dropped is exact shows the matrix of `tests/test_support.py`; it cannot see a wrong score.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vtprune
from tests.flop_helper import measured_flops
from tests.matrix import PRUNERS, label
from tests.models import ANYRES, CROPPED, EQUAL_VIDEOS, IMAGE, PAST, VIDEO, Row, make, prompt
from tests.oracle import TOLERANCE, compare, image_features, run_masked, run_wrapped
from tests.watched import images_of, streams_of
from vtprune.adapters import adapter_for
from vtprune.encoder.arrangement import Arrangement
from vtprune.method.kinds import IMAGE as PICTURE
from vtprune.method.views import VisionStream

every_family = pytest.mark.parametrize("kind", ANYRES)
every_video = pytest.mark.parametrize("kind", ["llava-next-video", "llava-onevision"])
# Pixels, height and width, and the crops of a picture that is larger than what OneVision leaves as it is.
LARGE = Row([3, 7], [(17, 19)], 1)


def arrangement_of(model: Any, height: int, width: int) -> Arrangement:
    """How the adapter lays out a picture of so many pixels."""
    adapter: Any = adapter_for(model)
    source = next(one for one in adapter.sources() if one.kind == PICTURE)
    (found,) = adapter._arrangements(source, {"image_sizes": torch.tensor([[height, width]])})
    return found


# ---- which patches a token is made of


@every_family
def test_tokens_are_what_the_model_makes_of_its_patches(kind: str) -> None:
    model, noise = make(kind), torch.Generator().manual_seed(3)
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    mixed = 0
    for _ in range(50):
        height, width = torch.randint(8, 120, (2,), generator=noise).tolist()
        found = arrangement_of(model, height, width)
        features = torch.randn(len(found.units), side * side, 5, generator=noise, dtype=torch.float64)
        newline = torch.full((5,), 7.0, dtype=torch.float64)
        strategy = {} if kind == "llava-onevision" else {"vision_feature_select_strategy": "default"}
        if kind == "llava-onevision":
            strategy = {"vision_aspect_ratio": "anyres_max_4"}
        packed = model.model.pack_image_features(
            [features], torch.tensor([[height, width]]), image_newline=newline, **strategy
        )[0][0]
        assert len(packed) == found.length
        ours = torch.full_like(packed, 7.0)
        flat = features.flatten(0, 1)
        ours[found.slots] = torch.cat([found.gather(flat, part) for part in range(len(found.parts))])
        torch.testing.assert_close(ours, packed, atol=1e-6, rtol=0)
        assert sum(part.tokens for part in found.parts) == found.tokens
        mixed += found.mixed
    assert bool(mixed) == (kind == "llava-onevision")


# Height and width in pixels, then crops, placeholders, newlines and patches that unpadding cuts, counted by hand.
PUBLISHED = [
    (336, 336, 3, 1176, 24, 576),
    (672, 672, 5, 2928, 48, 0),
    (480, 640, 5, 2340, 36, 576),
    (427, 640, 5, 2144, 32, 768),
    (1080, 1920, 5, 1948, 28, 960),
    (1000, 300, 4, 2232, 72, 144),
]


@pytest.fixture(scope="module")
def published() -> Any:
    """LLaVA-NeXT's published shapes, narrower and shallower."""
    config = LlavaNextConfig(
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
            "num_attention_heads": 2, "image_size": 336, "patch_size": 14,
        },
        text_config={
            "model_type": "mistral", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
            "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 100, "sliding_window": None,
        },
        image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        image_token_id=IMAGE,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlavaNextForConditionalGeneration(config).eval()


@pytest.mark.parametrize(("height", "width", "crops", "length", "newlines", "cut"), PUBLISHED)
def test_published_sizes_have_the_tokens_that_they_have_by_hand(
    height: int, width: int, crops: int, length: int, newlines: int, cut: int, published: Any
) -> None:
    found = arrangement_of(published, height, width)
    assert (len(found.units), found.length, found.length - found.tokens) == (crops, length, newlines)
    assert int((~found.visible).sum()) == cut
    assert found.parts[1].grid[1] == newlines


def test_a_picture_of_672_pixels_has_the_budget_and_the_flops_that_it_has_by_hand(published: Any) -> None:
    words = 6
    inputs = {
        "input_ids": torch.tensor([[*range(1, words - 1), *[IMAGE] * 2928, 5, 6]]),
        "pixel_values": torch.randn(1, 5, 3, 336, 336),
        "image_sizes": torch.tensor([[672, 672]]),
    }
    with torch.no_grad(), vtprune.wrapped(published, "random", keep=0.25) as model:
        model(**inputs, logits_to_keep=1)
        report = vtprune.report(model)
        (image,) = images_of(model)
    assert (image.tokens, len(image.kept), image.structural, image.structural_left) == (2880, 720, 48, 48)
    assert image.parts == [(1, 24, 24), (1, 48, 48)]
    assert image.kept_per_part == [sum(token < 576 for token in image.kept), sum(token >= 576 for token in image.kept)]

    def layer(tokens: int) -> int:
        # q and o of 16 x 16, k and v of 16 x 8, three matrices of the MLP, and scores and values.
        return 2 * tokens * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24) + 2 * 2 * 16 * tokens**2

    whole, left = 2880 + 48 + words, 720 + 48 + words
    assert report.flops_full - report.flops == 3 * (layer(whole) - layer(left))
    patches, tower = 577, 2 * 577 * (4 * 16 * 16 + 2 * 16 * 24) + 2 * 2 * 16 * 577**2
    assert report.flops_breakdown.vision_tower == 5 * (3 * tower + 2 * (patches - 1) * 14 * 14 * 3 * 16)
    assert report.flops_breakdown.projector == 2 * 2880 * (16 * 16 + 16 * 16)


# ---- what tokens are scored by


def attention_of_units(monkeypatch: pytest.MonkeyPatch, kind: str) -> list[tuple[Any, Tensor]]:
    """Collects the attention (U, H, n, n) of every encoder layer that runs, with its module."""
    found: list[tuple[Any, Tensor]] = []
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if hasattr(module, "out_proj"):
            found.append((module, (query @ key.mT * kwargs["scaling"]).softmax(dim=-1)))
        return original(module, query, key, value, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", attention)
    return found


def features_layer(model: Any, calls: list[tuple[Any, Tensor]]) -> Tensor:
    return calls[model.config.vision_feature_layer][1]


@every_family
@pytest.mark.parametrize("row", [CROPPED[0], CROPPED[1], LARGE], ids=["upright", "wide", "large"])
def test_each_crop_is_scored_by_the_attention_that_the_tower_computed(
    kind: str, row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, inputs = attention_of_units(monkeypatch, kind), prompt(kind, [row])
    (stream,) = streams_of(kind, inputs, monkeypatch)
    model = make(kind)
    weights = features_layer(model, calls)
    cls = kind != "llava-onevision"
    scores = weights[:, :, 0, 1:].mean(dim=1) if cls else reduce(weights, "u h q n -> u n", "mean")
    height, width = inputs["image_sizes"][0].tolist()
    layout = arrangement_of(model, height, width)
    expected = torch.cat([layout.gather(scores.flatten(), part) for part in range(len(layout.parts))])
    torch.testing.assert_close(stream.signals.saliency(), expected)
    received = reduce(weights[:, :, cls:, cls:], "u h q n -> u n", "mean")
    received = torch.cat([layout.gather(received.flatten(), part) for part in range(len(layout.parts))])
    torch.testing.assert_close(stream.signals.received_attention(), received)
    # And the model's own functions say the same of where a score belongs.
    strategy: dict[str, Any] = {"vision_feature_select_strategy": "default"}
    if not cls:
        strategy = {"vision_aspect_ratio": "anyres_max_4"}
    packed = model.model.pack_image_features(
        [scores[..., None]], inputs["image_sizes"], image_newline=torch.tensor([-1.0]), **strategy
    )[0][0][:, 0]
    torch.testing.assert_close(stream.signals.saliency(), packed[packed >= 0])


@every_video
def test_a_pooled_token_of_a_video_is_scored_by_its_patches(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, inputs = attention_of_units(monkeypatch, kind), prompt(kind, [EQUAL_VIDEOS[0]])
    (stream,) = streams_of(kind, inputs, monkeypatch)
    model = make(kind)
    weights = features_layer(model, calls)
    cls = kind == "llava-next-video"
    scores = weights[:, :, 0, 1:].mean(dim=1) if cls else reduce(weights, "u h q n -> u n", "mean")
    pool = model.model.vision_resampler if cls else model.model.apply_pooling
    torch.testing.assert_close(stream.signals.saliency(), pool(scores[..., None])[..., 0].flatten())
    assert stream.grid == (3, 3, 3)
    assert stream.frames.tolist() == [frame for frame in range(3) for _ in range(9)]


def _pixels_of(inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The pixels of each rectangle, as a method sees them that looks at pixels."""
    seen: list[Tensor] = []
    original = vtprune.VFlowOpt.remember
    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(
            vtprune.VFlowOpt, "remember", lambda self, stream: (seen.append(stream.pixels), original(self, stream))[1]
        )
        with vtprune.wrapped(make("llava-next"), "vflowopt:keep=0.5,variant='released',alpha=0.5") as model:
            model(**inputs)
    return seen


@pytest.mark.parametrize("place", [(0, 1, 2), (2, 0, 0), (3, 5, 1), (4, 2, 4)])
def test_a_bright_patch_comes_out_at_its_own_index(
    place: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    crop, row, column = place
    # 48 x 48 pixels: four full crops of 6 x 6 patches in two rows, behind the picture itself.
    inputs = prompt("llava-next", [Row([3, 7], [(12, 12)], 1)])
    (before,) = streams_of("llava-next", inputs, monkeypatch)
    inputs["pixel_values"][0, crop, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 9.0
    (after,) = streams_of("llava-next", inputs, monkeypatch)
    above, left = divmod(crop - 1, 2)
    index = 36 + (6 * above + row) * 12 + 6 * left + column if crop else 6 * row + column
    assert int((after.features - before.features).norm(dim=-1).argmax()) == index
    part = 0 if crop == 0 else 1
    pixels = [
        _pixels_of(prompt("llava-next", [Row([3, 7], [(12, 12)], 1)]), monkeypatch),
        _pixels_of(inputs, monkeypatch),
    ]
    bright = (pixels[1][part] - pixels[0][part]).sum(dim=0) > 1
    top = index if crop == 0 else index - 36
    height, width = divmod(top, 6 if crop == 0 else 12)
    assert bright.nonzero()[0].tolist() == [4 * height, 4 * width]
    assert int(bright.sum()) == 16


@every_family
def test_what_an_earlier_method_left_is_scored_as_if_nothing_else_had_been_there(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = prompt(kind, [CROPPED[0]])
    (whole,) = streams_of(kind, inputs, monkeypatch)
    kept = torch.arange(whole.total)[::3]
    cut = whole.signals.cut(kept)
    layout, every = whole.signals.sources, torch.ones(sum(whole.signals.lengths), dtype=torch.bool)
    every[layout.flatten()] = False
    every[layout[kept].flatten()] = True
    expected, first = [], 0
    for unit, length in zip(whole.signals.units, whole.signals.lengths, strict=True):
        stays = every[first : first + length]
        rows = torch.cat([torch.ones(unit.prefix, dtype=torch.bool), stays])
        weights = (unit.query[:, rows] @ unit.key[:, rows].mT * unit.scale).softmax(dim=-1)
        scores = torch.zeros(length)
        own = weights[:, 0, 1:].mean(dim=0) if unit.prefix else weights.mean(dim=(0, 1))
        scores[stays] = own
        expected.append(scores)
        first += length
    torch.testing.assert_close(cut.saliency(), torch.cat(expected)[layout[kept, 0]])


# ---- what an image keeps


@pytest.mark.parametrize("method", ["flowcut", "visionzip", "turbo", "random", "fopru", "divprune"])
@pytest.mark.parametrize("kind", ["llava-next", "llava-onevision"])
@pytest.mark.parametrize("keep", [0.3, 17])
def test_crops_share_one_budget_and_what_unpadding_cuts_takes_none_of_it(kind: str, method: str, keep: float) -> None:
    inputs = prompt(kind, CROPPED)
    with torch.no_grad(), vtprune.wrapped(make(kind), method, keep=keep) as model:
        model(**inputs)
        reports = images_of(model)
    for image in reports:
        asked = keep if isinstance(keep, int) else round(keep * image.tokens)
        assert image.achieved_tokens == asked
        assert image.structural == image.structural_left > 0
        assert max(image.kept) < image.tokens


def test_crops_with_more_of_the_picture_get_more_of_the_budget() -> None:
    inputs = prompt("llava-next", [CROPPED[1]])
    layout = arrangement_of(make("llava-next"), *inputs["image_sizes"][0].tolist())
    sizes = layout.visible.view(len(layout.units), -1).sum(dim=1)
    with torch.no_grad(), vtprune.wrapped(make("llava-next"), "flowcut", keep=0.5) as model:
        model(**inputs)
        (image,) = images_of(model)
    unit = layout.sources[image.kept, 0] // 36
    exact = sizes / sizes.sum() * len(image.kept)
    assert float((torch.bincount(unit, minlength=len(sizes)) - exact).abs().max()) < 1


@pytest.mark.parametrize("method", ["grid", "pool", "holov", "vflowopt", "gemfilter:pooling=grid"])
def test_methods_that_think_in_rows_and_columns_share_the_budget_over_rectangles(method: str) -> None:
    inputs = prompt("llava-next", [Row([3, 7], [(12, 12)], 1)])
    options = {} if ":" in method else {"keep": 0.25}
    method += ",keep=0.25" if ":" in method else ""
    with torch.no_grad(), vtprune.wrapped(make("llava-next"), method, **options) as model:
        model(**inputs)
        (image,) = images_of(model)
    entering = len(image.kept)
    assert image.parts == [(1, 6, 6), (1, 12, 12)]
    shares = [round(entering * size / 180) for size in (36, 144)]
    # A grid's cells may not use up what each rectangle may keep.
    assert all(0 < own <= share + 1 for own, share in zip(image.kept_per_part, shares, strict=True))
    if method == "grid":
        rows = {(token - 36) // 12 for token in image.kept if token >= 36}
        assert len(rows) == 6, "six rows of the large grid, as many as of a picture of its own"


@pytest.mark.parametrize("method", ["fopru:keep=0.34,strategy=row", "grid:keep=0.25", "holov:keep=0.25"])
def test_a_rectangle_is_chosen_from_as_if_it_were_an_image(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = prompt("llava-next", [Row([3, 7], [(12, 12)], 1)])
    model = vtprune.wrap(make("llava-next"), method)
    (pruner,) = model.__dict__["_vtprune"].pruners
    shown: list[tuple[VisionStream, Any]] = []
    original = type(pruner).select

    def select(self: Any, stream: VisionStream) -> Any:
        found = original(self, stream)
        shown.append((stream, found))
        return found

    monkeypatch.setattr(type(pruner), "select", select)
    with torch.no_grad():
        model(**inputs)
    (image,) = images_of(model)
    assert [stream.grid for stream, _ in shown] == [(1, 6, 6), (1, 12, 12)]
    assert [stream.total for stream, _ in shown] == [36, 144]
    kept = [start + token for start, (_, found) in zip((0, 36), shown, strict=True) for token in found.kept.tolist()]
    assert image.kept == kept


# ---- newlines


@pytest.mark.parametrize("policy", ["keep", "rows", "drop"])
@pytest.mark.parametrize(
    "pruner", [one for one in PRUNERS if one.name in ("grid", "visionzip", "fastv", "lazyllm", "pmod")], ids=label
)
def test_newlines_stay_with_their_rows_or_go(pruner: Any, policy: str) -> None:
    kind = "llava-next"
    inputs, model = prompt(kind, CROPPED), make(kind)
    vtprune.wrap(model, pruner, newlines=policy)
    logits, report, cache = run_wrapped(kind, model, inputs)
    features = image_features(model, inputs)
    vtprune.unwrap(model)
    report = vtprune.report(cache) if pruner.name == "lazyllm" else report
    expected = run_masked(kind, model, inputs, report, features, newlines=policy)
    assert compare(logits, expected, inputs) < TOLERANCE
    for sample in report.samples:
        for image in sample.images:
            cut = len(image.kept) < image.tokens
            left = {"keep": image.structural, "drop": 0}.get(policy if cut else "keep", image.structural_left)
            assert image.structural_left == left


def test_a_saved_method_says_that_it_holds_no_policy_for_newlines(tmp_path: Path) -> None:
    model = vtprune.wrap(make("llava-next"), "fopru", newlines="rows")
    with pytest.warns(UserWarning, match="a config holds no newlines: give newlines='rows' to wrap again"):
        vtprune.save_config(model, tmp_path)


def test_a_report_holds_no_pixels_and_no_table_of_patches() -> None:
    inputs = prompt("llava-next", CROPPED)
    with torch.no_grad(), vtprune.wrapped(make("llava-next"), "fopru", keep=0.5) as model:
        model(**inputs)
        images = model.__dict__["_vtprune"].generation.trail.images
    assert len(images) == 4
    assert all(image.encoded.pixels is None and image.encoded.arrangement is None for image in images)


def test_sizes_of_pictures_are_forgotten_where_they_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtprune.adapters.llava_anyres.MOST_SIZES", 3)
    adapter: Any = adapter_for(make("llava-next"))
    (source,) = adapter.sources()
    for side in range(20, 60, 4):
        adapter._arrangements(source, {"image_sizes": torch.tensor([[side, 40]])})
        assert len(adapter._known) <= 3


def test_rows_without_a_token_lose_their_newline_and_cost_nothing() -> None:
    inputs, model = prompt("llava-next", [CROPPED[0]]), make("llava-next")
    found = {}
    for policy in ("keep", "rows", "drop"):
        with torch.no_grad(), vtprune.wrapped(model, "random", keep=3, newlines=policy):
            model(**inputs, use_cache=True)
            report = vtprune.report(model)
            (image,) = images_of(model)
            found[policy] = (image.structural_left, report.kv_tokens_per_layer[0][0], report.flops_breakdown.decoder)
    newlines = {policy: values[0] for policy, values in found.items()}
    rows = {(token - 36) // image.parts[1][2] for token in image.kept if token >= 36}
    assert newlines == {"keep": image.structural, "rows": len(rows), "drop": 0}
    assert [values[1] for values in found.values()] == [3 + 10 + count for count in newlines.values()]
    assert found["keep"][2] > found["rows"][2] > found["drop"][2]


def test_a_whole_picture_keeps_its_newlines_and_a_family_without_them_says_so() -> None:
    inputs, model = prompt("llava-next", [CROPPED[0]]), make("llava-next")
    with torch.no_grad():
        expected = model(**inputs).logits
        with vtprune.wrapped(model, "fopru", keep=1.0, newlines="drop"):
            assert torch.equal(model(**inputs).logits, expected)
    with pytest.raises(vtprune.VTPruneError, match="newlines is one of 'keep', 'rows', 'drop', got 'some'"):
        vtprune.wrap(model, "fopru", newlines="some")
    with pytest.raises(vtprune.VTPruneError, match="llava has no tokens that end rows"):
        vtprune.wrap(make("llava-clip"), "fopru", newlines="drop")


@pytest.mark.parametrize("method", ["flowcut", "sparsevlm", "pyramid_drop", "turbo"])
@pytest.mark.parametrize("policy", ["keep", "rows"])
def test_flops_are_what_torch_counts(method: str, policy: str) -> None:
    inputs = prompt("llava-next", [CROPPED[0]])
    with vtprune.wrapped(make("llava-next", "eager"), method, keep=0.5, newlines=policy) as model:
        measured = measured_flops(model, inputs)
        assert abs(vtprune.report(model).flops - measured) < 0.01 * measured


@every_video
def test_flops_of_a_pooled_video_are_what_torch_counts(kind: str) -> None:
    inputs = prompt(kind, [EQUAL_VIDEOS[0]])
    with vtprune.wrapped(make(kind, "eager"), "fastv", keep=0.5) as model:
        measured = measured_flops(model, inputs)
        assert abs(vtprune.report(model).flops - measured) < 0.01 * measured
        vtprune.unwrap(model)
        whole = measured_flops(model, inputs)
        vtprune.wrap(model, "none")
        measured_flops(model, inputs)
        assert abs(vtprune.report(model).flops_full - whole) < 0.01 * whole


@every_family
def test_flops_from_a_config_alone_are_what_torch_counts(kind: str) -> None:
    inputs, model = prompt(kind, [CROPPED[0]]), make(kind, "eager")
    with torch.no_grad(), vtprune.wrapped(model, "none"):
        model(**inputs)
        (image,) = images_of(model)
    side, crops = image.parts[0][1], inputs["pixel_values"].shape[1]
    found = vtprune.flops(
        model.config,
        image.tokens,
        text_tokens=inputs["input_ids"].shape[1] - image.tokens,
        images=[(crops, side, side)],
    )
    assert found.total == measured_flops(model, inputs)


# ---- ways through generate


OPTIONS: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}


def _repeats_videos(kind: str, model: Any) -> bool:
    """Whether the unpruned model itself takes beams with videos: releases that answer them frame by frame do not."""
    try:
        model.generate(**prompt(kind, [EQUAL_VIDEOS[0]]), **OPTIONS, num_beams=2)
    except ValueError:
        return False
    return True


@every_family
@pytest.mark.parametrize("method", ["random", "visionzip", "lazyllm"])
def test_beams_and_several_answers_keep_each_image_with_its_row(kind: str, method: str) -> None:
    model = make(kind)
    rows = (
        CROPPED if method == "visionzip" or kind == "llava-next" or not _repeats_videos(kind, model) else EQUAL_VIDEOS
    )
    with vtprune.wrapped(model, method, keep=0.5):
        beams = {"num_beams": 3, "num_return_sequences": 2}
        together = model.generate(**prompt(kind, rows), **OPTIONS, **beams)[:, -4:]
        assert len(vtprune.report(model).samples) == 3 * len(rows)
        for number, row in enumerate(rows):
            alone = model.generate(**prompt(kind, [row]), **OPTIONS, **beams)[:, -4:]
            assert torch.equal(alone, together[2 * number : 2 * number + 2])


@every_family
def test_a_row_is_the_same_beside_pictures_of_more_crops(kind: str) -> None:
    model = make(kind)
    for method in ("random", "fopru", "vflowopt"):
        with torch.no_grad(), vtprune.wrapped(model, method, keep=0.4):
            together = model(**prompt(kind, CROPPED)).logits
            kept = [image.kept for image in images_of(model)]
            alone = []
            for number, row in enumerate(CROPPED):
                logits = model(**prompt(kind, [row])).logits
                alone += [image.kept for image in images_of(model)]
                assert float((together[number, -4:] - logits[0, -4:]).abs().max()) < TOLERANCE
        assert kept == alone


@every_family
def test_a_second_turn_may_bring_another_picture(kind: str) -> None:
    model, first, second = make(kind), prompt(kind, [CROPPED[0]]), prompt(kind, [Row([2, 4], [(6, 13)], 2)])
    new = {name: second[name] for name in ("pixel_values", "image_sizes")}
    with torch.no_grad(), vtprune.wrapped(model, "fopru", keep=0.5):
        out = model(**first, use_cache=True)
        answer = model(input_ids=second["input_ids"], **{PAST: out.past_key_values}, **new, use_cache=True)
        reports = images_of(model)
    assert len(reports) == 2
    assert [len(image.kept) for image in reports] == [round(0.5 * image.tokens) for image in reports]
    with torch.no_grad(), vtprune.wrapped(model, "none"):
        model(**second)
    # Both pictures in one prompt, with what was dropped of each masked out.
    ids = torch.cat([first["input_ids"], second["input_ids"]], dim=1)
    pixels = nn.utils.rnn.pad_sequence([*first["pixel_values"], *second["pixel_values"]], batch_first=True)
    both = {"pixel_values": pixels, "image_sizes": torch.cat([first["image_sizes"], second["image_sizes"]])}
    with torch.no_grad(), vtprune.wrapped(model, "fopru", keep=0.5):
        whole = model(input_ids=ids, **both).logits
    assert float((whole[:, -4:] - answer.logits[:, -4:]).abs().max()) < TOLERANCE


@every_family
def test_two_conversations_may_alternate(kind: str) -> None:
    model, one, two = make(kind), prompt(kind, [CROPPED[0]]), prompt(kind, [CROPPED[1]])
    token = torch.tensor([[7]])
    with torch.no_grad(), vtprune.wrapped(model, "fastv", keep=0.5):
        alone = []
        for inputs in (one, two):
            out = model(**inputs, use_cache=True)
            alone.append(model(input_ids=token, **{PAST: out.past_key_values}).logits)
        caches = [model(**inputs, use_cache=True).past_key_values for inputs in (one, two)]
        mixed = [model(input_ids=token, **{PAST: cache}).logits for cache in caches]
    assert all(map(torch.equal, alone, mixed))


# ---- what cannot be


@pytest.mark.parametrize("method", ["flowcut", "visionzip", "turbo"])
def test_patches_that_tokens_are_mixed_of_are_not_dropped_in_the_encoder(method: str) -> None:
    inputs = prompt("llava-onevision", [LARGE])
    assert arrangement_of(make("llava-onevision"), *inputs["image_sizes"][0].tolist()).mixed
    model = vtprune.wrap(make("llava-onevision"), method, keep=0.3)
    with torch.no_grad(), pytest.raises(vtprune.VTPruneError, match=f"{method} prunes inside .* a picture this large"):
        model(**inputs)
    with torch.no_grad(), pytest.raises(vtprune.VTPruneError, match="each token of this video"):
        model(**prompt("llava-onevision", [EQUAL_VIDEOS[0]]))
    # A picture that is small enough goes through the same wrapped model.
    with torch.no_grad():
        model(**prompt("llava-onevision", [CROPPED[0]]))


@pytest.mark.parametrize(
    "pruner",
    [one for one in PRUNERS if one.name in ("fopru", "holov", "vflowopt", "pool", "fastv", "random")],
    ids=label,
)
def test_tokens_that_are_mixed_of_patches_are_dropped_before_the_decoder(pruner: Any) -> None:
    kind = "llava-onevision"
    inputs, model = prompt(kind, [LARGE, CROPPED[0]]), make(kind)
    vtprune.wrap(model, pruner)
    logits, report, _ = run_wrapped(kind, model, inputs)
    features = image_features(model, inputs)
    expected = run_masked(kind, vtprune.unwrap(model), inputs, report, features)
    assert compare(logits, expected, inputs) < TOLERANCE


def test_a_pooling_that_is_no_mean_is_refused_by_name() -> None:
    model = make("llava-next-video")
    model.config.spatial_pool_mode = "max"
    with pytest.raises(vtprune.UnsupportedModelError, match="spatial_pool_mode='max'"):
        vtprune.wrap(model, "fopru")


def test_several_pictures_of_one_prompt_are_not_cut_where_the_call_says_so() -> None:
    # The processor of OneVision gives one crop for each of several pictures, and says how many there are.
    model, kind = make("llava-onevision"), "llava-onevision"
    side = model.config.vision_config.image_size
    inputs = {
        "input_ids": torch.tensor([[3, *[IMAGE] * 26, 4, *[IMAGE] * 26, 5, 6]]),
        "pixel_values": torch.randn(2, 1, 3, side, side),
        "image_sizes": torch.tensor([[55, 35], [30, 65]]),
        "batch_num_images": torch.tensor([2]),
    }
    with torch.no_grad(), vtprune.wrapped(model, "fopru", keep=0.4):
        model(**inputs)
        reports = images_of(model)
    assert [(image.parts, len(image.kept), image.structural) for image in reports] == [([(1, 5, 5)], 10, 1)] * 2
    assert kind in ANYRES


def test_the_pixels_of_a_frame_are_those_of_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = "llava-next-video"
    inputs = prompt(kind, [EQUAL_VIDEOS[0]])
    shown: list[Tensor] = []
    original = vtprune.VFlowOpt.remember
    monkeypatch.setattr(
        vtprune.VFlowOpt, "remember", lambda self, stream: (shown.append(stream.picture), original(self, stream))[1]
    )
    with torch.no_grad(), vtprune.wrapped(make(kind), "vflowopt", keep=0.5) as model:
        adapter = model.__dict__["_vtprune"]._decoder.adapter
        monkeypatch.setattr(adapter, "real_colours", lambda pixels: pixels)
        model(**inputs)
    frames = inputs["pixel_values_videos"][0]
    blocks = rearrange(frames, "t c (h gh p) (w gw q) -> t c h gh p w gw q", gh=2, gw=2, p=4, q=4)
    expected = rearrange(blocks.mean(dim=(3, 6)), "t c h p w q -> t c (h p) (w q)")
    torch.testing.assert_close(shown[0], expected)
    assert int((inputs["input_ids"] == VIDEO).sum()) == 27
