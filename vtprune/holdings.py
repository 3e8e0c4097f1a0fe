"""What the layers of a cache hold: how many entries of a row, which tokens of an image in which head."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtprune.decoding import ImageSpan
from vtprune.eviction import MERGED


class Holding(NamedTuple):
    """What one cache layer holds: slots, logical length and bytes; where its heads were cut, each one's slots and how
    many entries flowed into each of its first ones, (B, Hkv, K) and (B, Hkv, k)."""

    slots: Tensor | None
    length: int
    size: int
    heads: Tensor | None
    merged: Tensor | None

    @classmethod
    def of(cls, layer: Any) -> Holding:
        """What a PrunedLayer holds now."""
        size = sum(
            0 if states is None else states.numel() * states.element_size() for states in (layer.keys, layer.values)
        )
        return cls(layer.slots, layer.length, size, layer.head_slots, layer.entries.get(MERGED))

    def rows(self, rows: list[int]) -> Holding:
        """The same of some rows."""
        slots, heads, merged = (None if part is None else part[rows] for part in (self.slots, self.heads, self.merged))
        return Holding(slots, self.length, self.size, heads, merged)

    def tokens(self, span: ImageSpan) -> list[list[int]] | None:
        """The tokens of an image that each head holds, or None where all hold the same."""
        if self.heads is None:
            return None
        token = self._table(span, torch.arange(span.image.total))
        return [token[head[head >= 0]][token[head[head >= 0]] >= 0].tolist() for head in self.heads[span.row].cpu()]

    def merged_into(self, span: ImageSpan) -> int:
        """How many entries flowed into those of an image, in all heads."""
        if self.heads is None or self.merged is None:
            return 0
        counts = self.merged[span.row].cpu()
        own = self._table(span, torch.arange(span.image.total))[self.heads[span.row, :, : counts.shape[1]].cpu()] >= 0
        return int(counts[own].sum())

    def _table(self, span: ImageSpan, tokens: Tensor) -> Tensor:
        """(length + 1,) the token of the image at each place, -1 for none and (last) for padding."""
        table = torch.full((self.length + 1,), -1)
        table[span.offset + span.places.cpu()] = tokens
        return table


def real_entries(slots: Tensor | None, length: int, mask: Tensor | None, rows: int) -> list[int]:
    """Entries of each row without padding: those at `slots` (B, K), or at all `length` places."""
    if slots is None:
        if mask is None:
            return [length] * rows
        return mask[:, :length].sum(dim=1).tolist()
    held = slots >= 0
    if mask is not None:
        real = mask.to(slots.device).bool().gather(1, slots.clamp(0, mask.shape[1] - 1))
        held = held & real
    return held.sum(dim=1).tolist()
