"""What images of a batch have to know on the host is read back together, and functions that ask answer like others."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vtprune.errors import ScoreError
from vtprune.evals.speed.launches import counting
from vtprune.method import asking as module
from vtprune.method.asking import Asking, asking, read_back, started, together
from vtprune.method.checks import Checks, answered, check_scores


class Chooser:
    """Chooses by two questions, the second of which depends on the first."""

    def __init__(self, least: int) -> None:
        self.least = least

    @asking
    def choose(self, scores: Tensor) -> Asking[list[int]]:
        """The scores above `least`, doubled."""
        above = yield scores > self.least
        if not above.any():
            return []
        chosen = scores[torch.from_numpy(above.nonzero()[0])]
        doubled = yield 2 * chosen
        return [int(value) for value in doubled]

    def plain(self, scores: Tensor) -> int:
        """Asks nothing."""
        return int(scores.numel())


def test_called_alone_it_answers_like_any_function() -> None:
    assert Chooser(1).choose(torch.tensor([1, 2, 3])) == [4, 6]
    assert Chooser.choose.__doc__ == "The scores above `least`, doubled."


def test_calls_go_on_side_by_side_and_wait_together() -> None:
    chooser = Chooser(1)
    calls = [torch.tensor([1, 2, 3]), torch.tensor([0, 1]), torch.tensor([5.0, 0.5]), torch.tensor([9])]
    with counting() as counts:
        found = together([started(chooser.choose, scores) for scores in calls])
    assert found == [[4, 6], [], [10], [18]]
    assert counts.read == 2


def test_functions_that_ask_nothing_wait_for_nothing() -> None:
    with counting() as counts:
        assert together([started(Chooser(0).plain, torch.ones(n)) for n in (2, 3)]) == [2, 3]
        assert together([]) == []
    assert counts.read == 0


def test_one_function_may_ask_through_another() -> None:
    @asking
    def outer(scores: Tensor) -> Asking[int]:
        found = yield from started(Chooser(0).choose, scores)
        return sum(found)

    assert together([started(outer, torch.tensor([n, 1])) for n in (1, 2)]) == [4, 6]


def test_an_error_ends_all_of_them() -> None:
    @asking
    def fails(scores: Tensor) -> Asking[int]:
        yield scores
        raise ScoreError("no number")

    with pytest.raises(ScoreError, match="no number"):
        together([started(fails, torch.ones(1)), started(fails, torch.ones(2))])


@pytest.mark.parametrize("most", [1, 64, 2**26])
def test_values_come_back_as_they_were(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", most)
    generator = torch.Generator().manual_seed(0)
    tensors: list[Any] = [
        torch.rand(3, 5, generator=generator) > 0.5, torch.rand(7, generator=generator), torch.tensor(3),
        torch.rand(4, 3, generator=generator).T, torch.empty(0), torch.tensor([True]),
        torch.randint(9, (2, 1, 3), generator=generator), torch.rand(2, generator=generator, requires_grad=True),
    ]  # fmt: skip
    for tensor, found in zip(tensors, read_back(tensors), strict=True):
        assert found.shape == tuple(tensor.shape)
        assert torch.equal(torch.from_numpy(np.asarray(found)), tensor.detach())


def test_another_default_device_changes_nothing() -> None:
    with torch.device("meta"):
        found = read_back([torch.ones(2, device="cpu"), torch.tensor([True], device="cpu")])
    assert [part.tolist() for part in found] == [[1.0, 1.0], [True]]


def test_what_wraps_a_function_that_asks_is_called() -> None:
    class Louder(Chooser):
        @functools.wraps(Chooser.choose)
        def choose(self, scores: Tensor) -> list[int]:
            return [*super().choose(scores), -1]

    scores = torch.tensor([1, 2])
    assert together([started(Louder(1).choose, scores), started(Chooser(1).choose, scores)]) == [[4, -1], [4]]


def test_few_large_tensors_are_not_copied_to_travel_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 40)
    with counting() as counts:
        read_back([torch.ones(5), torch.ones(5), torch.ones(20), torch.ones(2)])
    assert counts.read == 3


def test_an_error_that_comes_of_such_scores_gives_way_to_the_check() -> None:
    checks = Checks()

    def fails(scores: Tensor) -> None:
        with checks.collecting():
            check_scores(scores, "method")
            raise ValueError("a consequence")

    with pytest.raises(ScoreError, match="method: 1 of 1 token scores"):
        fails(torch.tensor([float("nan")]))
    with pytest.raises(ValueError, match="a consequence"):
        fails(torch.ones(1))


def test_many_scores_are_not_held_for_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtprune.method.checks.MOST", 2)
    checks = Checks()
    with checks.collecting():
        check_scores(torch.full((3,), float("inf")), "broken")
    with pytest.raises(ScoreError, match="broken: some of 3 token scores"):
        checks.settle()


def test_scores_that_stay_as_they_are_are_looked_at_together_and_with_what_is_asked() -> None:
    checks, bad = Checks(), torch.tensor([1.0, float("nan")])
    with counting() as counts, checks.collecting():
        for _ in range(5):
            check_scores(torch.ones(3), "fine", still=True)
        launched = counts.launched - 5  # the ones themselves
        assert answered(torch.tensor([3, 4])) == [3, 4]
    assert (launched, counts.read) == (0, 1)
    with checks.collecting():
        check_scores(torch.ones(3), "fine", still=True)
        check_scores(bad, "broken", still=True)
        with pytest.raises(ScoreError, match="broken: 1 of 2 token scores"):
            answered(torch.tensor([3]))
        assert answered(torch.tensor([3])) == [3]
    assert answered(torch.tensor([5])) == [5]


def test_checks_that_wait_are_made_at_once_and_name_the_method() -> None:
    checks, bad = Checks(), torch.tensor([1.0, float("nan"), float("inf")])
    with counting() as counts, checks.collecting():
        check_scores(torch.ones(3), "fine")
        check_scores(bad, "broken")
        check_scores(torch.ones(0), "empty")
    assert counts.read == 0
    with pytest.raises(ScoreError, match="broken: 2 of 3 token scores"):
        checks.settle()
    # What was told is not told again, and outside the block a check waits for nobody.
    checks.settle()
    with pytest.raises(ScoreError, match="broken"):
        check_scores(bad, "broken")
