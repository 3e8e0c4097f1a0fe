"""One pass of a batch of images through the vision encoder, with tokens dropping out and merging on the way."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from vtprune.encoder.merging import Origins, merges_of
from vtprune.method.answers import EncoderSelection, Merge
from vtprune.method.checks import Checks
from vtprune.method.kinds import IMAGE, Shown
from vtprune.method.sharing import shares_by_size
from vtprune.method.views import EncoderLayer, LayerSignals
from vtprune.tensors.compaction import gather_tokens

Call = tuple[tuple[Any, ...], dict[str, Any]]
T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """A rectangle of vision tokens: the whole image, or one frame of a video; grid (t, h, w), in vision tokens."""

    grid: tuple[int, int, int]

    @property
    def tokens(self) -> int:
        """Vision tokens of the rectangle."""
        return self.grid[0] * self.grid[1] * self.grid[2]


@dataclass
class EncodedImage:
    """What the decoder side has to know of one encoded image or video.

    kind: IMAGE or VIDEO; parts: the rectangles that its vision tokens form, in their order; alive: (N,) tokens that
    the encoder left, ascending; segments: attention segment lengths (in patches, CLS included) in each encoder layer,
    empty if no pruner acts there; mlp: tokens through each layer's MLP; scored: the layers at which a pruner scored;
    maker: who will know it again; signals, last_signals: of the features' layer and of the tower's last one; owner,
    share: (total,) the token that holds each token (-1: none) and its weight there, None if nothing merged;
    merged_at: the layer of the last merge; cls: the token in whose place the CLS token stands, -1 for none; slots:
    (total,) which of its placeholders, in the order of the prompt, each vision token stands at, None for all;
    structural: how many of its placeholders are no vision tokens (ends of rows); planes: tokens alive where each of
    the values was made that the decoder adds to them between its layers.
    """

    parts: tuple[Part, ...]
    alive: Tensor
    signals: LayerSignals | None
    pixels: Tensor | None
    segments: list[list[int]]
    scored: tuple[int, ...]
    maker: object
    last_signals: LayerSignals | None = None
    mlp: tuple[int, ...] = ()
    owner: Tensor | None = None
    share: Tensor | None = None
    merged_at: int | Tensor = 0
    cls: int | Tensor = -1
    slots: Tensor | None = None
    structural: int = 0
    planes: tuple[int, ...] = ()
    kind: str = IMAGE

    @property
    def grid(self) -> tuple[int, int, int]:
        """(t, h, w) in vision tokens where its parts are of one size (frames), else one row of its tokens."""
        sizes = {part.grid[1:] for part in self.parts}
        if len(sizes) > 1:
            return 1, 1, self.total
        return (sum(part.grid[0] for part in self.parts), *self.parts[0].grid[1:])

    @property
    def shown(self) -> Shown:
        """Its sizes."""
        return Shown(self.total, self.kind, len(self.parts))

    @property
    def total(self) -> int:
        """Vision tokens of the whole image."""
        return sum(part.tokens for part in self.parts)

    @property
    def length(self) -> int:
        """Placeholders of the image in the prompt, and rows of its features."""
        return self.total + self.structural

    def merges(self) -> list[Merge]:
        """The merges inside the encoder."""
        return [] if self.owner is None or self.share is None else merges_of(self.owner, self.share)


@dataclass(frozen=True)
class Seen:
    """The tokens that a layer began with: (B,) how many of each image, where they stood (None: in order), and which of
    them went on (None: all)."""

    counts: list[int]
    places: Tensor | None = None
    left: list[Tensor] | None = None


@dataclass(frozen=True)
class PlaneNote:
    """Which tokens were alive where values were made that the decoder adds between its layers: names (B, N) of the
    first `counts` (B,) of each image, and the share (B, T) of each token in the one that held it (None: all alone)."""

    names: Tensor
    counts: tuple[int, ...]
    share: Tensor | None

    def combined(self, row: int, values: Tensor, image: EncodedImage) -> Tensor:
        """(T, D) values of a whole image with those of its tokens added up that flowed together since."""
        if image.owner is None or image.share is None:
            return values
        token = self.names[row, : self.counts[row]]
        before = 1.0 if self.share is None else self.share[row, token]
        owner = image.owner[token]
        weight = (image.share[token] / before).masked_fill(owner < 0, 0.0)
        summed = torch.zeros_like(values, dtype=torch.promote_types(values.dtype, torch.float32))
        own = values[token].to(summed) * weight[:, None].to(summed)
        return summed.index_add(0, owner.clamp(min=0), own).to(values.dtype)


class Encoding(ABC):
    """The tokens alive in each unit, an image or one frame of a video, while the encoder runs.

    Attention never leaves a unit, so that all below which says image means one of them; `shown` says what they make.

    grids: (t, h, w) of each unit in vision tokens; kind: IMAGE or VIDEO; units: how many units each image or video is
    made of (None: one); group: patches of a vision token; prefix: leading tokens
    that are not patches; heads: attention heads; depth: layers that feed the features; last: the tower's last
    layer; arguments: of the layer under way; sizes: (B, N) how many tokens each one stands for; proportional:
    whether attention weighs keys by it.
    """

    def __init__(
        self,
        grids: list[tuple[int, int, int]],
        *,
        group: int,
        prefix: int,
        heads: int,
        depth: int,
        last: int,
        device: torch.device,
        kind: str = IMAGE,
        units: Sequence[int] | None = None,
    ) -> None:
        self.grids, self.group, self.prefix, self.heads, self.depth, self.last = (
            grids,
            group,
            prefix,
            heads,
            depth,
            last,
        )
        # Tokens of each image, whole and alive.
        self.totals = [t * h * w for t, h, w in grids]
        self.units = [1] * len(grids) if units is None else list(units)
        self.shown = [Shown(sum(totals), kind, len(totals)) for totals in self.of_units(self.totals)]
        self.counts = list(self.totals)
        self.total = torch.tensor(self.totals, device=device)
        column = torch.arange(max(self.totals), device=device)
        self.valid = column[None] < self.total[:, None]
        self.alive = column.expand(len(grids), -1)
        self.sizes = self.valid.float()
        self.proportional = False
        self.memory: dict[str, Tensor] = {}
        self.taps: dict[str, Tensor] = {}
        self.arguments: dict[str, Any] = {}
        self.dropped = False
        # Of the scores that tokens dropped by.
        self.checks = Checks()
        self.signals: list[LayerSignals] | None = None
        self.last_signals: list[LayerSignals] | None = None
        self.origins: Origins | None = None
        # The token in whose place each CLS token stands, -1 for none, if any may.
        self.cls: Tensor | None = None
        # Whether any token alive stands for several.
        self.merged = False
        self.segments: list[list[list[int]]] = [[] for _ in grids]
        self.mlp: list[list[int]] = []
        # (B,) by layer: the images that a pruner scored there, because they had more tokens than they may keep.
        self.scored: dict[int, list[bool]] = {}
        # Of the values that the decoder adds between its layers, as they are made.
        self.planes: list[PlaneNote] = []
        self._decided = (-1, 0)
        # The tokens that layers past the features see, and what was left of them for the features.
        self._seen: Seen = Seen(self.counts)
        # Which tokens the layer under way began with, and where, if it may merge some on the way.
        self._held: Seen | None = None

    def of_units(self, values: Sequence[T]) -> list[Sequence[T]]:
        """Values a unit, by the image or the video that the unit is part of."""
        ends = list(itertools.accumulate(self.units))
        return [values[end - count : end] for end, count in zip(ends, self.units, strict=True)]

    def shared(self, budgets: Sequence[int]) -> list[int]:
        """Budgets a unit, from those of whole images and videos: by size, the largest remainders first (ties: the
        first), at least 1 each where there is one for each."""
        found = []
        for budget, totals in zip(budgets, self.of_units(self.totals), strict=True):
            found += shares_by_size(totals, budget)
        return found

    @abstractmethod
    def states(self, kwargs: dict[str, Any], places: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, H, P + N * group, d) of the layer that just ran, in raster order; places: where
        its tokens stood (`layout`), None for those that are alive now."""

    def layout(self) -> Tensor | None:
        """Where the tokens alive stand in the sequence now, None where they stand in order."""
        return None

    @abstractmethod
    def hidden(self, states: Tensor) -> Tensor:
        """(B, P + N * group, D) hidden states of the tokens alive, in raster order."""

    @abstractmethod
    def compact(self, selection: EncoderSelection, order: Tensor, cls: Tensor | None) -> None:
        """Notes what flows together and that only the columns `order` (B, N'), right-padded, go on; the next
        module's inputs are changed accordingly. cls: (B, D) vectors of the CLS tokens, if they take places."""

    @abstractmethod
    def layer_inputs(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The inputs of a layer, cut to the tokens alive."""

    @abstractmethod
    def open_mlp(self, index: int, states: Tensor) -> None:
        """Notes, before a layer's MLP, what was decided there; states: its input."""

    @abstractmethod
    def mlp_input(self, index: int, states: Tensor) -> Tensor:
        """The input of a layer's MLP, cut to the tokens alive."""

    @abstractmethod
    def mlp_output(self, index: int, states: Tensor) -> Tensor:
        """The output of a layer's MLP for all tokens that the layer began with."""

    @abstractmethod
    def projector_input(self, states: Tensor) -> Tensor:
        """The input of the projector or merger, cut to the tokens alive."""

    @abstractmethod
    def projector_output(self, states: Tensor) -> Tensor:
        """The output of the projector or merger with zeros where tokens were dropped, at its full length."""

    @abstractmethod
    def layer_segments(self, kwargs: dict[str, Any]) -> list[list[int]]:
        """Lengths of the attention segments of each image in the layer that just ran, in patches."""

    def is_new(self, index: int, place: int) -> bool:
        """Whether this place of a layer (0: before its MLP, 1: after it) is reached for the first time: gradient
        checkpointing runs a layer again in the backward pass, where what was decided stays decided."""
        new = (index, place) > self._decided
        self._decided = max(self._decided, (index, place))
        return new

    def note_signals(self, index: int, kwargs: dict[str, Any], scale: float, *, features: bool, last: bool) -> None:
        """Keeps q, k and v of the layer that just ran if it is the features' or the tower's last one."""
        held, self._held = self._held, None
        if index == self.depth - 1 and features:
            self.signals = self._image_signals(kwargs, scale, held)
        if index == self.last and last:
            seen = replace(self._seen, places=None) if index >= self.depth else held
            self.last_signals = self._image_signals(kwargs, scale, seen)

    def hold_layout(self) -> None:
        """Notes which tokens the layer under way began with, before some of them merge."""
        self._held = Seen(self.counts, places=self.layout())

    def layer(
        self, index: int, kwargs: dict[str, Any], scale: float, budgets: Sequence[int], hidden: Tensor | None
    ) -> EncoderLayer:
        """What a pruner sees of the layer that just ran; budgets: (B,)."""
        query, key, value = self.states(kwargs)
        return EncoderLayer(
            query=query,
            key=key,
            value=value,
            valid=self.valid,
            total=self.total,
            budget=torch.tensor(budgets, device=self.valid.device),
            index=index,
            depth=self.depth,
            scale=scale,
            prefix=self.prefix,
            group=self.group,
            memory=self.memory,
            sizes=self.sizes,
            grids=tuple(self.grids),
            hidden=None if hidden is None else self.hidden(hidden),
            alive=tuple(self.counts),
            budgets=tuple(budgets),
        )

    def apply(self, selection: EncoderSelection, index: int, cls: Tensor | None) -> None:
        """Carries a selection out after (or inside) layer `index`."""
        selection = selection.settled()
        assert selection.counts is not None
        counts, merges = list(selection.counts), bool(selection.flows)
        if not merges and counts == self.counts:
            return
        keep = selection.keep
        order = torch.sort((~keep).to(torch.uint8), dim=1, stable=True).indices[:, : max(counts)]
        self._seen = Seen(counts)
        if index == self.depth - 1:
            self._seen = Seen(self.counts, left=[one[:n] for one, n in zip(order, counts, strict=True)])
        self.compact(selection, order, cls)
        self.dropped, self.merged = True, self.merged or merges
        if merges and self.origins is None:
            self.origins = Origins.start(self.alive, self.valid, max(self.totals))
        if self.origins is not None:
            self.origins.follow(selection, order, index, merges=merges)
        for name in ("signals", "last_signals"):
            found = getattr(self, name)
            if found is not None:
                own = zip(found, order, counts, strict=True)
                setattr(self, name, [cut_signals(signals, columns[:n]) for signals, columns, n in own])
        self._cut_columns(selection, order, counts)

    def _cut_columns(self, selection: EncoderSelection, order: Tensor, counts: list[int]) -> None:
        keep, width = selection.keep, self.valid.shape[1]
        for name, value in self.memory.items():
            if value.ndim >= 2 and value.shape[:2] == (keep.shape[0], width):
                self.memory[name] = gather_tokens(value, order)
        if selection.flows:
            # A last column takes what goes nowhere.
            sums = self.sizes.new_zeros(keep.shape[0], width + 1)
            sums.scatter_add_(1, selection.into.masked_fill(selection.into < 0, width), self.sizes)
            self.sizes = sums
        self.sizes = self.sizes.gather(1, order)
        if selection.cls is not None:
            named = self.alive.gather(1, selection.cls.clamp(min=0)[:, None])[:, 0]
            self.cls = torch.where(selection.cls >= 0, named, -1 if self.cls is None else self.cls)
        self.alive = self.alive.gather(1, order)
        self.counts = counts
        if self.full:
            # Padding stands on the right, so that the first columns were full before.
            self.valid = self.valid[:, : order.shape[1]]
        else:
            kept = torch.tensor(counts, device=keep.device)
            self.valid = torch.arange(order.shape[1], device=keep.device)[None] < kept[:, None]

    @property
    def full(self) -> bool:
        """Whether all images have equally many tokens alive, so that none is padded."""
        return min(self.counts) == max(self.counts)

    def size_bias(self) -> Tensor | None:
        """(B, N) what attention adds to the logits of each key for the tokens that it stands for, or None."""
        if not self.proportional or not self.merged:
            return None
        return self.sizes.clamp(min=1).log()

    def names(self) -> Tensor:
        """(B, N) the token whose index and position each token alive takes: its heaviest member."""
        return self.alive if self.origins is None else self.origins.heaviest(self.alive)

    def _image_signals(self, kwargs: dict[str, Any], scale: float, began: Seen | None) -> list[LayerSignals]:
        """Of the tokens alive; began: those that the layer began with, if these were others."""
        seen = Seen(self.counts) if began is None else began
        query, key, value = self.states(kwargs, seen.places)
        lengths = [self.prefix + tokens * self.group for tokens in seen.counts]
        signals = [
            LayerSignals(
                query=query[b, :, :n],
                key=key[b, :, :n],
                value=value[b, :, :n],
                scale=scale,
                prefix=self.prefix,
                group=self.group,
            )
            for b, n in enumerate(lengths)
        ]
        left = self._seen.left
        if began is None or left is None:
            return signals
        return [cut_signals(one, columns) for one, columns in zip(signals, left, strict=True)]

    def note_layer(self, index: int, kwargs: dict[str, Any]) -> None:
        """Records the attention segments of a layer that is about to run, for the accounting."""
        if index < len(self.segments[0]):
            return  # run again by gradient checkpointing
        for image, segments in zip(self.segments, self.layer_segments(kwargs), strict=True):
            # Layers past the features see what the features' layer saw.
            image.append(segments if index < self.depth else image[-1])
        self.mlp.append(self._alive_patches() if index < self.depth else self.mlp[-1])

    def _note_mlp(self, index: int) -> None:
        """Records the tokens that go through the MLP of a layer, where some merged before it."""
        if index < len(self.mlp):
            self.mlp[index] = self._alive_patches()

    def _alive_patches(self) -> list[int]:
        return [self.prefix + tokens * self.group for tokens in self.counts]

    def note_plane(self) -> None:
        """Notes which tokens are alive where values are made of them that the decoder adds between its layers."""
        share = None if self.origins is None else self.origins.share
        self.planes.append(PlaneNote(self.names(), tuple(self.counts), share))

    def images(self, pixels: list[Tensor], maker: object) -> list[EncodedImage]:
        """What the decoder side has to know, unit by unit; `maker` is who will know them again."""
        none: list[None] = [None] * len(self.grids)
        signals: Sequence[LayerSignals | None] = self.signals or none
        last: Sequence[LayerSignals | None] = self.last_signals or none
        names = self.names()
        cls = [-1] * len(self.grids) if self.cls is None else self.cls
        found = []
        for b, grid in enumerate(self.grids):
            alive = names[b, : self.counts[b]]
            image = EncodedImage(
                parts=(Part(grid),),
                alive=alive,
                signals=signals[b],
                pixels=pixels[b],
                segments=self.segments[b],
                scored=tuple(layer for layer, images in self.scored.items() if images[b]),
                maker=maker,
                last_signals=last[b],
                mlp=tuple(layer[b] for layer in self.mlp),
                cls=cls[b],
                planes=tuple(plane.counts[b] for plane in self.planes),
            )
            found.append(image if self.origins is None else self._merged(image, b, names[b]))
        return found

    def _merged(self, image: EncodedImage, row: int, names: Tensor) -> EncodedImage:
        """The image with its merges, its tokens in the order of their new names."""
        assert self.origins is not None
        column = self.origins.column[row, : image.total]
        owner = torch.where(column >= 0, names[column.clamp(min=0)], column)
        order = image.alive.argsort()
        signals, last = (None if s is None else cut_signals(s, order) for s in (image.signals, image.last_signals))
        return replace(
            image, alive=image.alive[order], signals=signals, last_signals=last, owner=owner,
            share=self.origins.share[row, : image.total], merged_at=self.origins.layer[row],
        )  # fmt: skip


def joined(units: Sequence[EncodedImage], kind: str) -> EncodedImage:
    """One image or video of the units that it was encoded in, its tokens in their order."""
    if len(units) == 1:
        return replace(units[0], kind=kind)
    first = units[0]
    starts = list(itertools.accumulate((unit.total for unit in units), initial=0))[:-1]
    layers = range(len(first.segments))
    owners = [
        torch.where(unit.owner >= 0, unit.owner + start, unit.owner)
        for unit, start in zip(units, starts, strict=True)
        if unit.owner is not None
    ]
    shares = [unit.share for unit in units if unit.share is not None]
    return replace(
        first,
        kind=kind,
        parts=tuple(part for unit in units for part in unit.parts),
        alive=torch.cat([unit.alive + start for unit, start in zip(units, starts, strict=True)]),
        signals=_joined_signals([unit.signals for unit in units]),
        last_signals=_joined_signals([unit.last_signals for unit in units]),
        pixels=None if first.pixels is None else torch.cat([unit.pixels for unit in units if unit.pixels is not None]),
        segments=[[length for unit in units for length in unit.segments[layer]] for layer in layers],
        scored=tuple(sorted({layer for unit in units for layer in unit.scored})),
        mlp=tuple(sum(counts) for counts in zip(*(unit.mlp for unit in units), strict=True)),
        owner=torch.cat(owners) if owners else None,
        share=torch.cat(shares) if shares else None,
        merged_at=torch.stack([torch.as_tensor(unit.merged_at) for unit in units]).amax(),
        planes=tuple(sum(counts) for counts in zip(*(unit.planes for unit in units), strict=True)),
    )


def _joined_signals(units: Sequence[LayerSignals | None]) -> LayerSignals | None:
    known = [unit for unit in units if unit is not None]
    if not known:
        return None
    query, key, value = (torch.cat([getattr(one, name) for one in known], dim=1) for name in ("query", "key", "value"))
    return replace(known[0], query=query, key=key, value=value, lengths=tuple(one.tokens for one in known))


def cut_signals(signals: LayerSignals, tokens: Tensor) -> LayerSignals:
    """The signals of some of an image's tokens, by their indices in the order wanted; in several units, that of the
    units."""
    lengths = signals.lengths
    patches = tokens[:, None] * signals.group + torch.arange(signals.group, device=tokens.device)
    if not lengths:
        rows = torch.cat([torch.arange(signals.prefix, device=tokens.device), signals.prefix + patches.flatten()])
    else:
        ends = torch.tensor(lengths, device=tokens.device).cumsum(0)
        unit = torch.searchsorted(ends, tokens, right=True)
        left = torch.zeros(len(lengths), dtype=torch.long, device=tokens.device).index_add_(
            0, unit, torch.ones_like(unit)
        )
        lengths, rows = tuple(left.tolist()), patches.flatten()
    return replace(
        signals, query=signals.query[:, rows], key=signals.key[:, rows], value=signals.value[:, rows], lengths=lengths
    )
