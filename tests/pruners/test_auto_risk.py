"""auto: the theorems, at their edges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import binom

from vtprune.errors import InputError, VTPruneError
from vtprune.pruners.auto.risk import (
    check_level,
    conformal,
    crc_bound,
    learn_then_test,
    ltt_bound,
    mean_by,
    monotone,
    needed,
    p_value,
)


def losses(*columns: int, of: int) -> np.ndarray:
    """(of, m) of which a column's first so many samples are lost, and nothing under the whole model."""
    return np.array([[float(row < count) for count in columns] + [0.0] for row in range(of)])


tables = st.integers(1, 12).flatmap(
    lambda n: st.integers(1, 5).flatmap(
        lambda m: arrays(np.float64, (n, m), elements=st.sampled_from([0.0, 0.5, 1.0]))
    )
)


@given(tables)
def test_monotone_losses_lie_above_the_losses_and_never_rise(values: np.ndarray) -> None:
    found = monotone(values)
    assert (found >= values).all()
    assert (np.diff(found, axis=1) <= 0).all()
    # No lower ones do: each is a loss of a setting at least as careful.
    assert all((row[at] == own[at:].max()) for row, own in zip(found, values, strict=True) for at in range(len(own)))


def test_a_lower_envelope_would_promise_what_does_not_hold() -> None:
    # Half of the pictures are lost by the careful setting and not by the bold one.
    values = np.array([[float(row % 2 == 0), float(row % 2 == 1), 0.0] for row in range(100)])
    below = np.minimum.accumulate(values, axis=1)
    assert conformal(below, 0.1) == 1, "which loses half of them"
    assert conformal(monotone(values), 0.1) == 2


def test_losses_that_rise_are_refused() -> None:
    with pytest.raises(VTPruneError, match="never rise"):
        conformal(np.array([[0.0, 1.0, 0.0]]), 0.5)


@pytest.mark.parametrize(
    ("count", "level", "allowed"),
    [(100, 0.05, 4), (100, 0.1, 9), (500, 0.02, 9), (500, 0.05, 24), (1000, 0.01, 9), (1000, 0.05, 49)],
)
def test_conformal_risk_control_allows_the_known_numbers_of_losses(count: int, level: float, allowed: int) -> None:
    assert conformal(losses(allowed, of=count), level) == 0
    assert conformal(losses(allowed + 1, of=count), level) == 1


def test_it_is_split_conformal_prediction_of_the_first_setting_from_which_all_agree() -> None:
    rng = np.random.default_rng(0)
    first = rng.integers(0, 8, 99)
    values = (np.arange(8)[None] < first[:, None]).astype(float)
    for level in (0.05, 0.1, 0.3):
        rank = int(np.ceil((1 - level) * 100))
        assert conformal(values, level) == np.sort(first)[rank - 1]


def test_where_nothing_is_feasible_the_whole_model_answers() -> None:
    assert conformal(losses(60, 50, of=100), 0.05) == 2
    assert learn_then_test(losses(60, 50, of=100), 0.05, 0.05) == 2


def test_a_bound_that_equals_the_level_is_met() -> None:
    assert crc_bound(losses(4, of=99))[0] == 0.05
    assert conformal(losses(4, of=99), 0.05) == 0


def test_a_dip_behind_a_failure_is_not_taken_by_fixed_sequence_testing() -> None:
    # From the careful end: fine, not fine, fine.
    assert learn_then_test(losses(0, 90, 0, of=100), 0.05, 0.05) == 2


@pytest.mark.parametrize(
    ("count", "level", "allowed"), [(59, 0.05, 0), (100, 0.05, 1), (500, 0.05, 16), (1000, 0.05, 38), (1000, 0.1, 84)]
)
def test_learn_then_test_allows_the_known_numbers_of_losses(count: int, level: float, allowed: int) -> None:
    assert learn_then_test(losses(allowed, of=count), level, 0.05) == 0
    assert learn_then_test(losses(allowed + 1, of=count), level, 0.05) == 1


def test_p_values_of_counts_are_exact_and_of_other_losses_valid() -> None:
    assert p_value(losses(3, of=50)[:, 0], 0.1) == pytest.approx(binom.cdf(3, 50, 0.1))
    rng = np.random.default_rng(1)
    # Losses of 0, a half or 1 whose expectation is the level: no p-value may be small more often than it says.
    drawn = rng.choice([0.0, 0.5, 1.0], size=(2000, 60), p=[0.85, 0.1, 0.05])
    found = np.array([p_value(row, 0.1) for row in drawn])
    assert (found <= 0.1).mean() <= 0.1


def test_promises_hold_over_many_calibrations() -> None:
    """Each setting's true risk is known; the chosen one's is below the level as each theorem says."""
    rng, risks = np.random.default_rng(2), np.array([0.3, 0.2, 0.12, 0.08, 0.04, 0.0])
    in_expectation, broken = [], 0
    for _ in range(400):
        values = (rng.random((200, 1)) < risks[None]).astype(float)
        in_expectation.append(risks[conformal(monotone(values), 0.1)])
        broken += int(risks[learn_then_test(values, 0.1, 0.1)] > 0.1)
    assert np.mean(in_expectation) <= 0.1
    assert broken / 400 <= 0.1


def test_the_bound_is_the_level_at_which_the_test_would_just_have_passed() -> None:
    values = losses(16, of=500)[:, 0]
    bound = ltt_bound(values, 0.05)
    assert p_value(values, bound) == pytest.approx(0.05, abs=1e-6)
    assert 16 / 500 < bound < 0.05


@pytest.mark.parametrize(
    ("level", "delta", "count"),
    [(0.05, None, 19), (0.01, None, 99), (0.02, None, 49), (0.05, 0.05, 59), (0.02, 0.05, 149)],
)
def test_too_few_samples_are_refused_with_the_number_that_is_needed(
    level: float, delta: float | None, count: int
) -> None:
    assert needed(level, delta) == count
    check_level(level, delta, count)
    with pytest.raises(InputError, match=f"at least {count}$"):
        check_level(level, delta, count - 1)

    # So many are enough where nothing is lost, and one fewer is not.
    def choose(n: int) -> int:
        return conformal(losses(0, of=n), level) if delta is None else learn_then_test(losses(0, of=n), level, delta)

    assert (choose(count), choose(count - 1)) == (0, 1)


def test_questions_about_one_picture_are_one_draw() -> None:
    found = mean_by(np.array([7, 3, 7, 7]), np.array([[1.0], [0.0], [0.0], [1.0]]))
    assert found.flatten().tolist() == [0.0, pytest.approx(2 / 3)]


@pytest.mark.parametrize("wrong", [np.zeros((0, 2)), np.zeros(3), np.array([[2.0, 0.0]]), np.array([[np.nan, 0.0]])])
def test_losses_of_another_shape_or_range_are_refused(wrong: np.ndarray) -> None:
    with pytest.raises(VTPruneError, match="in \\[0, 1\\]"):
        conformal(wrong, 0.1)


def test_the_whole_model_is_the_reference() -> None:
    with pytest.raises(VTPruneError, match="loses nothing"):
        learn_then_test(np.array([[0.0, 1.0]]), 0.1, 0.1)
