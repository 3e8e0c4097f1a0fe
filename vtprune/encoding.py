"""One pass of a batch of images through the vision encoder, with tokens dropping out on the way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtprune.compaction import gather_tokens
from vtprune.signals import LayerSignals, split_heads
from vtprune.stream import EncoderLayer

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class EncodedImage:
    """What the decoder side has to know of one encoded image.

    grid: (t, h, w) in vision tokens; alive: (N,) tokens that the encoder left; segments: attention segment
    lengths (in patches, CLS included) in each encoder layer, empty if no pruner acts there; scored: the layers
    after which a pruner scored; maker: who will know it again; last_signals: of the tower's last layer.
    """

    grid: tuple[int, int, int]
    alive: Tensor
    signals: LayerSignals | None
    pixels: Tensor | None
    segments: list[list[int]]
    scored: tuple[int, ...]
    maker: object
    last_signals: LayerSignals | None = None

    @property
    def total(self) -> int:
        """Vision tokens of the whole image."""
        return self.grid[0] * self.grid[1] * self.grid[2]


class Encoding(ABC):
    """The tokens alive in each image while the encoder runs.

    grids: (t, h, w) of each image in vision tokens; group: patches of a vision token; prefix: leading tokens
    that are not patches; heads: attention heads; depth: layers that feed the features.
    `decide(layer)` answers which tokens go on after a layer, (B, N) bool or None.
    """

    def __init__(
        self,
        grids: list[tuple[int, int, int]],
        *,
        group: int,
        prefix: int,
        heads: int,
        depth: int,
        budgets: list[int],
        device: torch.device,
    ) -> None:
        self.grids, self.group, self.prefix, self.heads, self.depth = grids, group, prefix, heads, depth
        totals = torch.tensor([t * h * w for t, h, w in grids], device=device)
        self.total = totals
        self.budget = torch.tensor(budgets, device=device)
        column = torch.arange(int(totals.max()), device=device)
        self.valid = column[None] < totals[:, None]
        self.alive = column.expand(len(grids), -1)
        self.memory: dict[str, Tensor] = {}
        self.taps: dict[str, Tensor] = {}
        self.dropped = False
        self.signals: list[LayerSignals] | None = None
        self.segments: list[list[list[int]]] = [[] for _ in grids]
        self.scored: list[int] = []
        self._decided = -1

    @abstractmethod
    def states(self, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, H, P + N * group, d) of the layer that just ran, in raster order."""

    @abstractmethod
    def compact(self, keep: Tensor, order: Tensor) -> None:
        """Notes that only the tokens of `keep` (B, N) go on, `order` (B, N') being their places, right-padded;
        the next layer's inputs are cut accordingly."""

    @abstractmethod
    def layer_inputs(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The inputs of a layer, cut to the tokens alive."""

    @abstractmethod
    def projector_input(self, states: Tensor) -> Tensor:
        """The input of the projector or merger, cut to the tokens alive."""

    @abstractmethod
    def projector_output(self, states: Tensor) -> Tensor:
        """The output of the projector or merger with zeros where tokens were dropped, at its full length."""

    @abstractmethod
    def layer_segments(self, kwargs: dict[str, Any]) -> list[list[int]]:
        """Lengths of the attention segments of each image in the layer that just ran, in patches."""

    def after_layer(
        self,
        index: int,
        kwargs: dict[str, Any],
        decide: Callable[[EncoderLayer], Tensor | None] | None,
        keep_signals: bool,
        scale: float,
    ) -> None:
        """Takes q, k and v of a layer that ran and lets the pruner decide what goes on."""
        # Gradient checkpointing runs a layer again in the backward pass: what was decided stays decided.
        if index <= self._decided:
            return
        self._decided = index
        if index == self.depth - 1 and keep_signals:
            self.signals = self._image_signals(kwargs, scale)
        if decide is None or bool((self.valid.sum(dim=1) <= self.budget).all()):
            self.taps.clear()
            return
        self.scored.append(index)
        query, key, value = self.states(kwargs)
        self.taps.clear()
        layer = EncoderLayer(
            query, key, value, self.valid, self.total, self.budget, index, self.depth, scale,
            self.prefix, self.group, self.memory,
        )  # fmt: skip
        keep = decide(layer)
        if keep is None:
            return
        # An image within its budget is kept whole, whatever the method says of its neighbours.
        keep = (keep | (self.valid.sum(dim=1) <= self.budget)[:, None]) & self.valid
        if bool((keep == self.valid).all()):
            return
        self._drop(keep)

    def _drop(self, keep: Tensor) -> None:
        self.dropped = True
        order = torch.sort((~keep).to(torch.uint8), dim=1, stable=True).indices
        order = order[:, : int(keep.sum(dim=1).max())]
        self.compact(keep, order)
        if self.signals is not None:
            self.signals = [_cut_signals(s, k[v]) for s, k, v in zip(self.signals, keep, self.valid, strict=True)]
        width = self.valid.shape[1]
        for name, value in self.memory.items():
            if value.ndim >= 2 and value.shape[:2] == (keep.shape[0], width):
                self.memory[name] = gather_tokens(value, order)
        self.alive = self.alive.gather(1, order)
        self.valid = torch.arange(order.shape[1], device=keep.device)[None] < keep.sum(dim=1, keepdim=True)

    def _image_signals(self, kwargs: dict[str, Any], scale: float) -> list[LayerSignals]:
        query, key, value = self.states(kwargs)
        lengths = (self.prefix + self.valid.sum(dim=1) * self.group).tolist()
        return [
            LayerSignals(query[b, :, :n], key[b, :, :n], value[b, :, :n], scale, self.prefix, self.group)
            for b, n in enumerate(lengths)
        ]

    def note_layer(self, index: int, kwargs: dict[str, Any]) -> None:
        """Records the attention segments of a layer that is about to run, for the accounting."""
        if index < len(self.segments[0]):
            return  # run again by gradient checkpointing
        for image, segments in zip(self.segments, self.layer_segments(kwargs), strict=True):
            # Layers past the features see what the features' layer saw.
            image.append(segments if index < self.depth else image[-1])

    def images(self, pixels: list[Tensor], maker: object) -> list[EncodedImage]:
        """What the decoder side has to know, image by image; `maker` is who will know them again."""
        alive = [row[valid] for row, valid in zip(self.alive, self.valid, strict=True)]
        signals: Sequence[LayerSignals | None] = self.signals or [None] * len(self.grids)
        return [
            EncodedImage(*parts, tuple(self.scored), maker)
            for parts in zip(self.grids, alive, signals, pixels, self.segments, strict=True)
        ]


def _cut_signals(signals: LayerSignals, keep: Tensor) -> LayerSignals:
    patches = keep.repeat_interleave(signals.group)
    rows = torch.cat([patches.new_ones(signals.prefix), patches])
    return LayerSignals(
        signals.query[:, rows], signals.key[:, rows], signals.value[:, rows],
        signals.scale, signals.prefix, signals.group,
    )  # fmt: skip


class PaddedEncoding(Encoding):
    """Images of one size as a (B, P + N, D) batch, as CLIP and SigLIP towers take them.

    Where images keep different counts, shorter rows are padded on the right and the padding is masked.
    """

    def __init__(self, *args: Any, attn_implementation: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.flash = "flash" in attn_implementation
        self._order: Tensor | None = None
        self._cuts: dict[int, tuple[Tensor | None, Tensor | None]] = {}

    def states(self, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (split_heads(self.taps[name], self.heads) for name in ("q", "k", "v"))
        return query, key, value

    def compact(self, keep: Tensor, order: Tensor) -> None:
        self._order = order

    def layer_inputs(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        states = args[0]
        if index not in self._cuts:
            self._cuts[index] = self._new_cut(index, states)
        order, valid = self._cuts[index]
        if order is not None:
            patches = gather_tokens(states[:, self.prefix :], order)
            states = torch.cat([states[:, : self.prefix], patches], dim=1)
        if valid is None:
            return (states, *args[1:]), kwargs
        mask = self._mask(states, valid)
        if len(args) > 1:
            return (states, mask, *args[2:]), kwargs
        return (states,), {**kwargs, "attention_mask": mask}

    def _new_cut(self, index: int, states: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if index >= self.depth:
            # These layers run on what the features' layer gave; nothing reads their output.
            return None, self._cuts[self.depth - 1][1]
        order, self._order = self._order, None
        if bool(self.valid.all()):
            return order, None
        prefix = self.valid.new_ones(self.valid.shape[0], self.prefix)
        return order, torch.cat([prefix, self.valid], dim=1)

    def _mask(self, states: Tensor, valid: Tensor) -> Tensor:
        valid = valid.to(states.device)
        if self.flash:
            return valid
        closed = torch.finfo(states.dtype).min
        mask = torch.zeros(valid.shape, dtype=states.dtype, device=states.device).masked_fill(~valid, closed)
        return mask[:, None, None, :].expand(-1, 1, states.shape[1], -1)

    def projector_input(self, states: Tensor) -> Tensor:
        return states if self._order is None else gather_tokens(states, self._order)

    def projector_output(self, states: Tensor) -> Tensor:
        if not self.dropped:
            return states
        full = states.new_zeros(states.shape[0], int(self.total.max()), *states.shape[2:])
        rows = torch.arange(states.shape[0], device=states.device)[:, None].expand(self.alive.shape)
        valid = self.valid.to(states.device)
        return full.index_put((rows[valid], self.alive.to(states.device)[valid]), states[valid])

    def layer_segments(self, kwargs: dict[str, Any]) -> list[list[int]]:
        return [[self.prefix + n] for n in self.valid.sum(dim=1).tolist()]
