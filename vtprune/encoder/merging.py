"""Pure functions for tokens that flow together inside the encoder, and the record of where each one went."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from vtprune.errors import VTPruneError
from vtprune.method.answers import EncoderSelection, Merge
from vtprune.tensors.attention import at_least_single, rows_at_once
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


class Blanks:
    """Tensors (B, n) that are alike in each of so many layers, to be written into: filled for all of them at once."""

    def __init__(self, made: Callable[[], Tensor]) -> None:
        self._made, self._left = made, list[Tensor]()

    def take(self, width: int) -> Tensor:
        """One of them, its first `width` columns."""
        if not self._left:
            self._left = list(self._made())
        return self._left.pop()[:, :width]


class Zeros:
    """Zeros (n, ...) that sums of states are made in, layer by layer: as many at once as memory can spare; alone: each
    by itself, as gradients need them, of which nothing may be written into that lies beside them."""

    def __init__(self, layers: int, *, alone: bool) -> None:
        self._layers, self._alone, self._left = layers, alone, list[Tensor]()

    def take(self, like: Tensor, count: int) -> Tensor:
        """(count, ...) zeros, each like one of `like` (n, ...)."""
        if self._alone:
            return like.new_zeros(count, *like.shape[1:])
        fits = self._left and self._left[-1].dtype == like.dtype and self._left[-1].shape[1:] == like.shape[1:]
        if not fits or len(self._left[-1]) < count:
            several = min(self._layers, rows_at_once(like.device, count * like.shape[1:].numel()))
            self._left = list(like.new_zeros(several, count, *like.shape[1:]))
        return self._left.pop()[:count]


class Origins:
    """Where the tokens of a batch of whole images are now.

    column: (B, T) the column of the alive tokens that holds each original token, -1 if it is gone; share: (B, T) the
    weight that it has there; layer: (B,) the encoder layer of each image's last merge, or one int for all; nameless:
    (B, T) tokens that no column may be called after: those in whose place CLS stands, and those that flowed into one
    that keeps its name; whole: whether nothing is gone. Means that are made in one layer after another are noted, and
    looked through together when somebody asks.
    """

    def __init__(self, column: Tensor) -> None:
        """column: of tokens that are all alive, each in its own place."""
        self._column, self._token = column, column
        # None: all alone.
        self._share: Tensor | None = None
        self.layer: Tensor | int = 0
        # None: none.
        self.nameless: Tensor | None = None
        self.whole = True
        # Whether all that a column holds has the same share, and a token stood in each place in the beginning.
        self._equal = True
        self._averaged: list[Averaging] = []

    @classmethod
    def start(cls, alive: Tensor, valid: Tensor, width: int) -> Origins:
        """Every token that is alive in a column of its own; alive, valid: (B, N); width: T."""
        column = torch.full((alive.shape[0], width + 1), -1, device=alive.device)
        places = alive.masked_fill(~valid, width)
        column.scatter_(1, places, torch.arange(alive.shape[1], device=alive.device).expand_as(places))
        found = cls(column[:, :-1])
        found._token = torch.arange(width, device=alive.device).expand_as(found._column)
        found._equal = found.whole = False
        return found

    @property
    def column(self) -> Tensor:
        self._look_through()
        return self._column

    @property
    def share(self) -> Tensor:
        self._look_through()
        if self._share is None:
            self._share = torch.ones(self._column.shape, device=self._column.device)
        return self._share

    def average(self, change: Averaging, layer: int) -> None:
        """Takes note of tokens that become means of one another."""
        self._averaged.append(change)
        self.layer = layer

    def _look_through(self) -> None:
        """Finds where tokens stand after the means that were noted."""
        changes, self._averaged = self._averaged, []
        if not changes:
            return
        start, share = self._column, self._share
        held = None if self.whole else start >= 0
        at = start if held is None else start.clamp(min=0)
        column = through([change.landing for change in changes], changes[-1].sums.shape[1])
        if start is not self._token:
            column = column.gather(1, at)
        if changes[0].sizes is not None:
            before = changes[0].sizes[:, 1:].gather(1, at)
            share = before if share is None else share * before
        sums = changes[-1].sums[:, 1:].gather(1, column)
        self._share = sums.reciprocal() if share is None else share / sums
        # What is gone keeps its last share, which nobody asks for.
        self._column = column if held is None else column.masked_fill(~held, -1)

    def follow(self, selection: EncoderSelection, layer: int, *, merges: bool) -> None:
        """Takes note of any other selection, whose counts are known."""
        share = self.share
        self._equal = False
        if selection.lossless and self.whole:
            if selection.cls is not None:
                self._withhold(self._column == selection.cls[:, None])
            if selection.keeps_names:
                self._withhold(selection.targets.gather(1, self._column) != self._column)
            self._share = share * selection.shares.gather(1, self._column)
            assert selection.counts is not None
            fewer = [count < selection.targets.shape[1] for count in selection.counts]
            if any(fewer):
                self._note_layer(None if all(fewer) else torch.tensor(fewer, device=self._column.device), layer)
            self._column = selection.landed.gather(1, self._column)
            return
        self.whole = False
        held, at = self._column >= 0, self._column.clamp(min=0)
        if selection.cls is not None:
            self._withhold(held & (self._column == selection.cls[:, None]))
        moved = selection.targets.gather(1, at)
        if selection.keeps_names:
            self._withhold(moved != at)
        self._share = torch.where(held, share * selection.shares.gather(1, at), share)
        # Columns that nothing goes on in map to -1.
        order = selection.order
        inverse = torch.full_like(selection.targets, -1)
        inverse.scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
        gone = ~held | (moved < 0)
        merged = (~gone & (moved != self._column)).any(dim=1)
        self._column = inverse.gather(1, moved.clamp(min=0)).masked_fill(gone, -1)
        if merges:
            self._note_layer(merged, layer)

    def _withhold(self, names: Tensor) -> None:
        """Has no column be called after these tokens (B, T)."""
        self.nameless = names if self.nameless is None else self.nameless | names

    def _note_layer(self, merged: Tensor | None, layer: int) -> None:
        """Notes that the images `merged` (B,), None for all, merged in a layer."""
        if merged is None:
            self.layer = layer
            return
        if isinstance(self.layer, int):
            self.layer = torch.full(merged.shape, self.layer, device=merged.device)
        self.layer = self.layer.masked_fill(merged, layer)

    @property
    def complete(self) -> bool:
        """Whether every column has a token that it may be called after."""
        return self.whole and self.nameless is None

    def heaviest(self, width: int, alive: Tensor | None) -> Tensor:
        """(B, N) the original token with the largest share in each of `width` columns; ties: the lowest. A column
        that holds none that it may be called after has its name in `alive` (B, N), None where there is no such one:
        that of CLS is called after the token in whose place it stands."""
        column, tokens = self.column, self.column.shape[1]
        first = torch.full((len(column), width), tokens, device=column.device)
        if alive is None and self._equal:
            return first.scatter_reduce_(1, column, self._token, "amin")
        at, share = column.clamp(min=0), self.share.masked_fill(column < 0, -1.0)
        share = share if self.nameless is None else share.masked_fill(self.nameless, -1.0)
        best = torch.full((len(column), width), -1.0, device=column.device)
        best.scatter_reduce_(1, at, share, "amax")
        # Equal shares may have been multiplied up in another order.
        lower = (share < best.gather(1, at) * (1 - TIE)) | (share < 0)
        first.scatter_reduce_(1, at, self._token.masked_fill(lower, tokens), "amin")
        return first if alive is None else torch.where(first < tokens, first, alive)


def through(landings: Sequence[Tensor], width: int) -> Tensor:
    """(B, N) the column behind the last of several maps in which each column of the first one ends up.

    landings: (B, 1 + N) of each map, as `Means` has it; width: 1 + N' behind the last one. All maps stand in one row,
    and behind them the columns that the last one leads to. Every entry points to one behind its own map; round by
    round it takes over where that one points to, and so looks twice as far.
    """
    widths = [landing.shape[1] for landing in landings]
    starts = np.cumsum(widths)
    # What is added to each map so that it points into the next one; the last columns point to themselves.
    ends = np.arange(starts[-1], starts[-1] + width)
    ahead = torch.from_numpy(np.concatenate([np.repeat(starts, widths), 0 * ends, ends])).to(landings[0].device)
    link = torch.cat([*landings, ahead[-width:].expand(len(landings[0]), -1)], dim=1) + ahead[:-width]
    for _ in range((len(landings) - 1).bit_length()):
        link = link.gather(1, link)
    return link[:, 1 : widths[0]] - (int(starts[-1]) + 1)


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
        return gather_tokens(states, self._columns(tokens))

    def _columns(self, tokens: int) -> Tensor:
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


@dataclass(frozen=True)
class Averaging:
    """The same where tokens become means of one another (`Means`): landing: (B, 1 + N) where each goes, counted from 1
    behind a leading 0; sizes: (B, 1 + N) what each one stands for, behind a leading 1, None for one token each; sums:
    (B, 1 + N') the same of the means; zeros: where states are summed up."""

    landing: Tensor
    sizes: Tensor | None
    sums: Tensor
    zeros: Zeros

    def apply(self, states: Tensor, *, led: bool) -> Tensor:
        """(B, N, D) to (B, N', D), or (B, 1 + N, D) to (B, 1 + N', D) where a token that lands by itself is `led` by
        all others; summed in fp32 or fp64."""
        first = 0 if led else 1
        whole, sums, (batch, width) = at_least_single(states), self.sums, self.sums.shape
        if self.sizes is not None:
            whole = whole * self.sizes[:, first:, None].to(whole)
        rows = self._rows[:, first:].flatten()
        flat = whole.flatten(0, 1)
        summed = self.zeros.take(flat, batch * width).index_add_(0, rows, flat)
        means = summed.unflatten(0, (batch, width)) / sums[..., None].to(whole)
        return means[:, first:].to(states.dtype)

    def spread(self, states: Tensor, *, led: bool) -> Tensor:
        """Back from there: every token gets the row of the mean that it is part of."""
        if not led:
            return gather_tokens(states, self.landing[:, 1:] - 1)
        return states.flatten(0, 1).index_select(0, self._rows.flatten()).unflatten(0, self.landing.shape)

    @cached_property
    def _rows(self) -> Tensor:
        """(B, 1 + N) the same, counted through all rows of the batch."""
        batch, width = self.sums.shape
        if batch == 1:
            return self.landing
        return self.landing + torch.arange(0, batch * width, width, device=self.landing.device)[:, None]


def flat_columns(into: Tensor, width: int | None = None) -> Tensor:
    """(B * N,) rows of a flattened batch of so many columns a row (None: N) that the columns of (B, N) name; -1
    stays."""
    first = torch.arange(into.shape[0], device=into.device)[:, None] * (into.shape[1] if width is None else width)
    return torch.where(into < 0, into, into + first).flatten()
