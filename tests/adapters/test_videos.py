"""Videos: frames are what the tower attends within, a video has one budget, and its tokens are scored frame by frame.

That what is dropped is exact shows the matrix of `tests/test_support.py`; it cannot see a wrong score.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from einops import rearrange, reduce
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vtprune
from tests.flop_helper import measured_flops
from tests.models import PAST, VIDEO, VIDEOS, Row, make, prompt, tower_order
from tests.watched import images_of, streams_of
from vtprune.encoder.arrangement import Part
from vtprune.encoder.encoding import EncodedImage
from vtprune.method.choosing import top
from vtprune.method.kinds import Shown
from vtprune.method.plan import Plan
from vtprune.method.views import VisionStream

KINDS = ["qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen3-vl-moe"]
every_family = pytest.mark.parametrize("kind", KINDS)
every_tower = pytest.mark.parametrize("kind", [*KINDS, "qwen3.5"])
# Three frames, wider than the windows of Qwen2.5-VL's tower.
FRAMES = Row([2, 5], [(3, 5, 7)], 5)


@every_tower
def test_each_frame_is_scored_by_the_attention_that_the_tower_computed(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, Tensor, Tensor, float]] = []
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if hasattr(module, "qkv"):
            calls.append((module, query[0], key[0], kwargs.get("scaling", module.scaling)))
        return original(module, query, key, value, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", attention)
    inputs = prompt(kind, [FRAMES])
    (stream,) = streams_of(kind, inputs, monkeypatch)
    last = [call[1:] for call in calls if call[0] is calls[-1][0]]
    assert len(last) == 3, "one call a frame"
    received = []
    for query, key, scale in last:
        weights = (query @ key.mT * scale).softmax(dim=-1)
        received.append(reduce(weights, "h q (n g) -> n", "mean", g=4))
    order = tower_order(make(kind), inputs["video_grid_thw"])
    expected = torch.empty(105).index_copy(0, order, torch.cat(received))
    torch.testing.assert_close(stream.signals.saliency(), expected)
    mine, given = stream.signals.received_and_given()
    torch.testing.assert_close(mine, expected)
    torch.testing.assert_close(given, torch.full((105,), 1 / 140))
    assert stream.signals.lengths == (35, 35, 35)


@every_tower
@pytest.mark.parametrize("place", [(2, 4, 6), (1, 0, 5), (0, 4, 0)])
def test_a_bright_patch_comes_out_at_its_own_index(
    kind: str, place: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, (frame, row, column) = prompt(kind, [FRAMES]), place
    index = (frame * 5 + row) * 7 + column
    (before,) = streams_of(kind, inputs, monkeypatch)
    # The processor puts the four patches of a token behind each other.
    inputs["pixel_values_videos"][4 * index : 4 * index + 4] += 9.0
    (after,) = streams_of(kind, inputs, monkeypatch)
    assert int((after.features - before.features).norm(dim=-1).argmax()) == index
    assert int(after.frames[index]) == frame
    torch.testing.assert_close(after.pixels, inputs["pixel_values_videos"])


@every_tower
def test_a_video_has_one_budget_which_its_frames_share(kind: str) -> None:
    inputs = prompt(kind, [FRAMES, Row([2, 3, 4], [(4, 3), (2, 3, 3)], 6)])
    model = make(kind)
    with torch.no_grad(), vtprune.wrapped(model, "fopru", keep=10):
        model(**inputs)
        reports = images_of(model)
    assert [(one.kind, one.grid, len(one.kept)) for one in reports] == [
        ("video", (3, 5, 7), 10), ("image", (1, 4, 3), 10), ("video", (2, 3, 3), 10)
    ]  # fmt: skip
    for one in reports:
        frames = torch.tensor(one.kept) // (one.grid[1] * one.grid[2])
        assert one.kept_per_part == torch.bincount(frames, minlength=one.grid[0]).tolist()
    with torch.no_grad(), vtprune.wrapped(model, "fopru", keep=0.5, keep_video=0.1):
        model(**inputs)
        assert [len(one.kept) for one in images_of(model)] == [10, 6, 2]
        (stage,) = vtprune.report(model).stages
        assert (stage.asked_keep, stage.asked_keep_video) == (0.5, 0.1)


@pytest.mark.parametrize("method", ["fastv", "pyramid_drop", "vflowopt", "mustdrop", "sparsevlm", "lazyllm"])
def test_a_share_of_its_own_for_videos_is_what_that_share_alone_would_be(method: str) -> None:
    kind = "qwen2.5-vl"
    inputs, model = prompt(kind, [Row([2, 3, 9], [(6, 6), (3, 4, 5)], 6)]), make(kind)
    with torch.no_grad(), vtprune.wrapped(model, method, keep=0.8, keep_video=0.6):
        model(**inputs)
        image, video = (one.achieved_tokens for one in images_of(model))
    with torch.no_grad(), vtprune.wrapped(model, method, keep=0.6):
        model(**inputs)
        assert images_of(model)[1].achieved_tokens == video
    with torch.no_grad(), vtprune.wrapped(model, method, keep=0.8):
        model(**inputs)
        assert images_of(model)[0].achieved_tokens == image


def test_a_share_for_videos_is_checked_and_written_down_like_any_other() -> None:
    with pytest.raises(vtprune.VTPruneError, match="keep_video takes a count of vision tokens per video"):
        vtprune.FastV(keep_video=1.5)
    pruner = vtprune.FoPru(keep=0.5, keep_video=64)
    assert pruner.to_dict()["keep_video"] == 64
    assert "keep_video" not in vtprune.FoPru(keep=0.5).to_dict()
    with pytest.raises(vtprune.VTPruneError, match="not told apart; give keep alone"):
        vtprune.wrap(make("qwen2-vl"), "d2o", keep=0.5, keep_video=0.2)
    with pytest.raises(vtprune.VTPruneError, match="pmod routes its layers by one keep"):
        vtprune.wrap(make("qwen2-vl"), "pmod", keep=0.8, keep_video=0.7)


@every_family
@pytest.mark.parametrize("method", ["visionzip", "turbo", "flowcut"])
def test_what_prunes_in_the_tower_shares_the_budget_over_frames(kind: str, method: str) -> None:
    inputs, model = prompt(kind, [FRAMES]), vtprune.wrap(make(kind), method, keep=40)
    with torch.no_grad():
        out = model.model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
        model(**inputs)
    (report,) = images_of(model)
    stage = 2 if method == "flowcut" else 1
    alive = (torch.cat(list(out.pooler_output)).abs().sum(dim=-1) > 0).view(3, 35).sum(dim=1).tolist()
    assert alive == {1: [14, 13, 13], 2: [27, 27, 26]}[stage]
    assert len(report.kept_per_layer[-1]) == 40


def test_a_frame_keeps_at_least_one_token_in_the_tower() -> None:
    inputs, model = prompt("qwen2-vl", [FRAMES]), vtprune.wrap(make("qwen2-vl"), "visionzip", keep=2)
    with torch.no_grad(), pytest.warns(vtprune.KeptWholeWarning, match="a video of 105 tokens is kept whole"):
        model(**inputs)
    (report,) = images_of(model)
    assert report.kept_whole == (
        "visionzip prunes inside the vision encoder, where each of 3 frames keeps at least one token, and 2 are asked "
        "for"
    )
    assert len(report.kept) == 105
    pruner = vtprune.MustDrop().bind(model._vtprune.pruners[0].model)
    assert Plan((pruner,), Shown(105, "video", 3).tokens, 3).in_encoder(0) == 3


@every_tower
def test_a_frame_may_lose_all_its_tokens_and_the_report_says_so(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def first_frame(self: vtprune.Random, stream: VisionStream) -> vtprune.Selection:
        return vtprune.Selection.best(-stream.frames.float(), stream.budget)

    monkeypatch.setattr(vtprune.Random, "select", first_frame)
    inputs, model = prompt(kind, [FRAMES]), vtprune.wrap(make(kind), "random", keep=20)
    tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert tokens.shape[1] == inputs["input_ids"].shape[1] + 3
    assert images_of(model)[0].kept_per_part == [20, 0, 0]


def test_words_between_frames_are_the_videos_and_no_question(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = prompt("qwen3-vl", [FRAMES])
    ids = inputs["input_ids"][0]
    (stream,) = streams_of("qwen3-vl", inputs, monkeypatch)
    places = (ids == VIDEO).nonzero().flatten()
    outside = torch.cat([ids[: places[0]], ids[places[-1] + 1 :]])
    assert torch.equal(stream.text_ids, outside)
    # The end of the last frame, and the question.
    assert stream.text_after == 1 + 5


@every_tower
def test_tokens_of_several_frames_that_were_cut_are_still_scored_frame_by_frame(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = prompt(kind, [FRAMES])
    (whole,) = streams_of(kind, inputs, monkeypatch)
    kept = torch.cat([torch.arange(0, 30), torch.arange(70, 90)])
    monkeypatch.setattr(vtprune.Random, "select", lambda self, stream: vtprune.Selection(kept))
    seen: list[VisionStream] = []
    original = vtprune.HoloV.select
    monkeypatch.setattr(vtprune.HoloV, "select", lambda self, one: (seen.append(one), original(self, one))[1])
    with torch.no_grad(), vtprune.wrapped(make(kind), "random:keep=50+holov:keep=10") as model:
        model(**inputs)
    signals = seen[0].signals
    assert signals is not None
    assert signals.lengths == (30, 0, 20)
    parts = []
    for first, count in ((0, 30), (70, 20)):
        rows = slice(4 * first, 4 * (first + count))
        weights = (whole.signals.query[:, rows] @ whole.signals.key[:, rows].mT * whole.signals.scale).softmax(-1)
        parts.append(reduce(weights, "h q (n g) -> n", "mean", g=4))
    torch.testing.assert_close(signals.saliency(), torch.cat(parts))


@every_tower
def test_a_video_in_a_later_turn_stands_where_it_would_in_one_prompt(kind: str) -> None:
    first, second = prompt(kind, [Row([3, 4], [(4, 3)], 1)]), prompt(kind, [Row([2, 5], [(3, 2, 4)], 5)])
    joined = {name: torch.cat([first[name], second[name]], dim=1) for name in ("input_ids", "mm_token_type_ids")}
    model = make(kind)
    with torch.no_grad():
        expected = model(**{**first, **second, **joined}).logits[:, -second["input_ids"].shape[1] :]
        with vtprune.wrapped(model, "random", keep=1.0):
            cache = model(**first, use_cache=True).past_key_values
            actual = model(**second, **{PAST: cache}).logits
        assert float((actual - expected).abs().max()) < 2e-5
        with vtprune.wrapped(model, "divprune", keep=5):
            cache = model(**first, use_cache=True).past_key_values
            model(**second, **{PAST: cache})
            kept = [len(image.kept) for image in vtprune.report(cache).samples[0].images]
    assert kept == [5, 5]


@every_family
@pytest.mark.parametrize("method", ["none", "fastv:keep=0.5", "visionzip:keep=0.5", "lazyllm:keep=0.5", "pool"])
def test_beams_and_several_answers_keep_each_video_with_its_row(kind: str, method: str) -> None:
    model = vtprune.wrap(make(kind), method)
    options = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "num_return_sequences": 2}
    together = model.generate(**prompt(kind, VIDEOS), **options)[:, -4:]
    found = vtprune.report(model)
    assert [len(sample.images) for sample in found.samples[:1] + found.samples[-1:]] == [1, 0]
    for number, row in enumerate(VIDEOS):
        alone = model.generate(**prompt(kind, [row]), **options)[:, -4:]
        assert torch.equal(alone, together[2 * number : 2 * number + 2])


@every_family
def test_two_conversations_about_videos_may_alternate(kind: str) -> None:
    model = vtprune.wrap(make(kind), "fastv:keep=0.5")
    rows = [prompt(kind, [row]) for row in VIDEOS[:2]]
    with torch.no_grad():
        alone = [step_by_step(model, [inputs])[0] for inputs in rows]
        mixed = step_by_step(model, rows)
    for one, other in zip(alone, mixed, strict=True):
        assert torch.equal(one, other)


@every_family
@pytest.mark.parametrize("method", ["covipal:width=16,heads=2", "fastv", "turbo:keep=0.5", "frame_pool"])
def test_a_video_is_learned_from_with_checkpoints_as_without(kind: str, method: str) -> None:
    found = []
    for checkpoints in (False, True):
        torch.manual_seed(0)
        model = vtprune.wrap(make(kind), method).train()
        if checkpoints:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        inputs = prompt(kind, VIDEOS, "right")
        labels = inputs["input_ids"].masked_fill((inputs["input_ids"] >= 80) | (inputs["input_ids"] == 0), -100)
        model(**inputs, labels=labels).loss.backward()
        found.append(torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None]))
    assert bool(found[0].isfinite().all())
    assert float(found[0].abs().max()) > 0
    torch.testing.assert_close(*found)


def step_by_step(model: Any, rows: list[dict[str, Tensor]]) -> list[Tensor]:
    outs = [model(**inputs, use_cache=True) for inputs in rows]
    logits = [[out.logits[:, -1]] for out in outs]
    for token in (11, 12, 13):
        for out, own in zip(outs, logits, strict=True):
            step = model(input_ids=torch.tensor([[token]]), **{PAST: out.past_key_values})
            own.append(step.logits[:, -1])
    return [torch.cat(own) for own in logits]


def test_the_words_of_a_report_say_what_was_shown() -> None:
    model = vtprune.wrap(make("qwen2-vl"), "random", keep=0.5)
    lines = []
    for row in (Row([2, 3], [(4, 3)], 6), FRAMES, Row([2, 3, 4], [(4, 3), (2, 3, 3)], 6)):
        with torch.no_grad():
            model(**prompt("qwen2-vl", [row]))
        lines.append(str(vtprune.report(model)).splitlines()[1])
    assert lines == [
        "kept 6 of 12 tokens an image (50.0%), 1 image in 1 row",
        "kept 52 of 105 tokens a video (49.5%), 1 video in 1 row",
        "kept 7.5 of 15 tokens an image or video (50.0%), 2 images and videos in 1 row",
    ]


@every_family
@pytest.mark.parametrize("method", ["none", "random", "visionzip:keep=0.3", "fastv:keep=0.5", "turbo:keep=0.4"])
def test_flops_of_a_video_are_what_torch_counts(kind: str, method: str) -> None:
    inputs, model = prompt(kind, [FRAMES]), vtprune.wrap(make(kind, "eager"), method)
    counted = measured_flops(model, inputs)
    report = vtprune.report(model)
    assert report.flops == pytest.approx(counted, rel=0.01)


@every_family
def test_the_picture_of_a_video_is_one_of_each_pair_of_frames(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(kind)
    adapter = vtprune.wrap(model, "none")._vtprune._decoder.adapter
    pixels = torch.rand(3, 2, 3, 40, 56, generator=torch.Generator().manual_seed(2))
    patches = rearrange(pixels, "t time c (h gh ph) (w gw pw) -> (t h w gh gw) (c time ph pw)", gh=2, gw=2, ph=4, pw=4)
    monkeypatch.setattr(adapter, "real_colours", lambda values: values)
    video = EncodedImage((Part((1, 5, 7)),) * 3, torch.arange(105), None, patches, [], (), None)
    torch.testing.assert_close(adapter.picture(video), pixels[:, 0])


def test_the_most_salient_tokens_are_taken_over_all_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = prompt("qwen2-vl", [FRAMES])
    (stream,) = streams_of("qwen2-vl", inputs, monkeypatch)
    model = vtprune.wrap(make("qwen2-vl"), "fopru", keep=30)
    with torch.no_grad():
        model(**inputs)
    assert images_of(model)[0].kept == top(stream.signals.saliency(), 30).tolist()
