"""What the cache held after each forward, noted while a generation runs and counted when somebody asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vtprune.cache import PrunedLayer
from vtprune.state import ROWS


def origins(layers: Sequence[PrunedLayer]) -> Tensor | None:
    """(B, 1) the row of the prompt that each row of the cache was, None where they stand as they came in."""
    return layers[0].aux.get(ROWS)


@dataclass(frozen=True)
class CacheNote:
    """The cache after one forward.

    rows: their `origins`; entries: of each layer, for every row (B,) or one int for all, padding left out; layers that
    hold the same places share one tensor. allocated: bytes of the cache's tensors, padding included.
    """

    rows: Tensor | None
    entries: tuple[Tensor | int, ...]
    allocated: int

    @classmethod
    def of(cls, layers: Sequence[PrunedLayer], mask: Tensor | None) -> CacheNote:
        """Notes what the layers hold; `mask`: (B, length) with 0 where a token is padding, or None. Waits for no
        device."""
        known: dict[tuple[int, int], Tensor | int] = {}
        for layer in layers:
            key = id(layer.slots), layer.length
            if key not in known:
                known[key] = _entries(layer, mask)
        entries = tuple(known[id(layer.slots), layer.length] for layer in layers)
        return cls(origins(layers), entries, sum(map(_bytes, layers)))

    def counts(self, rows: Sequence[int]) -> list[list[int]]:
        """Entries [layer][row] of these rows of the cache."""
        known: dict[int, list[int]] = {}
        for entries in self.entries:
            if id(entries) not in known:
                counts = [entries] * (1 + max(rows)) if isinstance(entries, int) else entries.tolist()
                known[id(entries)] = [counts[row] for row in rows]
        return [list(known[id(entries)]) for entries in self.entries]


def _entries(layer: PrunedLayer, mask: Tensor | None) -> Tensor | int:
    slots = layer.slots
    if slots is None:
        return layer.length if mask is None else mask[:, : layer.length].sum(dim=1)
    if mask is None:
        return (slots >= 0).sum(dim=1) if layer.ragged else slots.shape[1]
    real = mask.to(slots.device).bool().gather(1, slots.clamp(0, mask.shape[1] - 1))
    return (real & (slots >= 0)).sum(dim=1)


def _bytes(layer: PrunedLayer) -> int:
    return sum(part.numel() * part.element_size() for part in (layer.keys, layer.values) if part is not None)
