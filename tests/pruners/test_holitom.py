"""HoliTom: the windows of a video, what stands still and what moves, and what folds inside the decoder."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import vtprune
from tests.models import Row, make, prompt
from tests.streams import stream, video
from vtprune.errors import ScoreError, VTPruneError
from vtprune.method.views import VisionStream
from vtprune.pruners.holitom.clusters import gather_still
from vtprune.pruners.holitom.folding import fold
from vtprune.pruners.holitom.holitom import Cut
from vtprune.pruners.holitom.windows import cut_windows, still_places
from vtprune.pruners.parts.density_peaks import peaks, spread


def saved(still: np.ndarray, windows: list[range]) -> int:
    """Tokens that windows save, a window at a time."""
    return sum(still[one.start : one.stop - 1].all(axis=0).sum() * (len(one) - 1) for one in windows if len(one) > 1)


@pytest.mark.parametrize("seed", range(6))
def test_no_other_windows_save_more(seed: int) -> None:
    still = np.random.default_rng(seed).random((7, 5)) < 0.6
    windows = cut_windows(still)
    assert [frame for window in windows for frame in window] == list(range(8))
    best = 0
    for count in range(8):
        for ends in itertools.combinations(range(1, 8), count):
            edges = [0, *ends, 8]
            best = max(best, saved(still, [range(*pair) for pair in itertools.pairwise(edges)]))
    assert saved(still, windows) == best


def test_windows_are_no_longer_than_they_have_to_be() -> None:
    assert cut_windows(np.zeros((3, 4), dtype=bool)) == [range(1), range(1, 2), range(2, 3), range(3, 4)]
    assert cut_windows(np.ones((3, 4), dtype=bool)) == [range(4)]
    assert cut_windows(np.zeros((0, 4), dtype=bool)) == [range(1)]
    # One place goes on standing still, at which all others begin to move.
    still = np.array([[True, True, True], [True, False, False]])
    assert cut_windows(still) == [range(2), range(2, 3)]
    assert still_places(still, cut_windows(still)).tolist() == [[True] * 3, [False] * 3]


def test_still_and_moving_places_stay_in_one_proportion_and_meet_the_budget() -> None:
    cut = Cut.of(np.array([[True, True, False, False]] * 3), 4)
    assert cut.sizes == [2, 2, 2, 2, 2]
    assert cut.shared(5) == [1, 1, 1, 1, 1]
    assert cut.shared(7) == [2, 2, 1, 1, 1]
    assert cut.shared(99) == cut.released(99) == cut.sizes
    assert cut.released(5) == [1, 1, 1, 1, 1]
    assert cut.released(4.5) == [1, 1, 1, 1, 1]
    assert Cut.of(np.ones((3, 1), dtype=bool), 1).released(0.3) == [1, 0, 0, 0, 0]


@pytest.mark.parametrize("seed", range(4))
def test_still_places_gather_around_the_peaks_of_their_density(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randn(6, 14, 5, generator=generator)
    windows, counts = [range(2), range(3, 6)], [4, 2]
    still = torch.rand(2, 14, generator=generator) < 0.7
    clusters = gather_still(frames, windows, still, counts, beta=0.6)
    tokens, expected = [], []
    for window, valid, count in zip(windows, still, counts, strict=True):
        places = valid.nonzero().flatten()
        means = frames[window.start : window.stop].mean(dim=0)[places]
        scores = peaks(spread(means), 7)
        centres = scores.topk(count).indices.sort().values
        owner = torch.cdist(means, means[centres]).argmin(dim=1)
        for slot, centre in enumerate(centres.tolist()):
            others = [place for place in range(len(places)) if owner[place] == slot and place != centre]
            vector = 0.6 * means[centre] + 0.4 * means[others].mean(dim=0) if others else means[centre]
            tokens.append(window.start * 14 + int(places[centre]))
            expected.append(vector)
    assert clusters.tokens.tolist() == tokens
    torch.testing.assert_close(clusters.mixed(frames.flatten(0, 1)), torch.stack(expected))
    merges = clusters.merges()
    assert [merge.into for merge in merges] == tokens
    for merge, vector in zip(merges, expected, strict=True):
        members = frames.flatten(0, 1)[list(merge.members)]
        torch.testing.assert_close((members * torch.tensor(merge.weights)[:, None]).sum(dim=0), vector)


def test_equal_places_are_told_apart_by_where_they_are() -> None:
    clusters = gather_still(torch.ones(2, 9, 3), [range(2)], torch.ones(1, 9, dtype=torch.bool), [3], beta=0.6)
    assert clusters.tokens.tolist() == [0, 1, 2]
    # Where only some stand still, no other is taken for one of them.
    still = torch.tensor([[False, False, True, False, True, True]])
    assert gather_still(torch.ones(2, 6, 3), [range(2)], still, [3], beta=0.6).tokens.tolist() == [2, 4, 5]


def shown(frames: int = 8, budget: int = 20) -> VisionStream:
    """A video of which the first four places stand still, with signals."""
    whole = replace(video(frames, budget=budget), signals=stream((frames, 2, 3), budget, prefix=0).signals)
    features = whole.features.unflatten(0, (frames, 6)).clone()
    features[:, :4] = features[:1, :4]
    return replace(whole, features=features.flatten(0, 1))


def attention(of: VisionStream) -> Tensor:
    assert of.signals is not None
    return of.signals.received_attention().unflatten(0, (-1, 6))


def test_what_moves_stays_where_it_is_attended_to() -> None:
    whole = shown()
    # 4 still places and 2 moving ones in each of 8 frames: 20 tokens in all.
    everything = vtprune.HoliTom(keep=20).select(whole)
    moving = [frame * 6 + place for frame in range(8) for place in (4, 5)]
    assert everything.kept.tolist() == [0, 1, 2, 3, *moving]
    torch.testing.assert_close(everything.vectors, whole.features[everything.kept])
    half = vtprune.HoliTom(keep=10).select(replace(whole, budget=10))
    best = attention(whole)[:, 4:].argmax(dim=1) + 4
    assert half.kept[2:].tolist() == [frame * 6 + int(place) for frame, place in enumerate(best)]
    assert half.kept[:2].max() < 4


@pytest.mark.parametrize("keep", [24, 100, 1.0])
def test_a_video_within_its_budget_stays_whole(keep: int | float) -> None:
    assert vtprune.HoliTom(keep=keep, tau=-1.0).input_budget(24) == 24
    assert vtprune.HoliTom(keep=23, tau=-1.0).input_budget(24) is None


def test_features_that_are_no_numbers_are_refused() -> None:
    whole = shown()
    whole.features[13] = torch.nan
    with pytest.raises(ScoreError, match="holitom"):
        vtprune.HoliTom(keep=20).select(whole)


def test_what_folds_goes_half_and_half_into_the_most_similar_one_in_order() -> None:
    states = torch.tensor([[1.0, 0.0], [0.0, 4.0], [2.0, 0.2], [0.1, 3.0], [4.0, 0.1], [0.0, 2.0]])
    selection = fold(states, torch.tensor([0.9, 0.8, 0.1, 0.1, 0.1, 0.1]), 2)
    assert selection.kept.tolist() == [0, 1]
    expected = [((states[0] + states[2]) / 2 + states[4]) / 2, ((states[1] + states[3]) / 2 + states[5]) / 2]
    torch.testing.assert_close(selection.vectors, torch.stack(expected))
    first, second = selection.merged()
    assert (first.into, first.members, first.weights) == (0, (0, 2, 4), (0.25, 0.25, 0.5))
    assert (second.into, second.members, second.weights) == (1, (1, 3, 5), (0.25, 0.25, 0.5))


def test_inside_the_decoder_videos_fold_and_images_do_not() -> None:
    inputs = prompt("qwen2.5-vl", [Row([2, 3, 4], [(4, 3), (8, 2, 3)], 6)])
    model = vtprune.wrap(make("qwen2.5-vl"), "holitom:keep=0.5,inner=0.5,layer=2")
    with torch.no_grad():
        model(**inputs)
    image, clip = vtprune.report(model).samples[0].images
    assert {len(kept) for kept in image.kept_per_layer} == {12}
    assert [len(kept) for kept in clip.kept_per_layer][:3] == [24, 24, 12]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 2}, "tau is a number from -1 to 1, got 2"),
        ({"beta": -0.1}, "beta is a number from 0 to 1, got -0.1"),
        ({"inner": 1}, "inner is a number between 0 and 1, got 1"),
        ({"layer": 3}, "layer belongs to inner; set inner=0.5 too"),
        ({"inner": 0.5, "layer": 0}, "layer is an int of at least 1, got 0"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(VTPruneError, match=message):
        vtprune.HoliTom(**options)


def test_a_layer_that_the_decoder_does_not_have_is_refused() -> None:
    with pytest.raises(VTPruneError, match="holitom: inner merges before one of the layers 1 to"):
        vtprune.wrap(make("qwen2.5-vl"), "holitom:inner=0.5,layer=30")


def test_select_runs_what_it_does_before_the_decoder_and_refuses_what_is_inside() -> None:
    whole = shown()
    found = vtprune.select(whole.features, "holitom", keep=20, grid=whole.grid, signals=whole.signals)
    expected = vtprune.HoliTom(keep=20).select(whole)
    assert torch.equal(found.kept, expected.kept)
    with pytest.raises(VTPruneError, match="holitom acts inside the decoder"):
        vtprune.select(whole.features, "holitom", keep=20, inner=0.5, grid=whole.grid, signals=whole.signals)
