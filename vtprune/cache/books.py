"""What a cache is made of, and the layer in it that keeps its books."""

from __future__ import annotations

from collections.abc import Sequence

from vtprune.cache.layer import PrunedLayer
from vtprune.cache.states import StateLayer

CacheLayer = PrunedLayer | StateLayer


def entry_layers(layers: Sequence[object]) -> list[PrunedLayer]:
    """Those of a cache's layers that hold entries: all of them but for states."""
    return [layer for layer in layers if isinstance(layer, PrunedLayer)]


def books(layers: Sequence[object]) -> PrunedLayer:
    """The layer that keeps what belongs to the whole cache (its length, its rows, the images in it): the first one
    that holds entries; raises IndexError where there is none."""
    return entry_layers(layers)[0]
