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


class Checks:
    """Checks that wait to be made: of scores that chose tokens already, before anything is answered by them."""

    def __init__(self) -> None:
        # The method, its scores, and their extremes, which NaN and infinity show in.
        self._open: list[tuple[str, Tensor, tuple[Tensor, Tensor]]] = []

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Within the block `check_scores` leaves its checks here."""
        token = _collecting.set(self)
        try:
            yield
        finally:
            _collecting.reset(token)

    def add(self, scores: Tensor, method: str) -> None:
        """Leaves the scores (any shape) of a method to be checked."""
        if scores.numel():
            self._open.append((method, scores, torch.aminmax(scores)))

    def settle(self) -> None:
        """Makes the checks; raises ScoreError for the first scores of which one is NaN or infinite."""
        found, self._open = self._open, []
        if not found:
            return
        device = found[0][2][0].device
        ends = torch.stack([end.to(device) for _, _, both in found for end in both]).tolist()
        for (method, scores, _), low, high in zip(found, ends[::2], ends[1::2], strict=True):
            if not (math.isfinite(low) and math.isfinite(high)):
                raise _error(scores, method)


_collecting: ContextVar[Checks | None] = ContextVar("checks", default=None)


def check_scores(scores: Tensor, method: str) -> Tensor:
    """The scores (any shape) in fp32; raises ScoreError if one of them is NaN or infinite, in a forward only once the
    decoder's last layer ran (`Checks`)."""
    scores = scores.float()
    checks = _collecting.get()
    if checks is not None:
        checks.add(scores.detach(), method)
    elif not bool(torch.isfinite(scores).all()):
        raise _error(scores, method)
    return scores


def listed(scores: npt.NDArray[np.float32], method: str) -> list[float]:
    """The scores (N,), which are on the host; raises ScoreError if one of them is NaN or infinite."""
    found: list[float] = scores.tolist()
    if not all(map(math.isfinite, found)):
        raise _error(torch.from_numpy(scores), method)
    return found


def _error(scores: Tensor, method: str) -> ScoreError:
    bad = int((~torch.isfinite(scores)).sum())
    return ScoreError(
        f"{method}: {bad} of {scores.numel()} token scores are NaN or infinite; the model's activations "
        "overflow (load it in float32 or bfloat16), the image holds invalid pixels, or the scores divide by zero"
    )
