"""Comparisons of two settings on the same questions: by hand, and against every way of flipping signs."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from vtprune.errors import InputError
from vtprune.evals.paired import Share, difference, holm, mcnemar, mean_share, share_kept


def brute_force(ours: list[float], theirs: list[float]) -> float:
    """The share of all 2**n sign flips whose sum is as far from 0 as the one that was seen."""
    gaps = np.array(ours) - np.array(theirs)
    sums = [abs(float(np.dot(signs, gaps))) for signs in itertools.product((1, -1), repeat=len(gaps))]
    return float(np.mean([one >= abs(gaps.sum()) - 1e-12 for one in sums]))


def test_a_difference_is_that_of_the_means_with_the_error_of_the_pairs() -> None:
    found = difference([1, 1, 1, 0], [1, 0, 0, 0])
    assert found.mean == 0.5
    # Differences 0, 1, 1, 0: variance 1/3, over 4 questions.
    assert found.stderr == pytest.approx(math.sqrt(1 / 3 / 4))
    assert (found.wins, found.losses) == (2, 0)
    assert found.p == 0.5


def test_right_and_wrong_is_judged_by_the_questions_on_which_the_two_differ() -> None:
    # 7 wins, 1 loss: both tails hold 1 + 8 of 256 ways each.
    assert mcnemar(7, 1) == pytest.approx(2 * 9 / 256)
    ours, theirs = [1] * 7 + [0] + [1] * 50, [0] * 7 + [1] + [1] * 50
    assert difference(ours, theirs).p == pytest.approx(2 * 9 / 256)


def test_the_exact_test_is_every_way_of_flipping_signs() -> None:
    rng = np.random.default_rng(1)
    ours, theirs = rng.integers(0, 2, 12).tolist(), rng.integers(0, 2, 12).tolist()
    assert difference(ours, theirs).p == pytest.approx(brute_force(ours, theirs))


def test_fractions_are_judged_by_every_way_of_flipping_signs() -> None:
    rng = np.random.default_rng(2)
    ours, theirs = (rng.random(10) + 0.2).tolist(), rng.random(10).tolist()
    assert difference(ours, theirs).p == pytest.approx(brute_force(ours, theirs))


def test_many_fractions_are_judged_by_a_draw_that_is_always_the_same() -> None:
    rng = np.random.default_rng(3)
    ours, theirs = (rng.random(200) + 0.05).tolist(), rng.random(200).tolist()
    found = difference(ours, theirs)
    assert found == difference(ours, theirs)
    assert found.stderr is not None
    normal = math.erfc(abs(found.mean) / found.stderr / math.sqrt(2))
    assert found.p == pytest.approx(normal, abs=0.02)


def test_the_pairing_is_told_from_two_separate_samples() -> None:
    same = [0.1, 0.9, 0.4, 0.7, 0.2]
    found = difference([value + 0.05 for value in same], same)
    assert found.stderr == pytest.approx(0, abs=1e-9)


def test_equal_scores_are_no_difference() -> None:
    for scores in ([1, 0, 1], [0.5, 0.25, 0.0]):
        found = difference(scores, scores)
        assert (found.mean, found.p, found.wins, found.losses) == (0, 1, 0, 0)


def test_a_share_has_the_delta_methods_error() -> None:
    found = share_kept([1, 0, 1, 0], [1, 1, 1, 0])
    assert found is not None
    assert found.value == pytest.approx(2 / 3)
    # What is left over is 1/3, -2/3, 1/3, 0: its squares sum to 2/3, over 3 and 4, and the mean below is 3/4.
    assert found.stderr == pytest.approx(math.sqrt(2 / 3 / 3 / 4) / 0.75)


def test_a_shares_error_is_that_of_drawing_the_questions_anew() -> None:
    rng = np.random.default_rng(4)
    unpruned = (rng.random(800) < 0.8).astype(float)
    ours = np.where(rng.random(800) < 0.9, unpruned, 1 - unpruned)
    found = share_kept(ours.tolist(), unpruned.tolist())
    draws = rng.integers(0, 800, (2000, 800))
    ratios = ours[draws].mean(axis=1) / unpruned[draws].mean(axis=1)
    assert found is not None
    assert found.stderr == pytest.approx(float(ratios.std()), rel=0.08)


def test_a_share_of_the_unpruned_model_itself_is_all_of_it_for_certain() -> None:
    assert share_kept([1, 0, 1], [1, 0, 1]) == Share(1.0, 0.0)


def test_nothing_is_a_share_of_nothing() -> None:
    assert share_kept([1, 0], [0, 0]) is None


def test_the_mean_of_tasks_has_the_error_of_independent_ones() -> None:
    found = mean_share([Share(0.9, 0.03), Share(0.8, 0.04)])
    assert found.value == pytest.approx(0.85)
    assert found.stderr == pytest.approx(0.025)
    assert mean_share([Share(0.9, 0.03), Share(0.8, None)]).stderr is None
    with pytest.raises(InputError, match="at least one"):
        mean_share([])


def test_holm_multiplies_the_smallest_by_all_and_never_falls_below_the_one_before() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []


@pytest.mark.parametrize(("ours", "theirs"), [([], []), ([1], [1, 0]), ([math.nan], [0.0])])
def test_scores_of_other_questions_are_refused(ours: list[float], theirs: list[float]) -> None:
    with pytest.raises(InputError, match="scores: need"):
        difference(ours, theirs)
    with pytest.raises(InputError, match="scores: need"):
        share_kept(ours, theirs)


def test_one_question_has_no_error() -> None:
    assert difference([1], [0]).stderr is None
    assert share_kept([1], [1]) == Share(1.0, None)
