"""Routed layers that all skip the same share of an image's tokens, between layers that compute everything."""

from __future__ import annotations

import math

from vtprune.errors import CannotCut, VTPruneError
from vtprune.method.pruner import budget_of
from vtprune.method.schedules import ROUNDING
from vtprune.method.stages import InLayers


def even_mean(pruner: InLayers, skip: float) -> float:
    """The mean share over decoder layers where each routed one leaves out the share `skip`."""
    return 1 - skip * len(pruner.routed_layers()) / pruner.model.decoder_depth


def even_budget(pruner: InLayers, skip: float, *, tokens: int, entered: int) -> int:
    """What each routed layer computes of an image: all but the share `skip`, or what makes the mean over decoder
    layers the method's `keep`; raises CannotCut where the layers that compute everything, and one token in each other,
    exceed it."""
    if pruner.keep is None:
        return max(1, math.floor((1 - skip) * entered + ROUNDING))
    depth, routed = pruner.model.decoder_depth, len(pruner.routed_layers())
    left = budget_of(pruner.keep, tokens) * depth - (depth - routed) * entered
    if left >= routed:
        return min(entered, left // routed)
    least = ((depth - routed) * entered + routed) / depth
    raise CannotCut(_out_of_reach(pruner, f"{budget_of(pruner.keep, tokens)} of {tokens} tokens", f"{least:.4g}"))


def check_even(pruner: InLayers) -> None:
    """Raises VTPruneError where the decoder is too shallow, and for a share that skipping in the routed layers cannot
    meet."""
    depth, routed = pruner.model.decoder_depth, pruner.routed_layers()
    if not routed:
        raise VTPruneError(
            f"{pruner.name}: the first and the last decoder layer compute everything, so it needs at least 3 of "
            f"them, got {depth}"
        )
    if routed[-1] >= depth:
        raise VTPruneError(f"{pruner.name}: layer {routed[-1]} (counted from 0) of a decoder of {depth} layers")
    dense = (depth - len(routed)) / depth
    if isinstance(pruner.keep, float) and pruner.model.first and pruner.keep <= dense:
        raise VTPruneError(_out_of_reach(pruner, f"{pruner.keep:.4g} of the tokens", f"{dense:.4g}"))


def _out_of_reach(pruner: InLayers, asked: str, least: str) -> str:
    depth = pruner.model.decoder_depth
    dense = depth - len(pruner.routed_layers())
    more = "route more layers (layers), or " if hasattr(pruner, "layers") else ""
    return (
        f"{pruner.name} cannot keep {asked} on average: the {dense} of {depth} layers that compute everything, and "
        f"one token in each other, make {least}; raise keep, or {more}combine with a method that prunes before the "
        "decoder"
    )
