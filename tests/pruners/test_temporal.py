"""EVS, DyCoke, pooled and skipped frames: what they keep of a video; and that every method of videos leaves images
whole, and takes few frames and small ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import vtprune
from tests.models import Row, make, prompt
from tests.streams import kept_by, video
from vtprune.errors import ScoreError, VTPruneError
from vtprune.pruners.dycoke import compared
from vtprune.pruners.evs import temporal_change

TEMPORAL = ["evs", "dycoke", "vidcom2", "holitom", "fastvid", "frame_pool", "frame_skip"]


# ---- EVS


def test_evs_keeps_the_first_frame_and_what_changes_most() -> None:
    shown = video(budget=20)
    frames = shown.features.unflatten(0, (8, 6))
    change = 1 - torch.nn.functional.cosine_similarity(frames[1:], frames[:-1], dim=-1)
    best = change.flatten().topk(14).indices + 6
    assert kept_by(vtprune.EVS(keep=20), shown) == [*range(6), *sorted(best.tolist())]


def test_evs_takes_what_moves_before_anything_of_a_still_frame() -> None:
    shown = video(budget=9, still=True)
    assert kept_by(vtprune.EVS(keep=9), shown)[:6] == list(range(6))
    moving = shown.features.clone()
    moving[6 * 5 + 2] = -moving[6 * 5 + 2]
    # The changed token differs from the frame before, and the frame after it from the changed one.
    assert kept_by(vtprune.EVS(keep=8), replace(shown, features=moving, budget=8)) == [*range(6), 32, 38]


def test_evs_below_one_frame_keeps_what_is_least_like_the_mean_of_the_first() -> None:
    shown = video(budget=3)
    first = shown.features[:6]
    unlike = 1 - torch.nn.functional.cosine_similarity(first, first.mean(dim=0, keepdim=True))
    assert kept_by(vtprune.EVS(keep=3), shown) == sorted(unlike.topk(3).indices.tolist())
    assert float(temporal_change(shown.features.unflatten(0, (8, 6)))[1:].max()) <= 2.0


def test_evs_refuses_features_that_are_no_numbers() -> None:
    shown = video()
    shown.features[13] = torch.nan
    with pytest.raises(ScoreError, match="evs"):
        vtprune.EVS(keep=20).select(shown)


# ---- DyCoke


def test_dycoke_compares_the_others_of_a_window_with_the_frames_that_the_paper_names() -> None:
    assert compared(9, released=False) == [None, 0, 0, 2, None, 4, 4, 6, None]
    assert compared(8, released=True) == [None, 0, 0, 2, None, 4, None, 6]
    assert compared(9, released=True) == [None, 0, 0, 2, None, 4, 4, 6, -1]
    # Of a single frame nothing would be left.
    assert compared(1, released=True) == [None]


def test_dycoke_keeps_what_is_unlike_in_the_published_share_or_as_much_as_keep_asks_for() -> None:
    shown = video(8)
    frames = shown.features.unflatten(0, (8, 6))
    for pruner, count in ((vtprune.DyCoke(), 1), (vtprune.DyCoke(ratio=0.5), 3), (vtprune.DyCoke(keep=0.5), 2)):
        expected = []
        for frame, other in enumerate([None, 0, 0, 2, None, 4, 4, 6]):
            own = list(range(6))
            if other is not None:
                alike = torch.nn.functional.cosine_similarity(frames[frame], frames[other], dim=-1)
                own = sorted(alike.topk(count, largest=False).indices.tolist())
            expected += [frame * 6 + token for token in own]
        assert kept_by(pruner, shown) == expected


def test_dycoke_says_why_it_cannot_go_below_a_quarter() -> None:
    selection = vtprune.DyCoke(keep=0.2).select(video(8))
    assert selection.kept.numel() == 48
    assert selection.note == "kept whole: the 2 frames that stay whole have 12 tokens, more than the budget"
    assert kept_by(vtprune.DyCoke(keep=12), video(8)) == [*range(6), *range(24, 30)]
    with pytest.raises(VTPruneError, match="keep and ratio contradict each other"):
        vtprune.DyCoke(keep=0.5, ratio=0.5)


# ---- pooled and skipped frames


@pytest.mark.parametrize("method", [vtprune.FramePool, vtprune.FrameSkip])
def test_every_frame_or_all_tokens_leave_a_video_as_it_is(method: Any) -> None:
    assert method(every=1).select(video()) is None
    assert method(keep=1.0).select(video()) is None


@pytest.mark.parametrize(("frames", "every", "groups"), [(8, 4, 2), (9, 4, 3), (7, 2, 4), (3, 4, 1)])
def test_pooled_frames_are_means_of_their_group_and_a_rest_is_one_of_its_own(
    frames: int, every: int, groups: int
) -> None:
    shown = video(frames)
    selection = vtprune.FramePool(every=every).select(shown)
    values = shown.features.unflatten(0, (frames, 6))
    expected = torch.cat([values[start : start + every].mean(dim=0) for start in range(0, frames, every)])
    torch.testing.assert_close(selection.vectors, expected)
    first = [start * 6 + token for start in range(0, frames, every) for token in range(6)]
    assert (len(first), selection.kept.tolist()) == (groups * 6, first)
    for merge in selection.merged():
        own = shown.features[list(merge.members)]
        torch.testing.assert_close(expected[first.index(merge.into)], own.mean(dim=0))


def test_pooling_a_still_video_gives_its_frame() -> None:
    shown = video(8, still=True)
    selection = vtprune.FramePool().select(shown)
    torch.testing.assert_close(selection.vectors, shown.features[:12])


def test_skipped_frames_leave_every_other_one_or_as_many_as_fit() -> None:
    assert kept_by(vtprune.FrameSkip(), video(5)) == [*range(6), *range(12, 18), *range(24, 30)]
    assert kept_by(vtprune.FrameSkip(keep=20), video(8)) == [*range(6), *range(18, 24), *range(36, 42)]
    assert len(kept_by(vtprune.FramePool(keep=20), video(8))) == 18


@pytest.mark.parametrize("method", [vtprune.FramePool, vtprune.FrameSkip])
def test_one_frame_is_the_least_that_stays(method: Any) -> None:
    selection = method(keep=4).select(video(8))
    assert selection.kept.tolist() == list(range(6))
    assert selection.note == "one frame is the least that stays: 6 tokens, of a budget of 4"
    with pytest.raises(VTPruneError, match="every is an int of at least 1"):
        method(every=0)
    with pytest.raises(VTPruneError, match="keep and every contradict each other"):
        method(keep=0.5, every=2)


# ---- in a model


@pytest.mark.parametrize("method", TEMPORAL)
def test_images_stay_whole_beside_a_video_that_is_cut(method: str) -> None:
    inputs = prompt("qwen2.5-vl", [Row([2, 3, 4], [(4, 3), (8, 2, 3)], 6)])
    model = vtprune.wrap(make("qwen2.5-vl"), method)
    with torch.no_grad():
        model(**inputs)
    image, shown = vtprune.report(model).samples[0].images
    assert len(image.kept) == 12
    assert not image.notes
    counts = {"evs": 14, "dycoke": 18, "vidcom2": 12, "holitom": 12, "fastvid": 8, "frame_pool": 12, "frame_skip": 24}
    assert len(shown.kept) == counts[method]


@pytest.mark.parametrize("method", TEMPORAL)
def test_a_model_without_videos_is_left_as_it_is(method: str) -> None:
    inputs, model = prompt("llava-clip", [Row([3, 7], [(6, 6)], 1)]), make("llava-clip")
    with torch.no_grad():
        expected = model(**inputs).logits
        assert torch.equal(vtprune.wrap(model, method)(**inputs).logits, expected)
    report = vtprune.report(model)
    assert (report.achieved_keep, report.flops) == (1.0, report.flops_full)


def test_frames_may_be_pooled_and_then_skipped() -> None:
    inputs = prompt("qwen2.5-vl", [Row([2, 4], [(8, 2, 3)], 6)])
    model = vtprune.wrap(make("qwen2.5-vl"), "frame_pool:every=2+frame_skip:every=2")
    with torch.no_grad():
        model(**inputs)
    (shown,) = vtprune.report(model).samples[0].images
    assert shown.kept_per_part == [6, 0, 0, 0, 6, 0, 0, 0]
    assert {tuple(merge.members) for merge in shown.merged if merge.into < 6} >= {(0, 6), (5, 11)}


# Tokens that are left of a video of one, two and three frames of six.
LEFT = {
    "evs": (2, 4, 5),
    "evs:keep=1": (1, 1, 1),
    "dycoke": (6, 7, 8),
    "dycoke:variant=released": (6, 7, 6 + 1),
    "vidcom2": (2, 3, 4),
    "vidcom2:keep=1": (1, 1, 1),
    "vidcom2:variant=released": (2, 3, 4),
    "holitom": (2, 3, 4),
    "holitom:keep=1": (1, 1, 1),
    "holitom:variant=released": (2, 4, 6),
    "fastvid": (1, 2, 3),
    "fastvid:keep=1": (1, 2, 3),
    "fastvid:variant=released": (1, 2, 3),
    "frame_pool": (6, 6, 6),
    "frame_pool:keep=1": (6, 6, 6),
    "frame_skip": (6, 6, 12),
    "frame_skip:keep=1": (6, 6, 6),
}


@pytest.mark.parametrize("method", LEFT)
def test_videos_of_few_frames_are_taken(method: str) -> None:
    model, left = vtprune.wrap(make("qwen2.5-vl"), method), []
    for frames in (1, 2, 3):
        with torch.no_grad():
            model(**prompt("qwen2.5-vl", [Row([2, 4], [(frames, 2, 3)], 6)]))
        left.append(len(vtprune.report(model).samples[0].images[0].kept))
    assert tuple(left) == LEFT[method]


@pytest.mark.parametrize("method", LEFT)
def test_frames_of_one_token_are_taken(method: str) -> None:
    model = vtprune.wrap(make("qwen2.5-vl"), method)
    with torch.no_grad():
        model(**prompt("qwen2.5-vl", [Row([2, 4], [(3, 1, 1)], 6)]))
    # DyCoke leaves nothing of a frame whose 30% are no whole token; the released code also drops the third. That of
    # VidCom2 and HoliTom rounds in each frame, and FastVID takes something of each.
    counts = {"dycoke": 1, "dycoke:variant=released": 1, "frame_skip": 2}
    counts |= dict.fromkeys(("vidcom2:variant=released", "holitom:variant=released"), 3)
    counts |= dict.fromkeys([one for one in LEFT if one.startswith("fastvid")], 3)
    assert len(vtprune.report(model).samples[0].images[0].kept) == counts.get(method, 1)


def test_a_stage_that_had_nothing_to_do_left_what_the_one_before_it_left() -> None:
    model = vtprune.wrap(make("qwen2.5-vl"), "frame_skip+frame_pool:every=2")
    with torch.no_grad():
        model(**prompt("qwen2.5-vl", [Row([2, 3, 4, 2], [(4, 3), (5, 2, 4), (2, 3, 3)], 6)]))
    first, second = vtprune.report(model).stages
    # 12 of an image; 3 of 5 frames of 8, then 2; 1 of 2 frames of 9, with which nothing is left to do.
    assert first.tokens_left == pytest.approx((12 + 24 + 9) / 3)
    assert second.tokens_left == pytest.approx((12 + 16 + 9) / 3)


def test_a_method_for_images_may_keep_more_than_one_for_videos_before_it() -> None:
    model = vtprune.wrap(make("qwen2.5-vl"), "evs:keep=0.3+fopru:keep=0.5")
    with torch.no_grad():
        model(**prompt("qwen2.5-vl", [Row([2, 3, 4], [(4, 3), (5, 2, 4)], 6)]))
    assert [len(one.kept) for one in vtprune.report(model).samples[0].images] == [6, 12]
    with pytest.raises(VTPruneError, match="which leaves it nothing to do"):
        vtprune.wrap(make("qwen2.5-vl"), "fopru:keep=0.5,keep_video=0.2+holov:keep=0.4,keep_video=0.3")


@pytest.mark.parametrize("method", TEMPORAL)
def test_what_compares_frames_refuses_frames_with_holes(method: str) -> None:
    inputs = prompt("qwen2.5-vl", [Row([2, 4], [(8, 2, 3)], 6)])
    model = vtprune.wrap(make("qwen2.5-vl"), f"random:keep=40+{method}")
    with torch.no_grad(), pytest.raises(VTPruneError, match=f"{method} needs whole frames of 6 tokens"):
        model(**inputs)


@pytest.mark.parametrize("kind", ["qwen2.5-vl", "qwen3-vl"])
def test_a_pooled_token_stands_at_the_time_of_its_first_frame(kind: str) -> None:
    inputs = prompt(kind, [Row([2, 4], [(4, 2, 3)], 6)])
    model = vtprune.wrap(make(kind), "frame_pool:every=2")
    seen: list[Tensor] = []
    layer = model.model.language_model.layers[1]
    handle = layer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["position_embeddings"][0]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
        vtprune.unwrap(model)(**inputs)
    handle.remove()
    pruned, whole = seen
    ids = inputs["input_ids"][0]
    vision = (ids == 93).nonzero().flatten().view(4, 6)
    left = torch.ones(len(ids), dtype=torch.bool)
    left[vision[[1, 3]].flatten()] = False
    torch.testing.assert_close(pruned[0], whole[0, left])
