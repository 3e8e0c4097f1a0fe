"""Pure functions for layers that do less with vision: taking it apart from text, slices of weights, neighbours."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import linear

from vtprune.tensors.compaction import gather_tokens, places_of


@dataclass(frozen=True)
class Apart:
    """The tokens (B, n) of a layer in two parts: `text` (B, t) and `vision` (B, v), columns in order, padded in front
    with -1; order: (B, n) where each token stands in the row of both parts, one after the other."""

    text: Tensor
    vision: Tensor
    order: Tensor

    @classmethod
    def of(cls, vision: Tensor, counts: Sequence[int]) -> Apart:
        """vision: (B, n) which tokens are vision; counts: (B,) how many."""
        width = vision.shape[1]
        left = [width - count for count in counts]
        columns, words = places_of(vision, counts), places_of(~vision, left)
        pads = [torch.tensor([max(n) - own for own in n], device=vision.device)[:, None] for n in (left, counts)]
        text, image = ((~vision).cumsum(dim=1) - 1 + pads[0], vision.cumsum(dim=1) - 1 + pads[1])
        return cls(words, columns, torch.where(vision, max(left) + image, text))

    def split(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """(B, t, ...) and (B, v, ...) of (B, n, ...)."""
        return gather_tokens(states, self.text), gather_tokens(states, self.vision)

    def join(self, text: Tensor, vision: Tensor) -> Tensor:
        """(B, n, ...) of both parts."""
        return gather_tokens(torch.cat([text, vision], dim=1), self.order)


@dataclass(frozen=True)
class HeadsApart:
    """Key-value heads in two parts: those that read vision, `reading` (R, k), and the others, `cut` (R, H - k), both
    ascending; R is the batch, or 1 where all rows are alike."""

    reading: Tensor
    cut: Tensor
    _parts: dict[tuple[str, int], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def part_of(self, which: str, size: int) -> Tensor:
        """(R, k * size) the rows of a projection, columns of its inverse, or query heads, that belong to the heads
        `which` ("reading" or "cut"), so many to each."""
        key = which, size
        if key not in self._parts:
            heads: Tensor = getattr(self, which)
            self._parts[key] = (heads[..., None] * size + _counted(size, heads.device)).flatten(1)
        return self._parts[key]

    @classmethod
    def of(cls, reading: Tensor, heads: int) -> HeadsApart:
        """reading: (R, k) of so many heads."""
        others = torch.ones(len(reading), heads, dtype=torch.bool, device=reading.device).scatter_(1, reading, False)
        return cls(reading, places_of(others, [heads - reading.shape[1]] * len(reading)))


@functools.lru_cache(maxsize=4096)
def fixed_heads(reading: tuple[int, ...], heads: int, device: torch.device) -> HeadsApart:
    """Two parts that are the same for all rows."""
    cut = [head for head in range(heads) if head not in reading]
    own, others = (torch.tensor([one], dtype=torch.long, device=device) for one in (list(reading), cut))
    return HeadsApart(own, others)


@functools.lru_cache(maxsize=256)
def _counted(size: int, device: torch.device) -> Tensor:
    return torch.arange(size, device=device)


def rows_of(states: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    """What a linear layer makes of states (B, n, D) in some of its outputs, `rows` (B or 1, r): (B, n, r)."""
    if len(rows) == 1:
        return linear(states, weight.index_select(0, rows[0]), None if bias is None else bias.index_select(0, rows[0]))
    found = torch.matmul(states, weight[rows].transpose(1, 2))
    return found if bias is None else found + bias[rows][:, None]


def columns_of(states: Tensor, weight: Tensor, bias: Tensor | None, columns: Tensor) -> Tensor:
    """What a linear layer makes of states (B, n, c) that are some of its inputs, `columns` (B or 1, c), the others
    being 0."""
    if len(columns) == 1:
        return linear(states, weight.index_select(1, columns[0]), bias)
    found = torch.matmul(states, weight.t()[columns])
    return found if bias is None else found + bias


def heads_of(states: Tensor, heads: Tensor) -> Tensor:
    """(B, k, n, d) the heads (B or 1, k) among (B, H, n, d)."""
    if len(heads) == 1:
        return states.index_select(1, heads[0])
    return torch.take_along_dim(states, heads[:, :, None, None], dim=1)


def with_heads(states: Tensor, heads: Tensor, values: Tensor) -> Tensor:
    """States (B, n, H, d) with `values` (B, n, k, d) in the heads (B or 1, k)."""
    if len(heads) == 1:
        return states.index_copy(2, heads[0], values)
    return states.scatter(2, heads[:, None, :, None].expand_as(values), values)


def mask_rows(mask: Tensor | None, columns: Tensor, *, queries: int, keys: int) -> Tensor:
    """The mask of the queries at `columns` (B, t), of (B or 1, 1, q, k), or the causal one of as many queries at the
    end of the keys where that is None: (B or 1, 1, t, k)."""
    if mask is None:
        last = columns.clamp(min=0) + keys - queries
        return torch.arange(keys, device=columns.device) <= last[:, None, :, None]
    return gather_tokens(mask.transpose(1, 2), columns).transpose(1, 2)


def neighbours(grid: tuple[int, int], window: int, *, causal: bool) -> Tensor:
    """(h * w, s) int64: for each token of a grid in raster order those at most (window - 1) // 2 rows and columns
    away, and itself, -1 past the edge; causal: none behind it."""
    height, width = grid
    reach = (window - 1) // 2
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    steps = torch.arange(-reach, reach + 1)
    down, right = (part.flatten() for part in torch.meshgrid(steps, steps, indexing="ij"))
    rows, columns = row.flatten()[:, None] + down, column.flatten()[:, None] + right
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    found = rows * width + columns
    if causal:
        inside &= found <= torch.arange(height * width)[:, None]
        inside = inside[:, : (len(down) + 1) // 2]
        found = found[:, : inside.shape[1]]
    return found.masked_fill(~inside, -1)


def windowed_attention(
    query: Tensor, key: Tensor, value: Tensor, near: Tensor, *, start: int, seen: Tensor | None, scale: float
) -> Tensor:
    """(N, H, d) attention of an image's tokens to what stands before it and to their neighbours.

    query: (H, N, d); key, value: (Hkv, k, d) of the row; near: (N, s) the column of each neighbour, -1 for none;
    start: how many columns stand before the image; seen: (start,) what the mask adds there, or which it opens, None
    for all.
    """
    share = query.shape[0] // key.shape[0]
    grouped = query.unflatten(0, (-1, share))
    before, at = key[:, :start], near.clamp(min=0)
    logits = torch.matmul(grouped.flatten(1, 2), before.transpose(-1, -2)).unflatten(1, grouped.shape[1:3])
    if seen is not None:
        logits = logits.masked_fill(~seen, float("-inf")) if seen.dtype == torch.bool else logits + seen / scale
    own = torch.matmul(grouped.transpose(1, 2), key[:, at].transpose(-1, -2)).transpose(1, 2)
    both = torch.cat([logits, own.masked_fill(near < 0, float("-inf"))], dim=-1).float() * scale
    weights = both.softmax(dim=-1).to(value.dtype)
    far, close = weights.split([start, near.shape[1]], dim=-1)
    found = torch.matmul(far.flatten(1, 2), value[:, :start]).unflatten(1, grouped.shape[1:3])
    found = found + torch.matmul(close.transpose(1, 2), value[:, at]).transpose(1, 2)
    return found.flatten(0, 1).transpose(0, 1)
