"""Whether a method can run at the levels that it is asked for, on the model that they were calibrated on."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

from vtprune.errors import PromiseWarning, VTPruneError
from vtprune.hooks.base_sample import BaseSample, sample_base
from vtprune.hooks.weights import SUBMODULE
from vtprune.method.growth import Growth
from vtprune.method.pruner import Pruner
from vtprune.method.stages import (
    InCache,
    InLayers,
    Trained,
    acts,
    drop_layers,
    encoder_layers,
    planned_layers,
    probe_layer,
    reads,
    revives,
)


def unfit(pruner: Pruner) -> str:
    """Why a method cannot run at several levels, "" where it can."""
    if isinstance(pruner, Trained):
        return "brings weights that were trained at one level"
    if isinstance(pruner, InLayers) or planned_layers(pruner):
        return "routes or narrows layers, which a level of 1.0 does not undo for text"
    if isinstance(pruner, InCache) or revives(pruner):
        return "goes on choosing after the prompt, at the level of nobody's call"
    if not acts(pruner):
        return "prunes nothing, whatever its keep"
    return ""


def check_levels(growth: Growth, bound: Pruner) -> None:
    """Raises VTPruneError for a method that cannot run at several levels; bound: at its own one."""
    reason = unfit(growth.method)
    if reason:
        raise VTPruneError(f"{growth.method.name} {reason}; calibrate with another method")
    for level in growth.levels:
        other = replace(growth.method, keep=level).bind(bound.model)
        places = (
            set(encoder_layers(other)) <= set(encoder_layers(bound)),
            set(drop_layers(other)) <= set(drop_layers(bound)),
            probe_layer(other) in (None, probe_layer(bound)),
            reads(other) <= reads(bound),
        )
        if not all(places):
            raise VTPruneError(
                f"{growth.method.name} acts elsewhere at keep={level!r} than at keep={growth.fixed!r}; calibrate with "
                "another method"
            )


def check_origin(growth: Growth, core: Any, name: str) -> None:
    """Raises VTPruneError for another model than the one that was calibrated, and warns of another dtype."""
    origin = growth.origin
    if origin is None:
        return
    base = BaseSample.from_metadata(dict(origin.base))
    same = None if base is None else base.matches(sample_base(core, SUBMODULE))
    if same is None or not same:
        raise VTPruneError(f"{name} was calibrated on another model than this one; run vtprune calibrate on this one")
    dtype = str(next(iter(core.parameters())).dtype).removeprefix("torch.")
    if dtype != origin.dtype:
        why = f"it was calibrated in {origin.dtype}"
        warnings.warn(
            f"{name}: the promise does not cover dtype={dtype}: {why}; calibrate with it", PromiseWarning, stacklevel=5
        )
