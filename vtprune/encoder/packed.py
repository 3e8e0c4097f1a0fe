"""Images of any size packed into one window-ordered sequence, as Qwen's vision towers take them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

from vtprune.encoder.encoding import Call, Encoding
from vtprune.encoder.merging import flow_together
from vtprune.method.answers import EncoderSelection
from vtprune.tensors.rotary import rotate

# The argument that carries the bias of merged patches to the tower's attention.
SIZE_BIAS = "vtprune_size_bias"


@dataclass(frozen=True)
class GroupChange:
    """What happens to the merge groups of a sequence: group i is added to into[i] with weights[i] (None: nothing
    flows), then only `stay` go on."""

    stay: Tensor
    into: Tensor | None = None
    weights: Tensor | None = None

    def apply(self, groups: Tensor) -> Tensor:
        """(S, g, D) to (S', g, D)."""
        if self.into is not None and self.weights is not None:
            groups = flow_together(groups, self.into, self.weights)
        return groups[self.stay.to(groups.device)]

    def spread(self, groups: Tensor) -> Tensor:
        """(S', g, D) back to (S, g, D): every group gets the row of the group that it flowed into."""
        place = (self.stay.cumsum(0) - 1).clamp(min=0)
        if self.into is not None:
            own = torch.arange(place.numel(), device=place.device)
            place = place[torch.where(self.into < 0, own, self.into)]
        return groups[place.to(groups.device)]


@dataclass(frozen=True)
class Cut:
    """How a block's inputs differ from the output of the one before: what changes, which groups of the whole
    sequence are alive, and what attention adds to the logits of each of these (None: nothing)."""

    change: GroupChange | None
    alive: Tensor
    bias: Tensor | None


class PackedEncoding(Encoding):
    """Images of any size packed into one (S, D) sequence in window order, whole merge groups dropping out.

    `order` is the raster index of the merge group at each place of the sequence (over all images), as the
    tower's window permutation put it there.
    """

    def __init__(self, *args: Any, order: Tensor, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._order = order
        self._full = torch.ones_like(order, dtype=torch.bool)
        self._first = pad(self.total.cumsum(0), (1, 0))[:-1]
        self._alive = self._full
        self._change: GroupChange | None = None
        self._cuts: dict[int, Cut] = {}
        self._inside: dict[int, GroupChange] = {}
        # Blocks of one kind share their boundaries; reading them off once spares a transfer from the device.
        self._listed: tuple[Any, list[list[int]]] = (None, [])

    def states(self, kwargs: dict[str, Any], places: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        split = rearrange(self.taps["qkv"], "s (three h d) -> three h s d", three=3, h=self.heads)
        cos, sin = (part.float() for part in kwargs["position_embeddings"])
        query, key = rotate(split[0].float(), cos, sin), rotate(split[1].float(), cos, sin)
        places = self._places() if places is None else places
        dtype = split.dtype
        return self._pick(query.to(dtype), places), self._pick(key.to(dtype), places), self._pick(split[2], places)

    def layout(self) -> Tensor | None:
        return self._places()

    def hidden(self, states: Tensor) -> Tensor:
        return self._pick(states[None], self._places())[:, 0]

    def _places(self) -> Tensor:
        """(B, N) where each token alive stands among the groups of the sequence now."""
        place = torch.zeros_like(self._order)
        place[self._order[self._alive]] = torch.arange(sum(self.counts), device=place.device)
        return place[(self.alive + self._first[:, None]).clamp(max=place.numel() - 1)]

    def _pick(self, states: Tensor, places: Tensor) -> Tensor:
        groups = rearrange(states, "h (s g) d -> h s g d", g=self.group)[:, places]
        return rearrange(groups, "h b n g d -> b h (n g) d")

    def compact(self, selection: EncoderSelection, order: Tensor, cls: Tensor | None) -> None:
        into = weights = None
        if selection.flows:
            places, valid = self._places(), self.valid
            count = sum(self.counts)
            goes = places.gather(1, selection.into.clamp(min=0)).masked_fill(selection.into < 0, -1)
            into = torch.full((count,), -1, device=places.device)
            into[places[valid]] = goes[valid]
            weights = torch.ones(count, device=places.device)
            weights[places[valid]] = selection.weights[valid].float()
        kept = torch.zeros_like(self._full)
        kept[(self.alive + self._first[:, None])[selection.keep]] = True
        alive = kept[self._order]
        self._change = GroupChange(alive[self._alive], into, weights)
        self._alive = alive

    def layer_inputs(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        if index not in self._cuts:
            change, self._change = self._change, None
            self._cuts[index] = Cut(change, self._alive, self._packed_bias())
        cut = self._cuts[index]
        states = self._apply(cut.change, args[0])
        if cut.alive is self._full:
            return (states, *args[1:]), kwargs
        kwargs = dict(kwargs)
        kwargs["cu_seqlens"] = self._segments(kwargs["cu_seqlens"], cut.alive)
        kwargs["position_embeddings"] = tuple(self._rows(part, cut.alive) for part in kwargs["position_embeddings"])
        if kwargs.get("max_seqlen") is not None:
            kwargs["max_seqlen"] = int(kwargs["cu_seqlens"].diff().max())
        if cut.bias is not None:
            kwargs[SIZE_BIAS] = cut.bias
        return (states, *args[1:]), kwargs

    def _packed_bias(self) -> Tensor | None:
        """(S,) what attention adds to the logits of each patch of the sequence."""
        bias = self.size_bias()
        if bias is None:
            return None
        packed = bias.new_zeros(sum(self.counts))
        packed[self._places()[self.valid]] = bias[self.valid]
        return packed.repeat_interleave(self.group)

    def _apply(self, change: GroupChange | None, states: Tensor) -> Tensor:
        return states if change is None else self._ungroup(change.apply(self._groups(states)))

    def _groups(self, states: Tensor) -> Tensor:
        return rearrange(states, "(s g) d -> s g d", g=self.group)

    def _ungroup(self, groups: Tensor) -> Tensor:
        return rearrange(groups, "s g d -> (s g) d")

    def _rows(self, states: Tensor, groups: Tensor) -> Tensor:
        return states[groups.to(states.device).repeat_interleave(self.group)]

    def _segments(self, boundaries: Tensor, alive: Tensor) -> Tensor:
        """Cumulative segment lengths without the dropped patches; a segment left empty goes."""
        counted = pad(alive.cumsum(0), (1, 0)) * self.group
        cut = counted.to(boundaries.device)[boundaries.long() // self.group]
        return torch.unique_consecutive(cut).to(boundaries.dtype)

    def open_mlp(self, index: int, states: Tensor) -> None:
        self._note_mlp(index)
        if self._change is not None:
            # The block's own output is still of the old length: the next block changes it once more.
            self._inside[index] = self._change

    def mlp_input(self, index: int, states: Tensor) -> Tensor:
        return self._apply(self._inside.get(index), states)

    def mlp_output(self, index: int, states: Tensor) -> Tensor:
        if index not in self._inside:
            return states
        return self._ungroup(self._inside[index].spread(self._groups(states)))

    def projector_input(self, states: Tensor) -> Tensor:
        return self._apply(self._change, states)

    def projector_output(self, states: Tensor) -> Tensor:
        if not self.dropped:
            return states
        raster = self._order[self._alive]
        if self.origins is not None:
            named = torch.arange(self._order.numel(), device=raster.device)
            first = self._first[:, None]
            named[(self.alive + first)[self.valid]] = (self.names() + first)[self.valid]
            raster = named[raster]
        place = torch.empty_like(self._order)
        place[self._order] = torch.arange(self._order.numel(), device=place.device)
        full = states.new_zeros(self._full.numel(), *states.shape[1:])
        return full.index_put((place[raster].to(states.device),), states)

    def layer_segments(self, kwargs: dict[str, Any]) -> list[list[int]]:
        boundaries = kwargs["cu_seqlens"]
        if boundaries is self._listed[0]:
            return self._listed[1]
        lengths = boundaries.diff().tolist()
        ends = boundaries[1:].tolist()
        limits = [tokens * self.group for tokens in itertools.accumulate(self.counts, initial=0)]
        found: list[list[int]] = [[] for _ in self.grids]
        image = 0
        for length, end in zip(lengths, ends, strict=True):
            while end > limits[image + 1]:
                image += 1
            found[image].append(length)
        self._listed = (boundaries, found)
        return found
