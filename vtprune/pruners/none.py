"""The unpruned model, as a method like the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vtprune.errors import VTPruneError
from vtprune.method.pruner import Pruner
from vtprune.method.registry import register


@register("none", paper="", licence="Apache-2.0", needs="nothing", serves="features")
@dataclass(frozen=True)
class NoPruning(Pruner):
    """Keeps every token whatever `keep` says, so that a sweep can name the unpruned model like a method."""

    default_keep = 1.0

    def resolve(self) -> dict[str, Any]:
        """Nothing; raises VTPruneError for a `keep` that asks for anything else than all tokens."""
        if self.keep is not None and not (isinstance(self.keep, float) and self.keep == 1.0):
            raise VTPruneError(
                f"none prunes nothing, so keep={self.keep!r} would not be met; name a method that prunes, or leave "
                "keep out"
            )
        return {}

    def budget(self, tokens: int) -> int:
        """All `tokens`."""
        return tokens
