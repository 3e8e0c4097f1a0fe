"""Scores that can be trusted: checked at once, or all those of a forward together, for which the device is waited for
once."""

from __future__ import annotations

import math
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vtprune.errors import ScoreError

# Of the scores of one check that are held until it is made, to say how many are wrong.
MOST = 2**18


@dataclass(frozen=True)
class _Check:
    """method, its scores (None where they are too many to be kept), how many these are, and their extremes, which NaN
    and infinity show in; None where nobody writes into the scores, so that these can be looked at later."""

    method: str
    scores: Tensor | None
    count: int
    ends: tuple[Tensor, Tensor] | None

    def extremes(self) -> tuple[Tensor, Tensor]:
        """The lowest and the highest score."""
        if self.ends is not None:
            return self.ends
        assert self.scores is not None
        return torch.aminmax(self.scores)


class Checks:
    """Checks that wait to be made: of scores that chose tokens already, before anything is answered by them."""

    def __init__(self) -> None:
        self._open: list[_Check] = []

    def collecting(self) -> Collecting:
        """Within the block `check_scores` leaves its checks here. An error in it may come of such scores, of which is
        told first."""
        return Collecting(self)

    def add(self, scores: Tensor, method: str, *, still: bool = False) -> None:
        """Leaves the scores (any shape) of a method to be checked; still: that nobody writes into them until then, so
        that they are looked at together with others."""
        if scores.numel():
            held = scores if scores.numel() <= MOST else None
            ends = None if still and held is not None else torch.aminmax(scores)
            self._open.append(_Check(method, held, scores.numel(), ends))

    def settle(self, asked: Tensor | None = None) -> list[int]:
        """Makes the checks; raises ScoreError for the first scores of which one is NaN or infinite. asked: (n,) counts
        that Python has to know as well, which are answered: the device is waited for once."""
        found, self._open = self._open, []
        if not found:
            return [] if asked is None else list(map(int, asked.tolist()))
        known = [end for check in found if check.ends is not None for end in check.ends]
        waiting = [check.scores for check in found if check.ends is None and check.scores is not None]
        device = (known or waiting)[0].device
        if waiting:
            flat = [scores.flatten().to(device) for scores in waiting]
            known += torch.aminmax(flat[0] if len(flat) == 1 else torch.cat(flat))
        ends = torch.stack([end if end.device == device else end.to(device) for end in known])
        # Counts of tokens are told apart in fp32.
        told = (ends if asked is None else torch.cat([ends, asked.to(ends)])).tolist()
        if not all(map(math.isfinite, told)):
            for check in found:
                if not all(math.isfinite(end) for end in check.extremes()):
                    raise _error(check.scores, check.method, check.count)
        return list(map(int, told[len(known) :]))


_collecting: ContextVar[Checks | None] = ContextVar("checks", default=None)


class Collecting:
    """The block of `Checks.collecting`."""

    def __init__(self, checks: Checks) -> None:
        self._checks = checks

    def __enter__(self) -> None:
        self._token = _collecting.set(self._checks)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is not None and issubclass(kind, Exception):
                self._checks.settle()
        finally:
            _collecting.reset(self._token)


def check_scores(scores: Tensor, method: str, *, still: bool = False) -> Tensor:
    """The scores (any shape) in fp32; raises ScoreError if one of them is NaN or infinite, in a forward only once the
    decoder's last layer ran (`Checks`). still: that nobody writes into the answer until then."""
    scores = scores.float()
    checks = _collecting.get()
    if checks is not None:
        checks.add(scores.detach() if scores.requires_grad else scores, method, still=still)
    elif not bool(torch.isfinite(scores).all()):
        raise _error(scores, method, scores.numel())
    return scores


def answered(asked: Tensor) -> list[int]:
    """The counts (n,) on the host, with which the checks that wait in this forward are made; raises ScoreError."""
    checks = _collecting.get()
    return list(map(int, asked.tolist())) if checks is None else checks.settle(asked)


def listed(scores: npt.NDArray[np.float32], method: str) -> list[float]:
    """The scores (N,), which are on the host; raises ScoreError if one of them is NaN or infinite."""
    found: list[float] = scores.tolist()
    if not all(map(math.isfinite, found)):
        raise _error(torch.from_numpy(scores), method, len(found))
    return found


def _error(scores: Tensor | None, method: str, count: int) -> ScoreError:
    bad = "some" if scores is None else int((~torch.isfinite(scores)).sum())
    return ScoreError(
        f"{method}: {bad} of {count} token scores are NaN or infinite; the model's activations "
        "overflow (load it in float32 or bfloat16), the image holds invalid pixels, or the scores divide by zero"
    )
