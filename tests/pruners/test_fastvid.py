"""FastVID: segments, what is kept by attention, and anchors into which the others of a segment flow."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import vtprune
from tests.streams import stream
from vtprune.errors import ScoreError, VTPruneError
from vtprune.method.views import VisionStream
from vtprune.pruners.fastvid import anchor_frames, cut_segments
from vtprune.pruners.parts.density_peaks import peaks, spread


def clip(budget: int, *, seed: int = 0) -> VisionStream:
    """Eight frames of 2 x 5 tokens, with the signals of a tower without CLS."""
    return replace(stream((8, 2, 5), budget, seed=seed, prefix=0), kind="video")


def test_segments_end_where_frames_differ_most_and_wherever_they_differ_enough() -> None:
    similar = [0.99, 0.95, 0.2, 0.97, 0.8]
    assert cut_segments(similar, 1, 0.9) == [range(3), range(3, 5), range(5, 6)]
    assert cut_segments(similar, 4, 0.9) == [range(2), range(2, 3), range(3, 5), range(5, 6)]
    assert cut_segments(similar, 2, -1) == [range(3), range(3, 6)]
    assert cut_segments([1.0, 1.0], 2, 0.9) == [range(1), range(1, 3)]
    assert cut_segments([1.0], 8, 0.9) == [range(1), range(1, 2)]
    assert cut_segments([], 8, 0.9) == [range(1)]


def test_anchors_stand_in_the_first_frame_and_as_released_in_the_last() -> None:
    assert anchor_frames(range(3, 9), 4, released=False) == [3, 7]
    assert anchor_frames(range(3, 9), 4, released=True) == [4, 8]
    assert anchor_frames(range(3, 4), 4, released=True) == [3]


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize(("segments", "every"), [(1, 3), (3, 2), (8, 4)])
def test_every_token_that_is_not_kept_flows_into_an_anchor_of_each_anchor_frame(
    segments: int, every: int, variant: str
) -> None:
    shown = clip(40)
    # Five tokens a frame: three by attention, two for anchors.
    pruner = vtprune.FastVID(keep=40, segments=segments, tau=-1.0, every=every, variant=variant)
    selection = pruner.select(shown)
    frames = shown.features.unflatten(0, (8, 10))
    assert shown.signals is not None
    attention = shown.signals.received_attention().unflatten(0, (8, 10))
    best = attention.topk(3, dim=1).indices.sort(dim=1).values
    means = frames.mean(dim=1)
    similar = torch.nn.functional.cosine_similarity(means[1:], means[:-1], dim=-1)
    expected = {frame * 10 + place: frames[frame, place] for frame in range(8) for place in best[frame].tolist()}
    others = [[place for place in range(10) if place not in best[frame].tolist()] for frame in range(8)]
    for segment in cut_segments(similar.tolist(), segments, -1.0):
        members = [frame * 10 + place for frame in segment for place in others[frame]]
        anchored = anchor_frames(segment, every, released=variant == "released")
        for frame in anchored:
            count = min(7, 2 * len(segment) // len(anchored))
            left = frames[frame, others[frame]]
            centres = peaks(spread(left), 4).topk(count).indices.sort().values
            anchors = [frame * 10 + others[frame][place] for place in centres.tolist()]
            unit = torch.nn.functional.normalize(shown.features, dim=-1)
            into = (unit[members] @ unit[anchors].T).argmax(dim=1).tolist()
            for slot, anchor in enumerate(anchors):
                flows = [member for member, own in zip(members, into, strict=True) if own == slot]
                share = max(0.6, 1 / (len(flows) + 1))
                expected[anchor] = share * shown.features[anchor] + (1 - share) * shown.features[flows].mean(dim=0)
    assert selection.kept.tolist() == sorted(expected)
    torch.testing.assert_close(selection.vectors, torch.stack([expected[token] for token in sorted(expected)]))
    merges = selection.merged()
    assert [merge.into for merge in merges] == sorted(merge.into for merge in merges)
    for merge in merges:
        mixed = (shown.features[list(merge.members)] * torch.tensor(merge.weights)[:, None]).sum(dim=0)
        torch.testing.assert_close(mixed, expected[merge.into])


def test_without_anchors_attention_alone_decides() -> None:
    shown = clip(24)
    assert shown.signals is not None
    best = shown.signals.received_attention().unflatten(0, (8, 10)).topk(3, dim=1).indices.sort(dim=1).values
    selection = vtprune.FastVID(keep=24, contextual=0.0).select(shown)
    assert selection.kept.unflatten(0, (8, 3)).tolist() == (best + 10 * torch.arange(8)[:, None]).tolist()
    assert torch.equal(selection.vectors, shown.features[selection.kept])


def test_one_token_of_each_frame_is_the_least_that_stays() -> None:
    selection = vtprune.FastVID(keep=5).select(clip(5))
    assert (selection.kept // 10).tolist() == list(range(8))
    assert selection.note == "one token of each frame is the least that stays: 8 tokens, of a budget of 5"


def test_what_means_nothing_is_refused() -> None:
    shown = clip(40)
    shown.features[13] = torch.nan
    with pytest.raises(ScoreError, match="fastvid"):
        vtprune.FastVID(keep=40).select(shown)
    with pytest.raises(VTPruneError, match="contextual is a number from 0 to 1"):
        vtprune.FastVID(contextual=1.5)
    with pytest.raises(VTPruneError, match="every is an int of at least 1, got 0"):
        vtprune.FastVID(every=0)
