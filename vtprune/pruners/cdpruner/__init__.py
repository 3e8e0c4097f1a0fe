"""CDPruner: the method, and its parts."""

from vtprune.pruners.cdpruner.cdpruner import CDPruner

__all__ = ["CDPruner"]
