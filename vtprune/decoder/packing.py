"""The tokens that a routed decoder layer computes: taken out, and put back among those that skipped it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vtprune.method.answers import Routes
from vtprune.tensors.compaction import gather_tokens, places_of


@dataclass(frozen=True)
class StillRead:
    """The tokens that skip a routed layer and are read by those that it computes.

    columns: (B, s) where they stand among all tokens (B, n), -1 padding; order: (B, n) where each of all stands in the
    row of those that are computed (B, m), padding before them, and of these (B, s) behind, or None where one row has
    no padding.
    """

    columns: Tensor
    order: Tensor | None

    @classmethod
    def of(cls, computed: Tensor, counts: Sequence[int]) -> StillRead:
        """Of a layer that computes the tokens `computed` (B, n), `counts` (B,) of them."""
        width = computed.shape[1]
        skipped, left = ~computed, [width - count for count in counts]
        if len(counts) == 1:
            return cls(places_of(skipped, left), None)
        most, own, others = max(counts), computed.cumsum(dim=1) - 1, skipped.cumsum(dim=1) - 1
        if min(counts) < most:
            # Each part of a shorter row has its padding in front.
            count = torch.tensor(counts, device=computed.device)[:, None]
            own, others = own + most - count, others + max(left) - (width - count)
        return cls(places_of(skipped, left), torch.where(computed, own, most + others))


@dataclass(frozen=True)
class Packed:
    """The tokens that a routed layer computes, taken out of a batch.

    states: (B, n, D) all tokens before the layer; columns: (B, m) where the computed ones stand among them, -1
    padding, or None for all; gate: (B, m) what the output of the layer's MLP is multiplied by, or None; read: the
    others, where the layer has keys and values of theirs.
    """

    states: Tensor
    routes: Routes
    columns: Tensor | None
    gate: Tensor | None
    read: StillRead | None = None

    @classmethod
    def of(cls, states: Tensor, routes: Routes) -> Packed:
        """Packs what `routes` keeps of (B, n, D) states."""
        counts, columns = routes.counts, routes.columns
        if columns is None and routes.kept is not None:
            kept = routes.kept.detach()
            if counts is None:
                found: list[int] = kept.sum(dim=1).tolist()
                counts = tuple(found)
            columns = places_of(kept, counts) if min(counts) < states.shape[1] else None
        elif columns is not None and columns.shape[1] == states.shape[1]:
            columns = None
        if columns is None:
            return cls(states, routes, None, routes.gate)
        gate = None if routes.gate is None else gather_tokens(routes.gate, columns)
        counts = counts or (columns.shape[1],) * len(columns)
        read = StillRead.of(routes.computed(states).mask, counts) if routes.read else None
        return cls(states, routes, columns, gate, read=read)

    @property
    def inside(self) -> Tensor:
        """(B, m, D) what the layer computes."""
        return self.states if self.columns is None else gather_tokens(self.states, self.columns)

    @property
    def empty(self) -> bool:
        """Whether no row has a token for the layer."""
        return self.columns is not None and self.columns.shape[1] == 0

    def unpack(self, computed: Tensor) -> Tensor:
        """(B, n, D) after the layer, which made (B, m, D) `computed` of what it was given."""
        routes, columns = self.routes, self.columns
        if columns is not None and not self.empty and (len(columns) == 1 or routes.columns is not None):
            return self._put_back(computed, columns)
        if columns is not None and not self.empty:
            assert routes.kept is not None
            kept = routes.kept
            # The columns of a row are its kept tokens in order, after its padding.
            order = kept.cumsum(dim=1) - 1 + (columns < 0).sum(dim=1, keepdim=True)
            computed = gather_tokens(computed, order.clamp(min=0))
        elif self.empty:
            computed = self.states
        if routes.branch is not None:
            computed = self.states + routes.branch[..., None].to(computed) * (computed - self.states)
        if columns is None:
            return computed
        skipped = self.states if routes.scale is None else self.states * routes.scale[..., None].to(self.states)
        return torch.where(routes.computed(self.states).mask[..., None], computed, skipped)

    def _put_back(self, computed: Tensor, columns: Tensor) -> Tensor:
        """The same for columns (B, m) without padding."""
        routes, states = self.routes, self.states
        if routes.branch is not None:
            before = gather_tokens(states, columns)
            branch = routes.branch.gather(1, columns)[..., None].to(computed)
            computed = before + branch * (computed - before)
        skipped = states if routes.scale is None else states * routes.scale[..., None].to(states)
        if len(columns) == 1:
            # What was made here may be written into.
            own = skipped is not states
            return (skipped.index_copy_ if own else skipped.index_copy)(1, columns[0], computed)
        return skipped.scatter(1, columns[..., None].expand_as(computed), computed)
