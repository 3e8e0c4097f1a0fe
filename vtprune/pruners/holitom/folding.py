"""Tokens that flow, one after the other, half and half into the most similar one of those that stay."""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune.method.answers import Merge, Selection
from vtprune.method.choosing import top
from vtprune.pruners.parts.cosines import unit_vectors
from vtprune.tensors.attention import at_least_single


def fold(states: Tensor, scores: Tensor, count: int) -> Selection:
    """The `count` best of (N, D) states by scores (N,) stay; each of the others flows into the one of them that it is
    most alike to by its cosine.

    What flows into the same one does so in order, and each time both have equal weights: of n that do, the k-th has a
    share of 2 ** (k - 1 - n), and what was there before one of 2 ** -n.
    """
    kept = top(scores, count).to(states.device)
    stays = torch.zeros(states.shape[0], dtype=torch.bool, device=states.device).index_fill_(0, kept, True)
    # The tokens that go, in order: sorted behind those that stay.
    gone = stays.long().sort(stable=True).indices[: states.shape[0] - count]
    vectors = unit_vectors(states.detach(), None)
    into = (vectors.index_select(0, gone) @ vectors.index_select(0, kept).T).argmax(dim=1)
    joins = into == torch.arange(count, device=states.device)[:, None]
    # How many flow in from each one on.
    later = joins.flip(1).cumsum(dim=1).flip(1)
    shares = torch.where(joins, 0.5 ** later.double(), 0.0)
    own = 0.5 ** joins.sum(dim=1).double()

    def mix(values: Tensor) -> Tensor:
        """(N, D) values of the tokens to (count, D) of those that stay."""
        wide = at_least_single(values)
        mixed = wide.index_select(0, kept) * own.to(wide)[:, None] + shares.to(wide) @ wide.index_select(0, gone)
        return mixed.to(values.dtype)

    def merges() -> tuple[Merge, ...]:
        """What flowed where, in raster order."""
        found, left = [], gone.tolist()
        for token, before, row in zip(kept.tolist(), own.tolist(), shares.tolist(), strict=True):
            pairs = [(token, before), *[(one, share) for one, share in zip(left, row, strict=True) if share]]
            if len(pairs) > 1:
                members, weights = zip(*sorted(pairs), strict=True)
                found.append(Merge(token, members, weights))
        return tuple(found)

    return Selection(kept, mix(states), merges, sound=True, mix=mix)
