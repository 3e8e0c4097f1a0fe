"""Pure functions for tokens that flow together inside the encoder, and the record of where each one went."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vtprune.errors import VTPruneError
from vtprune.method.answers import EncoderSelection, Merge
from vtprune.tensors.attention import at_least_single
from vtprune.tensors.compaction import gather_tokens

TIE = 1e-5


def flow_together(states: Tensor, into: Tensor, weights: Tensor) -> Tensor:
    """(M, ...) states after row i was added to row into[i] (-1: nowhere) with weights[i], summed in fp32 or fp64."""
    return add_rows(states, rows_of(into), weights)


def add_rows(states: Tensor, rows: Tensor, weights: Tensor, *, count: int | None = None) -> Tensor:
    """(count, ...) the same, from the `rows` (M,) that each one is added to (`rows_of`); None: as many as there are,
    and what goes nowhere goes to an extra one."""
    shape = (-1, *(1,) * (states.ndim - 1))
    whole = at_least_single(states)
    summed = whole.new_zeros(len(states) + 1 if count is None else count, *states.shape[1:])
    summed = summed.index_add(0, rows, whole * weights.to(whole).view(shape))
    return (summed[:-1] if count is None else summed).to(states.dtype)


def rows_of(into: Tensor) -> Tensor:
    """(M,) the row that each token flows to, one after the last for -1."""
    return torch.where(into < 0, into.numel(), into)


def check_selection(selection: EncoderSelection, valid: Tensor, method: str) -> None:
    """Raises VTPruneError unless every kept token of (B, N) flows into itself and every other one into a kept one
    or nowhere. The token in whose place CLS stands may flow into another one."""
    column = torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
    keep, into = selection.keep & valid, selection.targets
    reached = keep.gather(1, into.clamp(min=0)) | (into < 0)
    elsewhere = keep & (into != column)
    if selection.cls is not None:
        elsewhere &= column != selection.cls[:, None]
    if bool(elsewhere.any()) or not bool((reached | ~valid).all()):
        raise VTPruneError(f"{method}: kept tokens flow into themselves, all others into a kept token or nowhere")


@dataclass
class Origins:
    """Where the tokens of a batch of whole images are now.

    column: (B, T) the column of the alive tokens that holds each original token, -1 if it is gone; share: (B, T) the
    weight that it has there; layer: (B,) the encoder layer of each image's last merge, or one int for all; nameless:
    (B, T) tokens that no column may be called after: those in whose place CLS stands, and those that flowed into one
    that keeps its name; whole: whether nothing is gone.
    """

    column: Tensor
    share: Tensor
    layer: Tensor | int
    nameless: Tensor
    whole: bool = False

    @classmethod
    def start(cls, alive: Tensor, valid: Tensor, width: int) -> Origins:
        """Every token that is alive in a column of its own; alive, valid: (B, N); width: T."""
        column = torch.full((alive.shape[0], width + 1), -1, device=alive.device)
        places = alive.masked_fill(~valid, width)
        column.scatter_(1, places, torch.arange(alive.shape[1], device=alive.device).expand_as(places))
        column = column[:, :-1]
        share, none = torch.ones(column.shape, device=alive.device), torch.zeros_like(column)
        return cls(column, share, 0, none.bool(), whole=column.shape == alive.shape)

    def follow(self, selection: EncoderSelection, order: Tensor, layer: int, *, merges: bool) -> None:
        """Takes note of a selection whose tokens go on in the columns `order` (B, N')."""
        if selection.lossless and self.whole:
            if selection.cls is not None:
                self.nameless = self.nameless | (self.column == selection.cls[:, None])
            if selection.keeps_names:
                self.nameless = self.nameless | (selection.targets.gather(1, self.column) != self.column)
            self.share = self.share * selection.shares.gather(1, self.column)
            assert selection.counts is not None
            fewer = [count < selection.targets.shape[1] for count in selection.counts]
            if any(fewer):
                self._note_layer(None if all(fewer) else torch.tensor(fewer, device=self.column.device), layer)
            self.column = selection.landed.gather(1, self.column)
            return
        self.whole = False
        held, at = self.column >= 0, self.column.clamp(min=0)
        if selection.cls is not None:
            self.nameless = self.nameless | (held & (self.column == selection.cls[:, None]))
        moved = selection.targets.gather(1, at)
        if selection.keeps_names:
            self.nameless = self.nameless | (moved != at)
        self.share = torch.where(held, self.share * selection.shares.gather(1, at), self.share)
        # Columns that nothing goes on in map to -1.
        inverse = torch.full_like(selection.targets, -1)
        inverse.scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
        gone = ~held | (moved < 0)
        merged = (~gone & (moved != self.column)).any(dim=1)
        self.column = inverse.gather(1, moved.clamp(min=0)).masked_fill(gone, -1)
        if merges:
            self._note_layer(merged, layer)

    def _note_layer(self, merged: Tensor | None, layer: int) -> None:
        """Notes that the images `merged` (B,), None for all, merged in a layer."""
        if merged is None:
            self.layer = layer
            return
        if isinstance(self.layer, int):
            self.layer = torch.full(merged.shape, self.layer, device=merged.device)
        self.layer = self.layer.masked_fill(merged, layer)

    def heaviest(self, alive: Tensor) -> Tensor:
        """(B, N) the original token with the largest share in each column of `alive` (B, N); ties: the lowest.
        The column of CLS is called after the token in whose place it stands."""
        at, tokens = self.column.clamp(min=0), self.column.shape[1]
        best = torch.full(alive.shape, -1.0, device=alive.device)
        share = self.share.masked_fill((self.column < 0) | self.nameless, -1.0)
        best.scatter_reduce_(1, at, share, "amax")
        # Equal shares may have been multiplied up in another order.
        lower = (share < best.gather(1, at) * (1 - TIE)) | (share < 0)
        token = torch.arange(tokens, device=alive.device).expand_as(self.column)
        first = torch.full(alive.shape, tokens, device=alive.device)
        first.scatter_reduce_(1, at, token.masked_fill(lower, tokens), "amin")
        return torch.where(first < tokens, first, alive)


def merges_of(owner: Tensor, share: Tensor) -> list[Merge]:
    """The merges that an image's tokens went through: (T,) the token that holds each one, -1 for none, and its
    share there. Tokens that hold only themselves are left out."""
    groups: dict[int, list[int]] = {}
    for token, holder in enumerate(owner.tolist()):
        if holder >= 0:
            groups.setdefault(holder, []).append(token)
    weights = share.tolist()
    return [
        Merge(holder, tuple(members), tuple(weights[m] for m in members))
        for holder, members in sorted(groups.items())
        if len(members) > 1
    ]


@dataclass(frozen=True)
class Change:
    """What happens to (B, N) tokens before the next module: `selection` (None: nothing flows), then only the
    columns of `order` (B, N') go on; cls: (B, D) vectors that take the place of the columns selection.cls."""

    order: Tensor
    selection: EncoderSelection | None = None
    cls: Tensor | None = None

    def apply(self, states: Tensor) -> Tensor:
        """(B, N, D) to (B, N', D)."""
        batch, tokens = states.shape[:2]
        if self._compact:
            assert self.selection is not None
            count, shares = self.order.shape[1], self.selection.shares.flatten()
            return add_rows(states.flatten(0, 1), self._rows, shares, count=batch * count).unflatten(0, (batch, count))
        if self.selection is not None:
            flat = add_rows(states.flatten(0, 1), self._rows, self.selection.shares.flatten())
            states = flat.unflatten(0, (batch, tokens))
            if self.cls is not None and self.selection.cls is not None:
                rows, at = torch.arange(batch, device=states.device), self.selection.cls.clamp(min=0)
                stands = (self.selection.cls >= 0)[:, None]
                states = states.index_put((rows, at), torch.where(stands, self.cls.to(states), states[rows, at]))
        return gather_tokens(states, self.order)

    @property
    def _compact(self) -> bool:
        """Whether all flows into what goes on, and nothing else takes a place there."""
        return self.selection is not None and self.selection.lossless and self.selection.cls is None

    @cached_property
    def _rows(self) -> Tensor:
        assert self.selection is not None
        if not self._compact:
            return rows_of(flat_columns(self.selection.targets))
        landed = self.selection.landed
        return landed[0] if len(landed) == 1 else flat_columns(landed, self.order.shape[1])

    def spread(self, states: Tensor, tokens: int) -> Tensor:
        """(B, N', D) back to (B, N, D): every token gets the row of the token that it flowed into."""
        return gather_tokens(states, self.columns(tokens))

    def columns(self, tokens: int) -> Tensor:
        """(B, N) the column in which each token goes on."""
        order = self.order
        if self.selection is not None and self.selection.lossless:
            return self.selection.landed
        column = torch.arange(order.shape[1], device=order.device).expand_as(order)
        inverse = order.new_zeros(order.shape[0], tokens).scatter_(1, order, column)
        if self.selection is None:
            return inverse
        into = self.selection.targets
        own = torch.arange(tokens, device=order.device).expand_as(inverse)
        return inverse.gather(1, torch.where(into < 0, own, into))


def flat_columns(into: Tensor, width: int | None = None) -> Tensor:
    """(B * N,) rows of a flattened batch of so many columns a row (None: N) that the columns of (B, N) name; -1
    stays."""
    first = torch.arange(into.shape[0], device=into.device)[:, None] * (into.shape[1] if width is None else width)
    return torch.where(into < 0, into, into + first).flatten()
