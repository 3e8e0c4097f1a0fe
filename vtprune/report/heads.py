"""Which tokens of an image each head of a cache holds, once its heads were cut to different ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vtprune.cache.books import CacheLayer
from vtprune.cache.names import MERGED
from vtprune.cache.slots import Slots
from vtprune.cache.states import StateLayer
from vtprune.report.trail import ImageTrail


class Heads(NamedTuple):
    """The heads of one cache layer of `length` places.

    heads, places: as in `PrunedLayer`; merged: (B, Hkv, k) how many entries flowed into each of the first ones, or
    None.
    """

    length: int
    heads: Tensor | None
    places: Slots | None
    merged: Tensor | None

    @classmethod
    def of(cls, layer: CacheLayer) -> Heads:
        """What a layer's heads hold now."""
        if isinstance(layer, StateLayer):
            return cls(0, None, None, None)
        return cls(layer.length, layer.heads, layer.places, layer.entries.get(MERGED))

    @property
    def slots(self) -> Tensor | None:
        """(B, Hkv, K) the place of each head's entries, None while all hold the same."""
        return None if self.heads is None or self.places is None else self.places.after(self.heads)

    def tokens(self, image: ImageTrail) -> list[list[int]]:
        """The tokens of an image that each head holds, [] where all hold the same."""
        slots = self.slots
        if slots is None:
            return []
        token = self._table(image)
        found = (token[head[head >= 0]] for head in slots[image.row].cpu())
        return [tokens[tokens >= 0].tolist() for tokens in found]

    def merged_into(self, image: ImageTrail) -> int:
        """How many entries flowed into those of an image, in all heads."""
        slots = self.slots
        if slots is None or self.merged is None:
            return 0
        counts = self.merged[image.row].cpu()
        own = self._table(image)[slots[image.row, :, : counts.shape[1]].cpu()] >= 0
        return int(counts[own].sum())

    def _table(self, image: ImageTrail) -> Tensor:
        """(length + 1,) the token of the image at each place, -1 for none and (last) for padding."""
        table = torch.full((self.length + 1,), -1)
        table[image.offset + image.places.cpu()] = torch.arange(image.total)
        return table


def tokens_per_head(heads: Sequence[Heads], image: ImageTrail) -> list[list[list[int]]]:
    """The tokens of an image that each head of each layer holds, [] for a layer whose heads all hold what it held
    after the prefill."""
    found = [layer.tokens(image) for layer in heads]
    # Heads of one layer are listed for all rows once any of them was cut.
    whole = (image.cached_at(layer).tolist() for layer in range(len(found)))
    return [[] if all(head == kept for head in of) else of for of, kept in zip(found, whole, strict=True)]


def mean_held(heads: Sequence[Heads], image: ImageTrail, layers: Sequence[int]) -> float:
    """Tokens of an image in the caches of some layers: their mean over layers and heads."""
    found = tokens_per_head(heads, image) or [[]] * (1 + max(layers))
    held = [found[layer] or [image.cached_at(layer).tolist()] for layer in layers]
    return sum(sum(map(len, one)) / len(one) for one in held) / len(held)


def eviction_notes(heads: Sequence[Heads], image: ImageTrail, name: str) -> list[str]:
    """What became of the entries of an image that left its cache head by head."""
    found = tokens_per_head(heads, image)
    evicted = sum(len(of) * image.cached_at(layer).numel() - sum(map(len, of)) for layer, of in enumerate(found))
    if not evicted:
        return []
    merged = sum(layer.merged_into(image) for layer in heads)
    return [f"{name}: {merged} entries merged of {evicted} evicted, summed over layers and heads"]
