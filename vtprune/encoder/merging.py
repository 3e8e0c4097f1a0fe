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


def add_rows(states: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """The same, from the `rows` that each one is added to (`rows_of`)."""
    shape = (-1, *(1,) * (states.ndim - 1))
    whole = at_least_single(states)
    # What goes nowhere goes to an extra row.
    summed = whole.new_zeros(len(states) + 1, *states.shape[1:])
    return summed.index_add(0, rows, whole * weights.to(whole).view(shape))[:-1].to(states.dtype)


def rows_of(into: Tensor) -> Tensor:
    """(M,) the row that each token flows to, one after the last for -1."""
    return torch.where(into < 0, into.numel(), into)


def check_selection(selection: EncoderSelection, valid: Tensor, method: str) -> None:
    """Raises VTPruneError unless every kept token of (B, N) flows into itself and every other one into a kept one
    or nowhere. The token in whose place CLS stands may flow into another one."""
    column = torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
    keep, into = selection.keep & valid, selection.into
    reached = keep.gather(1, into.clamp(min=0)) | (into < 0)
    elsewhere = keep & (into != column)
    if selection.cls is not None:
        elsewhere &= column != selection.cls[:, None]
    if bool(elsewhere.any()) or not bool((reached | ~valid).all()):
        raise VTPruneError(f"{method}: kept tokens flow into themselves, all others into a kept token or nowhere")


@dataclass
class Origins:
    """Where the tokens of a batch of whole images are now.

    column: (B, T) the column of the alive tokens that holds each original token, -1 if it is gone; share: (B, T)
    the weight that it has there; layer: (B,) the encoder layer of each image's last merge; nameless: (B, T) tokens in
    whose place CLS stands, so that no other column may be called after them; whole: whether nothing is gone.
    """

    column: Tensor
    share: Tensor
    layer: Tensor
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
        return cls(column, share, none[:, 0], none.bool(), whole=column.shape == alive.shape)

    def follow(self, selection: EncoderSelection, order: Tensor, layer: int, *, merges: bool) -> None:
        """Takes note of a selection whose tokens go on in the columns `order` (B, N')."""
        if selection.lossless and self.whole:
            self.share = self.share * selection.weights.gather(1, self.column)
            moved = selection.into.gather(1, self.column)
            assert selection.counts is not None
            fewer = [count < selection.into.shape[1] for count in selection.counts]
            if any(fewer):
                self.layer = self.layer.masked_fill(torch.tensor(fewer, device=self.layer.device), layer)
            inverse = torch.empty_like(selection.into)
            inverse.scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
            self.column = inverse.gather(1, moved)
            return
        self.whole = False
        held, at = self.column >= 0, self.column.clamp(min=0)
        if selection.cls is not None:
            self.nameless = self.nameless | (held & (self.column == selection.cls[:, None]))
        moved = selection.into.gather(1, at)
        self.share = torch.where(held, self.share * selection.weights.gather(1, at), self.share)
        # Columns that nothing goes on in map to -1.
        inverse = torch.full_like(selection.into, -1)
        inverse.scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
        gone = ~held | (moved < 0)
        merged = (~gone & (moved != self.column)).any(dim=1)
        self.column = inverse.gather(1, moved.clamp(min=0)).masked_fill(gone, -1)
        if merges:
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
        if self.selection is not None:
            flat = add_rows(states.flatten(0, 1), self._rows, self.selection.weights.flatten())
            states = flat.unflatten(0, (batch, tokens))
            if self.cls is not None and self.selection.cls is not None:
                rows, at = torch.arange(batch, device=states.device), self.selection.cls.clamp(min=0)
                stands = (self.selection.cls >= 0)[:, None]
                states = states.index_put((rows, at), torch.where(stands, self.cls.to(states), states[rows, at]))
        return gather_tokens(states, self.order)

    @cached_property
    def _rows(self) -> Tensor:
        assert self.selection is not None
        if self.selection.lossless and len(self.selection.into) == 1:
            return self.selection.into[0]
        return rows_of(flat_columns(self.selection.into))

    def spread(self, states: Tensor, tokens: int) -> Tensor:
        """(B, N', D) back to (B, N, D): every token gets the row of the token that it flowed into."""
        return gather_tokens(states, self.columns(tokens))

    def columns(self, tokens: int) -> Tensor:
        """(B, N) the column in which each token goes on."""
        order = self.order
        column = torch.arange(order.shape[1], device=order.device).expand_as(order)
        inverse = order.new_zeros(order.shape[0], tokens).scatter_(1, order, column)
        if self.selection is None:
            return inverse
        into = self.selection.into
        if self.selection.lossless:
            return inverse.gather(1, into)
        own = torch.arange(tokens, device=order.device).expand_as(inverse)
        return inverse.gather(1, torch.where(into < 0, own, into))


def flat_columns(into: Tensor) -> Tensor:
    """(B * N,) rows of the flattened batch that the columns of (B, N) name; -1 stays."""
    first = torch.arange(into.shape[0], device=into.device)[:, None] * into.shape[1]
    return torch.where(into < 0, into, into + first).flatten()
