"""VidCom2: which frames get how much, and which tokens of theirs stay."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vtprune
from tests.streams import few, kept_by, video
from vtprune.errors import ScoreError
from vtprune.pruners.parts.frames import apportioned
from vtprune.pruners.vidcom2 import frame_weights, likeness, released_counts


def per_frame(kept: list[int]) -> list[int]:
    return np.bincount([token // 6 for token in kept], minlength=8).tolist()


def test_tokens_are_compared_over_the_channels_that_vary_least() -> None:
    features = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
    loud = features.clone()
    loud[..., [1, 3, 4, 7]] *= 100
    calm = torch.nn.functional.normalize(features[..., [0, 2, 5, 6]], dim=-1)
    to_video, to_frame = likeness(loud)
    for found, centre in ((to_video, calm.mean(dim=(0, 1))), (to_frame, calm.mean(dim=1, keepdim=True))):
        squares = (calm - centre).square().sum(dim=-1)
        expected = sum(torch.exp(-squares / (2 * width)) for width in (0.125, 0.25, 0.5, 1, 2))
        torch.testing.assert_close(found, expected)


def test_a_frame_of_its_own_keeps_twice_the_share_and_still_ones_share_alike() -> None:
    shown = video(budget=12, still=True)
    assert per_frame(kept_by(vtprune.VidCom2(), shown)) == [2, 2, 2, 2, 1, 1, 1, 1]
    features = shown.features.clone()
    features[5 * 6 : 6 * 6] = -features[5 * 6 : 6 * 6]
    other = replace(shown, features=features)
    # The other frames have 1 - 1/8 of the share each.
    assert per_frame(kept_by(vtprune.VidCom2(), replace(other, budget=24))) == [3, 3, 3, 3, 3, 5, 2, 2]
    assert per_frame(kept_by(vtprune.VidCom2(variant="released"), other)) == [1, 1, 1, 1, 1, 3, 1, 1]


def test_what_is_least_like_video_and_frame_stays() -> None:
    shown = video(budget=12)
    to_video, to_frame = likeness(shown.features.unflatten(0, (8, 6)))
    counts = per_frame(kept_by(vtprune.VidCom2(), shown))
    expected = [
        frame * 6 + place
        for frame, count in enumerate(counts)
        for place in (to_video + to_frame)[frame].topk(count, largest=False).indices.sort().values.tolist()
    ]
    assert kept_by(vtprune.VidCom2(), shown) == expected


@few
@given(
    weights=st.lists(st.floats(0.01, 2), min_size=1, max_size=12), most=st.integers(1, 30), least=st.integers(0, 1),
    share=st.floats(0, 1),
)  # fmt: skip
def test_numbers_are_shared_out_to_the_last_within_their_bounds(
    weights: list[float], most: int, least: int, share: float
) -> None:
    size = len(weights)
    total = least * size + round(share * (most - least) * size)
    counts = apportioned(weights, total, most=[most] * size, least=least)
    assert sum(counts) == total
    assert all(least <= count <= most for count in counts)
    # Of two that no bound holds, the one with the greater weight has at most a rounding less.
    for one, count in zip(weights, counts, strict=True):
        for other, theirs in zip(weights, counts, strict=True):
            assert one < other or count >= theirs - 1


def test_shares_that_fit_are_shared_out_as_they_are() -> None:
    assert apportioned([1, 2, 1], 8, most=[6, 6, 6]) == [2, 4, 2]
    assert apportioned([1, 10, 1], 8, most=[6, 6, 6]) == [1, 6, 1]
    assert apportioned([1, 1, 1], 4, most=[6, 6, 6]) == [2, 1, 1]
    assert apportioned([1, 100, 1], 6, most=[6, 6, 6], least=1) == [1, 4, 1]


def test_the_released_code_rounds_each_frame_half_to_even_and_leaves_it_one_token() -> None:
    assert released_counts(np.float32([0.25, 0.75, 0.05, 3.0]), 6) == [2, 4, 1, 6]
    assert vtprune.VidCom2(variant="released").input_budget(48) is None
    assert vtprune.VidCom2(variant="released", keep=1.0).input_budget(48) == 48


def test_weights_of_frames_average_to_one() -> None:
    found = frame_weights(torch.rand(7, 5, generator=torch.Generator().manual_seed(1)))
    assert float(found.mean()) == pytest.approx(1)
    assert found.max() < 2


def test_features_that_are_no_numbers_are_refused() -> None:
    shown = video()
    # One channel's; half of the others would have been left to compare.
    shown.features[13, 2] = torch.nan
    with pytest.raises(ScoreError, match="vidcom2"):
        vtprune.VidCom2(keep=20).select(shown)
