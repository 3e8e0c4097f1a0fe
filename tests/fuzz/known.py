"""Faults of vtprune that cases run into and that are known: such cases are left out until they are mended."""

from __future__ import annotations

import vtprune
from tests.fuzz.cases import Case


def known_fault(case: Case) -> str:
    """What is wrong, "" if the case may run."""
    if not case.renumbers:
        return ""
    if any(
        isinstance(pruner, vtprune.MustDrop) and pruner.cut_cache and pruner.keep != 1.0 for pruner in case.pruners
    ):
        return "renumbered positions and a cut cache: layers follow two rules, and a row differs from itself alone"
    if any(pruner.revives for pruner in case.pruners):
        return "released code that renumbers positions, before a method whose tokens return"
    return ""
