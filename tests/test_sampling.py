"""The fast tests' sample of the matrix."""

from __future__ import annotations

from collections.abc import Hashable
from itertools import combinations, product

from tests.sampling import Case, sample

AXES = {"pruner": range(12), "kind": "abcd", "attention": ("sdpa", "eager"), "padding": ("left", "right")}


def _cases(test: str, *axes: str) -> list[Case]:
    return [(test, dict(zip(axes, values, strict=True))) for values in product(*(AXES[axis] for axis in axes))]


def _pairs(cases: list[Case]) -> set[tuple[tuple[str, object], ...]]:
    return {pair for _, axes in cases for pair in combinations(sorted(axes.items()), 2)}


def _kind(value: Hashable) -> Hashable:
    """Twelve pruners are of three kinds."""
    return value % 3 if isinstance(value, int) else value


def _kinds(cases: list[Case]) -> set[tuple[tuple[str, object], ...]]:
    return _pairs([(test, {axis: _kind(value) for axis, value in axes.items()}) for test, axes in cases])


def test_every_pair_is_met_and_every_test_keeps_every_value() -> None:
    cases = [
        *_cases("whole", *AXES),
        *(c for test in ("a", "b", "c", "d", "e") for c in _cases(test, "pruner", "kind")),
    ]
    kept = [cases[place] for place in sample(cases)]
    assert _pairs(kept) == _pairs(cases)
    for test in ("whole", "a", "b", "c", "d", "e"):
        for axis, values in AXES.items():
            seen = {axes[axis] for name, axes in kept if name == test and axis in axes}
            assert not seen or seen == set(values)
    assert len(kept) < 0.4 * len(cases)


def test_a_test_of_two_axes_alone_in_its_group_runs_whole() -> None:
    cases = _cases("one", "pruner", "kind")
    assert sample(cases) == set(range(len(cases)))


def test_the_sample_is_the_same_each_time() -> None:
    cases = _cases("whole", *AXES)
    assert sample(cases) == sample(list(cases))


def test_kinds_meet_in_pairs_and_every_value_is_kept() -> None:
    cases = _cases("whole", *AXES)
    kept = [cases[place] for place in sample(cases, kind=_kind)]
    assert _kinds(kept) == _kinds(cases)
    assert {axes["pruner"] for _, axes in kept} == set(AXES["pruner"])
    assert len(kept) < len(sample(cases)) / 2


def test_a_lean_test_keeps_every_kind() -> None:
    cases = _cases("dear", "pruner", "kind")
    kept = [cases[place] for place in sample(cases, {"dear"}, kind=_kind)]
    assert {_kind(axes["pruner"]) for _, axes in kept} == {0, 1, 2}
    assert len(kept) == len(AXES["kind"])


def test_a_lean_test_keeps_every_value_and_leaves_pairs_to_others() -> None:
    cases = [*_cases("dear", *AXES), *_cases("whole", "pruner", "kind")]
    kept = [cases[place] for place in sample(cases, {"dear"})]
    assert len([name for name, _ in kept if name == "dear"]) == len(AXES["pruner"])
    assert {pair for pair in _pairs(kept) if {axis for axis, _ in pair} == {"pruner", "kind"}} == {
        pair for pair in _pairs(cases) if {axis for axis, _ in pair} == {"pruner", "kind"}
    }
