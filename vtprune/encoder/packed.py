"""Images of any size packed into one window-ordered sequence, as Qwen's vision towers take them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from einops import rearrange, repeat
from numpy.typing import NDArray
from torch import Tensor

from vtprune.encoder.encoding import Call, Encoding
from vtprune.encoder.merging import Averaging, Zeros, add_rows
from vtprune.method.answers import EncoderSelection, Means
from vtprune.tensors.attention import at_least_single
from vtprune.tensors.rotary import rotate
from vtprune.tensors.taps import tapped

# The argument that carries the bias of merged patches to the tower's attention.
SIZE_BIAS = "vtprune_size_bias"
# What is made of arguments that a tower's blocks share is kept for as many of them at a time.
SHARED = 4


class GroupChange:
    """What happens to the merge groups of a sequence: group i is added to into[i] (-1: nowhere) with weights[i]
    (None: nothing flows), then only `stay` (S',), ascending, go on; means: (S,) what each group stands for, and (S',)
    what the means do that groups become, where all flow into those that stay, in place of `weights`; zeros: what
    these are summed up in."""

    def __init__(
        self,
        groups: int,
        stay: NDArray[np.int64],
        into: NDArray[np.int64] | None = None,
        weights: Tensor | None = None,
        *,
        device: torch.device,
        means: tuple[Tensor, Tensor] | None = None,
        zeros: Zeros | None = None,
    ) -> None:
        self._groups, self._stays, self._goes, self._device = groups, stay, into, device
        self._weights, self._means, self._zeros = weights, means, zeros
        self._stay = torch.from_numpy(stay).to(device)
        self._rows: Tensor | None = None
        if into is not None and means is None:
            self._rows = torch.from_numpy(np.where(into < 0, groups, into)).to(device)

    @property
    def averages(self) -> bool:
        """Whether groups become means of one another."""
        return self._means is not None

    def apply(self, groups: Tensor) -> Tensor:
        """(S, g, D) to (S', g, D)."""
        if self._means is not None and self._zeros is not None:
            whole = at_least_single(groups)
            sizes, sums = (one[:, None, None].to(whole) for one in self._means)
            summed = self._zeros.take(whole, len(sums))
            return (summed.index_add_(0, self._back.to(groups.device), whole * sizes) / sums).to(groups.dtype)
        if self._rows is not None and self._weights is not None:
            groups = add_rows(groups, self._rows.to(groups.device), self._weights)
        return groups.index_select(0, self._stay.to(groups.device))

    def spread(self, groups: Tensor) -> Tensor:
        """(S', g, D) back to (S, g, D): every group gets the row of the group that it flowed into."""
        return groups.index_select(0, self._back.to(groups.device))

    @cached_property
    def _back(self) -> Tensor:
        place = np.zeros(self._groups, dtype=np.int64)
        place[self._stays] = np.arange(len(self._stays))
        if self._goes is not None:
            place = place[np.where(self._goes < 0, np.arange(self._groups), self._goes)]
        return torch.from_numpy(place).to(self._device)


@dataclass(frozen=True)
class Cut:
    """How a block's inputs differ from the output of the one before: what changes, which groups of the whole
    sequence are alive, ascending (None: all), the rows of their patches, and what attention adds to the logits of
    each patch (None: nothing), which is made of that of each token, sizes (B, N)."""

    change: GroupChange | None
    alive: NDArray[np.int64] | None
    rows: Tensor | None
    bias: Tensor | None
    sizes: Tensor | None


class PackedEncoding(Encoding):
    """Images of any size packed into one (S, D) sequence in window order, whole merge groups dropping out.

    `order` is the raster index of the merge group at each place of the sequence (over all images), as the
    tower's window permutation put it there. It lives on the host, as does everything that follows from which groups
    are alive: where the windows end depends on it, so that a drop is read back, once.
    """

    def __init__(self, *args: Any, order: Tensor, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._order: NDArray[np.int64] = order.numpy()
        # Of each image: the raster index of its first token, and its tokens alive.
        self._first = list(itertools.accumulate(self.totals, initial=0))[:-1]
        self._tokens: list[NDArray[np.int64]] = [np.arange(total) for total in self.totals]
        # The places of the whole sequence that are alive, None for all of them.
        self._alive: NDArray[np.int64] | None = None
        self._rows: Tensor | None = None
        self._where()
        self._change: GroupChange | None = None
        self._cuts: dict[int, Cut] = {}
        self._inside: dict[int, GroupChange] = {}
        # Arguments that blocks share, what a cut made of them; boundaries that were read back, and cut ones.
        self._made: list[tuple[Any, Any, Any]] = []
        self._read: list[tuple[Any, NDArray[np.int64]]] = []
        self._written: list[tuple[Any, NDArray[np.int64]]] = []

    def states(self, kwargs: dict[str, Any], places: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        split = rearrange(tapped(self.taps, "qkv"), "s (three h d) -> three h s d", three=3, h=self.heads)
        cos, sin = (part.float() for part in kwargs["position_embeddings"])
        query, key = rotate(split[0].float(), cos, sin), rotate(split[1].float(), cos, sin)
        places = self._places if places is None else places
        dtype = split.dtype
        return self._pick(query.to(dtype), places), self._pick(key.to(dtype), places), self._pick(split[2], places)

    def layout(self) -> Tensor | None:
        return self._places

    def key_bias(self, index: int) -> Tensor | None:
        bias = self._cuts[index].sizes
        return None if bias is None else repeat(bias, "b n -> b (n g)", g=self.group)

    def hidden(self, states: Tensor) -> Tensor:
        return self._pick(states[None], self._places)[:, 0]

    def _where(self) -> None:
        """Finds where each token alive stands among the groups of the sequence now, (B, N), 0 for padding, and which
        entry of (B * N,) stands at each place."""
        raster = self._order if self._alive is None else self._order[self._alive]
        place = np.zeros(len(self._order), dtype=np.int64)
        place[raster] = np.arange(len(raster))
        width = max(map(len, self._tokens))
        self._stands = np.zeros((len(self._tokens), width), dtype=np.int64)
        self._entry = np.zeros(len(raster), dtype=np.int64)
        for row, (first, tokens) in enumerate(zip(self._first, self._tokens, strict=True)):
            own = place[tokens + first]
            self._stands[row, : len(own)] = own
            self._entry[own] = row * width + np.arange(len(own))
        self._places = torch.from_numpy(self._stands).to(self.valid.device)

    def _in_sequence(self, values: Tensor) -> Tensor:
        """(S,) the values (B, N) of the tokens alive, each at its group's place."""
        return values.flatten().index_select(0, torch.from_numpy(self._entry).to(values.device))

    def _pick(self, states: Tensor, places: Tensor) -> Tensor:
        """(H, S * g, d) to (B, H, N * g, d)."""
        groups = rearrange(states, "h (s g) d -> h s g d", g=self.group).index_select(1, places.flatten())
        return rearrange(groups, "h (b n) g d -> b h (n g) d", b=len(places))

    def compact(self, selection: EncoderSelection, cls: Tensor | None) -> None:
        if not selection.flows:
            self._cut(selection.keep.cpu().numpy())
            return
        # What is kept flows into itself: one transfer says both.
        both = torch.stack([selection.keep, selection.targets]).cpu().numpy()
        self._cut(both[0].astype(bool), both[1], weights=self._in_sequence(selection.shares.float()))

    def average(self, change: Averaging, means: Means) -> None:
        both = torch.stack([means.keep, means.landing[:, 1:]]).cpu().numpy()
        keep = both[0].astype(bool)
        order = np.nonzero(keep)[1].reshape(len(keep), -1)
        sizes = self._in_sequence(self.sizes)
        self._cut(keep, np.take_along_axis(order, both[1] - 1, axis=1), means=(sizes, change.sums[:, 1:]))

    def _cut(
        self,
        keep: NDArray[np.bool_],
        into: NDArray[np.int64] | None = None,
        *,
        weights: Tensor | None = None,
        means: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Only what `keep` (B, N) says goes on, after everything flowed `into` (B, N) where; weights: (S,) of each
        group; means: (S,) sizes of each, and (B, N') those of the means that they become."""
        goes = None
        if into is not None:
            goes = np.full(len(self._entry), -1, dtype=np.int64)
            for row, count in enumerate(self.counts):
                stands, target = self._stands[row], into[row, :count]
                goes[stands[:count]] = np.where(target < 0, -1, stands[np.maximum(target, 0)])
        stays = np.zeros(len(self._entry), dtype=bool)
        for row, count in enumerate(self.counts):
            stays[self._stands[row, :count]] = keep[row, :count]
            self._tokens[row] = self._tokens[row][keep[row, :count]]
        stay = np.flatnonzero(stays)
        self._alive = stay if self._alive is None else self._alive[stay]
        rows = self._alive[:, None] * self.group + np.arange(self.group)
        self._rows = torch.from_numpy(rows.ravel()).to(self.valid.device)
        self._where()
        # The sequence is that of the groups that are left now.
        ends = None if means is None else (means[0], self._in_sequence(means[1]))
        self._change = GroupChange(
            len(stays), stay, goes, weights, device=self.valid.device, means=ends, zeros=self._zeros
        )

    def layer_inputs(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        if index not in self._cuts:
            change, self._change = self._change, None
            sizes = self.size_bias()
            bias = None if sizes is None else self._in_sequence(sizes).repeat_interleave(self.group)
            self._cuts[index] = Cut(change, self._alive, self._rows, bias=bias, sizes=sizes)
        cut = self._cuts[index]
        states, self._sum = None if cut.change is None else self.added(args[0]), None
        if states is None:
            states = self._apply(cut.change, args[0])
        if cut.alive is None:
            return (states, *args[1:]), kwargs
        kwargs = dict(kwargs)
        kwargs["cu_seqlens"] = self._once(kwargs["cu_seqlens"], cut, self._segments)
        kwargs["position_embeddings"] = self._once(kwargs["position_embeddings"], cut, _rows)
        if kwargs.get("max_seqlen") is not None:
            kwargs["max_seqlen"] = int(np.diff(self._boundaries(kwargs["cu_seqlens"])).max())
        if cut.bias is not None:
            kwargs[SIZE_BIAS] = cut.bias
        return (states, *args[1:]), kwargs

    def _once(self, shared: Any, cut: Cut, make: Callable[[Any, Cut], Any]) -> Any:
        """What a cut makes of an argument that blocks share, made for the first of them."""
        for whole, alive, found in self._made:
            if whole is shared and alive is cut.alive:
                return found
        found = make(shared, cut)
        self._made = [*self._made[1 - SHARED :], (shared, cut.alive, found)]
        return found

    def _apply(self, change: GroupChange | None, states: Tensor) -> Tensor:
        return states if change is None else self._ungroup(change.apply(self._groups(states)))

    def _groups(self, states: Tensor) -> Tensor:
        return rearrange(states, "(s g) d -> s g d", g=self.group)

    def _ungroup(self, groups: Tensor) -> Tensor:
        return rearrange(groups, "s g d -> (s g) d")

    def _segments(self, boundaries: Tensor, cut: Cut) -> Tensor:
        """Cumulative segment lengths without the dropped patches; a segment left empty goes."""
        assert cut.alive is not None
        # As many groups stand before a boundary now as are alive of those that did.
        ends = np.searchsorted(cut.alive, self._boundaries(boundaries) // self.group) * self.group
        ends = np.unique(ends)
        found = torch.from_numpy(ends).to(boundaries)
        self._written = [*self._written[1 - SHARED :], (found, ends)]
        return found

    def _boundaries(self, boundaries: Tensor) -> NDArray[np.int64]:
        """The same on the host. Blocks of one kind share their boundaries: each is read back once."""
        for known, found in (*self._read, *self._written):
            if known is boundaries:
                return found
        found = boundaries.cpu().numpy().astype(np.int64)
        self._read = [*self._read[1 - SHARED :], (boundaries, found)]
        return found

    def open_mlp(self, index: int, states: Tensor) -> None:
        self._note_mlp(index)
        if self._change is not None:
            # The block's own output is still of the old length: the next block changes it once more.
            self._inside[index] = self._change

    def averages(self, index: int) -> bool:
        return index in self._inside and self._inside[index].averages

    def mlp_input(self, index: int, states: Tensor) -> Tensor:
        return self._apply(self._inside.get(index), states)

    def mlp_output(self, index: int, states: Tensor) -> Tensor:
        if index not in self._inside:
            return states
        return self._ungroup(self._inside[index].spread(self._groups(states)))

    def projector_input(self, states: Tensor) -> Tensor:
        added = self.added(states)
        return self._apply(self._change, states) if added is None else added

    def projector_output(self, states: Tensor) -> Tensor:
        if not self.dropped:
            return states
        full = states.new_zeros(len(self._order), *states.shape[1:])
        if self.origins is None:
            assert self._alive is not None
            at = torch.from_numpy(self._alive)
        else:
            place = np.empty_like(self._order)
            place[self._order] = np.arange(len(place))
            first = torch.tensor(self._first, device=self.valid.device)[:, None]
            at = torch.from_numpy(place).to(first.device)[self._in_sequence(self.names() + first)]
        return full.index_copy(0, at.to(states.device), states)

    def layer_segments(self, kwargs: dict[str, Any]) -> list[list[int]]:
        ends = self._boundaries(kwargs["cu_seqlens"])
        limits = np.cumsum([0, *self.counts]) * self.group
        image = np.searchsorted(limits, ends[1:]) - 1
        lengths = np.diff(ends)
        return [lengths[image == own].tolist() for own in range(len(self.grids))]


def _rows(parts: tuple[Tensor, ...], cut: Cut) -> tuple[Tensor, ...]:
    """Position embeddings (S, d) of the patches alive."""
    assert cut.rows is not None
    return tuple(part.index_select(0, cut.rows.to(part.device)) for part in parts)
