"""Decoder layers whose attention a method reads, on decoders where some have none: those with linear attention.

Published layers move to the next one that will do; layers that were asked for have to be such.
"""

from __future__ import annotations

from collections.abc import Sequence

from vtprune.errors import UnsupportedModelError

Layers = tuple[int, ...]


def snapped(layers: Sequence[int], among: Layers | None) -> Layers:
    """Rising `layers`, each moved on to the first of the rising layers `among` that none before it took (None: all
    will do); what would move beyond the last of these falls away, but that one layer is left."""
    if among is None:
        return tuple(layers)
    found: list[int] = []
    for layer in layers:
        found += [one for one in among if one >= layer and one not in found][:1]
    return tuple(found) or among[-1:]


def check_attending(method: str, option: str, layers: Sequence[int], among: Layers | None) -> None:
    """Raises UnsupportedModelError unless all `layers`, the value of an option, are of those that will do, and where
    none would."""
    if among is None:
        return
    wrong = [layer for layer in layers if layer not in among]
    if among and not wrong:
        return
    reason = "reads the attention of decoder layers, and most layers of this decoder have none (linear attention)"
    if not among:
        raise UnsupportedModelError(f"{method} {reason}: there is none that it could read")
    raise UnsupportedModelError(
        f"{method} {reason}: {option} may hold {', '.join(map(str, among))}, got {', '.join(map(str, wrong))}"
    )
