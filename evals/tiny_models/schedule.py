"""How fast a stage learns, and what it does apart from learning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import nn

CLIP_NORM = 1.0


class Timed(Protocol):
    """A stage: its steps, its highest rate, the share of it that is left in the end, and the steps of its rise."""

    @property
    def steps(self) -> int: ...
    @property
    def rate(self) -> float: ...
    @property
    def final(self) -> float: ...
    @property
    def warmup(self) -> int: ...


def rate_at(stage: Timed, step: int) -> float:
    """Linear warm-up, level for two thirds, then linear down to `final` of the rate."""
    left = max(0.0, 3 * (stage.steps - step) / max(1, stage.steps))
    return stage.rate * min((step + 1) / stage.warmup, stage.final + (1 - stage.final) * min(1.0, left))


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while."""
    module.eval()
    try:
        yield
    finally:
        module.train()
