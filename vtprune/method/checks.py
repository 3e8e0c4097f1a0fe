"""Scores that can be trusted: checked at once, or all those of a forward together, for which the device is waited for
once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vtprune.errors import ScoreError

# Of the scores of one check that are held until it is made, to say how many are wrong.
MOST = 2**18


class Checks:
    """Checks that wait to be made: of scores that chose tokens already, before anything is answered by them."""

    def __init__(self) -> None:
        # The method, its scores (None where they are too many to be kept), how many they are, and their extremes,
        # which NaN and infinity show in.
        self._open: list[tuple[str, Tensor | None, int, tuple[Tensor, Tensor]]] = []

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Within the block `check_scores` leaves its checks here. An error in it may come of such scores, of which is
        told first."""
        token = _collecting.set(self)
        try:
            yield
        except Exception:
            self.settle()
            raise
        finally:
            _collecting.reset(token)

    def add(self, scores: Tensor, method: str) -> None:
        """Leaves the scores (any shape) of a method to be checked."""
        if scores.numel():
            held = scores if scores.numel() <= MOST else None
            self._open.append((method, held, scores.numel(), torch.aminmax(scores)))

    def settle(self) -> None:
        """Makes the checks; raises ScoreError for the first scores of which one is NaN or infinite."""
        found, self._open = self._open, []
        if not found:
            return
        device = found[0][3][0].device
        ends = torch.stack([end.to(device) for *_, both in found for end in both]).tolist()
        for (method, scores, count, _), low, high in zip(found, ends[::2], ends[1::2], strict=True):
            if not (math.isfinite(low) and math.isfinite(high)):
                raise _error(scores, method, count)


_collecting: ContextVar[Checks | None] = ContextVar("checks", default=None)


def check_scores(scores: Tensor, method: str) -> Tensor:
    """The scores (any shape) in fp32; raises ScoreError if one of them is NaN or infinite, in a forward only once the
    decoder's last layer ran (`Checks`)."""
    scores = scores.float()
    checks = _collecting.get()
    if checks is not None:
        checks.add(scores.detach(), method)
    elif not bool(torch.isfinite(scores).all()):
        raise _error(scores, method, scores.numel())
    return scores


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
