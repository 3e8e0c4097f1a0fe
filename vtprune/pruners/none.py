"""The unpruned model, as a method like the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtprune.pruner import Pruner
from vtprune.registry import register


@register("none", stage="none", paper="", licence="Apache-2.0", needs="nothing")
@dataclass(frozen=True)
class NoPruning(Pruner):
    """Keeps every token whatever `keep` says, so that a sweep can name the unpruned model like a method."""

    default_keep: ClassVar[int | float] = 1.0

    def budget(self, tokens: int) -> int:
        """All `tokens`."""
        return tokens
