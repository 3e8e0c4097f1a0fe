"""What no method can do on a decoder with linear-attention layers, whose states tokens go into for good."""

from __future__ import annotations

from collections.abc import Iterator

from vtprune.errors import UnsupportedModelError
from vtprune.method.pruner import Pruner
from vtprune.method.stages import (
    Guided,
    InCache,
    evict_layers,
    planned_layers,
    probe_layer,
    read_layers,
    revives,
    routed_layers,
)


def check_states(pruners: list[Pruner]) -> None:
    """Raises UnsupportedModelError, by the method's name and with the reason, for bound pruners that a decoder with
    linear attention in some of its layers has no place for."""
    for pruner in pruners:
        if pruner.model.attention_layers is None:
            continue
        if revives(pruner):
            raise UnsupportedModelError(
                f"{pruner.name} lets tokens return to layers that they left, and the state of a linear-attention "
                "layer, in which this decoder folds what came after them, cannot be opened again; use a method whose "
                "dropped tokens stay dropped, such as pyramid_drop"
            )
        if routed_layers(pruner):
            raise UnsupportedModelError(
                f"{pruner.name} has tokens skip decoder layers and go on after them; what a skipped token would mean "
                "to the state of a linear-attention layer, of which this decoder has some, nobody has defined"
            )
        if planned_layers(pruner):
            raise UnsupportedModelError(
                f"{pruner.name} narrows the attention of decoder layers, and most layers of this decoder have none to "
                "be narrowed (linear attention)"
            )
        wrong = sorted(set(_read(pruner)) - set(pruner.model.readable))
        if wrong:
            raise UnsupportedModelError(
                f"{pruner.name} reads the attention of decoder layer {wrong[0]}, which has none (linear attention); "
                f"layers that have it: {', '.join(map(str, pruner.model.readable))}"
            )


def _read(pruner: Pruner) -> Iterator[int]:
    """The decoder layers whose attention a pruner needs."""
    yield from read_layers(pruner)
    yield from evict_layers(pruner)
    if isinstance(pruner, InCache) and evict_layers(pruner):
        yield from pruner.density_layers()
    learned = pruner.learns_from() if isinstance(pruner, Guided) else None
    yield from (layer for layer in (probe_layer(pruner), learned) if layer is not None)
