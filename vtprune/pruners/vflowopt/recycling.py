"""Recycling: tokens that would be dropped flow together, one for every cell of the image."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from vtprune.method.answers import Merge, Selection
from vtprune.method.asking import Asking, asking
from vtprune.tensors.attention import at_least_single


def cells_of(parts: Iterable[tuple[int, int]], size: float) -> tuple[Tensor, int]:
    """The cell of each token of a sequence of raster grids, (N,) int64 on the host, and how many there are.

    parts: (rows, cols) of each grid; size: side of a cell in tokens, any positive number. Grids share no cell.
    """
    cells, first = [np.empty(0, dtype=np.int64)], 0
    # A cell smaller than a token holds one all the same.
    size = max(size, 1.0)
    for rows, cols in parts:
        row, col = (np.floor(np.arange(n) / size).astype(np.int64) for n in (rows, cols))
        own = row[:, None] * (col[-1] + 1) + col
        cells.append(first + own.reshape(-1))
        first += int(own[-1, -1]) + 1
    return torch.from_numpy(np.concatenate(cells)), first


@asking
def direct_count(importance: Tensor, cells: Tensor, count: int, budget: int) -> Asking[tuple[int, int]]:
    """How many of the most important tokens may stay as they are, if each cell that holds others gets one token
    more and all these are to be at most `budget`: as many as possible, 0 where the cells alone are too many; and how
    many cells then hold others.

    importance, cells: (N,), of `count` cells; budget < N.
    """
    tokens, device = importance.numel(), importance.device
    weakest_first = importance.sort(descending=True, stable=True).indices.flip(0)
    walked = cells.index_select(0, weakest_first)
    opener = torch.full((count,), tokens, device=device)
    opener.scatter_reduce_(0, walked, torch.arange(tokens, device=device), "amin")
    opened = torch.zeros(tokens + 1, dtype=torch.long, device=device).index_fill_(0, opener, 1)
    # The n weakest lie in made[n - 1] cells.
    made = opened[:tokens].cumsum(dim=0)
    entering = torch.arange(tokens, device=device) + made.flip(0)
    direct = ((entering <= budget).sum() - 1).clamp(min=0)[None]
    found = yield torch.cat([direct, entering.index_select(0, direct) - direct])
    return int(found[0]), int(found[1])


def recycle(features: Tensor, importance: Tensor, cells: Tensor, count: int, direct: int, filled: int) -> Selection:
    """The `direct` most important tokens as they are, and of the others one a cell, where all of it flow together.

    features: (N, D); importance, cells: (N,), of `count` cells; filled: cells that go on, at most those that hold
    other tokens, the most important ones first. A cell's vector is the mean weighted by importance (negative ones
    weigh nothing, and all weigh the same where none is positive) and takes the place of its most important token
    (ties: the lowest). Gradients flow through the vectors of the cell, and through the importance that weighs them.
    """
    order = importance.sort(descending=True, stable=True).indices
    stay, low = order[:direct], order[direct:].sort().values
    group, worth, tokens = cells.index_select(0, low), importance.index_select(0, low), importance.numel()
    best = worth.new_full((count,), -torch.inf).scatter_reduce_(0, group, worth, "amax")
    into = torch.full((count,), tokens, device=low.device)
    into.scatter_reduce_(0, group, low.masked_fill(worth < best.index_select(0, group), tokens), "amin")
    shares = _shares(worth, group, count)
    chosen = best.argsort(descending=True, stable=True)[:filled]
    landing = into.index_select(0, chosen)
    kept = torch.cat([stay, landing]).sort().values
    places = torch.searchsorted(kept, landing)

    def mix(values: Tensor) -> Tensor:
        """(N, D) values of the tokens to (K, D) of those that go on."""
        whole = at_least_single(values.index_select(0, low))
        parts = whole * shares[:, None].to(whole)
        vectors = parts.new_zeros(count, values.shape[1]).index_add(0, group, parts)
        return values.index_select(0, kept).index_copy(0, places, vectors.index_select(0, chosen).to(values.dtype))

    flowed = functools.partial(_merges, low, group, shares=shares.detach(), into=into, chosen=chosen)
    return Selection(kept, mix(features), flowed, sound=True, mix=mix)


@asking
def filled_cells(importance: Tensor, cells: Tensor, count: int, direct: int) -> Asking[int]:
    """How many of `count` cells hold tokens other than the `direct` most important ones; importance, cells: (N,)."""
    low = importance.sort(descending=True, stable=True).indices[direct:]
    filled = yield torch.zeros(count, dtype=torch.bool, device=cells.device).index_fill_(0, cells[low], True).sum()
    return int(filled)


def _shares(worth: Tensor, group: Tensor, groups: int) -> Tensor:
    """(M,) the share of each token in its group's vector."""
    positive = worth.clamp(min=0)
    sums, sizes = worth.new_zeros(2, groups).unbind()
    sums = sums.index_add(0, group, positive).index_select(0, group)
    sizes = sizes.index_add(0, group, torch.ones_like(worth)).index_select(0, group)
    # No 0 / 0 where the other branch is taken: its gradient would be NaN.
    return torch.where(sums > 0, positive / sums.where(sums > 0, torch.ones_like(sums)), 1 / sizes)


def _merges(low: Tensor, group: Tensor, shares: Tensor, into: Tensor, chosen: Tensor) -> tuple[Merge, ...]:
    """What flowed where, of groups of more than one token."""
    went_on = set(chosen.tolist())
    members: dict[int, list[tuple[int, float]]] = {}
    for token, cell, share in zip(low.tolist(), group.tolist(), shares.tolist(), strict=True):
        members.setdefault(cell, []).append((token, share))
    places = into.tolist()
    return tuple(
        Merge(places[cell], *zip(*found, strict=True))
        for cell, found in sorted(members.items())
        if cell in went_on and len(found) > 1
    )
