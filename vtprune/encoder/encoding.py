"""One pass of a batch of images through the vision encoder, with tokens dropping out and merging on the way."""

from __future__ import annotations

import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from vtprune.encoder.arrangement import Arrangement, Part, visible_patches
from vtprune.encoder.merging import Averaging, Blanks, Origins, Zeros, merges_of
from vtprune.method.answers import EncoderSelection, Means, Merge
from vtprune.method.checks import Checks
from vtprune.method.kinds import IMAGE, Shown
from vtprune.method.sharing import shares_by_size
from vtprune.method.views import EncoderLayer, LayerSignals
from vtprune.tensors.compaction import gather_tokens

Call = tuple[tuple[Any, ...], dict[str, Any]]
T = TypeVar("T")


@dataclass
class EncodedImage:
    """What the decoder side has to know of one encoded image or video.

    kind: IMAGE or VIDEO; parts: the rectangles that its vision tokens form, in their order; units: the grids (t, h, w)
    that the encoder attended within, one after another; alive: (N,) tokens that the encoder left, ascending; visible:
    how many of them the decoder sees; segments: attention segment lengths (in patches, CLS included) in each encoder
    layer, empty if no pruner acts there; mlp: tokens through each layer's MLP; scored: the layers at which a pruner
    scored; maker: who will know it again; signals, last_signals: of the features' layer and of the tower's last one;
    owner, share: (total,) the token that holds each token (-1: none) and its weight there, None if nothing merged;
    merged_at: the layer of the last merge; cls: the token in whose place the CLS token stands, -1 for none, (U,) for
    several units; slots: (total,) which of its placeholders, in the order of the prompt, each vision token stands at,
    None for all; structural: how many of its placeholders are no vision tokens (ends of rows); planes: tokens alive
    where each of the values was made that the decoder adds to them between its layers; projected, projects: what went
    through the projector, and what would have had nothing been dropped; arrangement: how its tokens are made of
    patches, where these are not the same.
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
    units: tuple[tuple[int, int, int], ...] = ()
    visible: int = 0
    projected: int = 0
    projects: int = 0
    arrangement: Arrangement | None = None

    @property
    def encoded(self) -> tuple[int, int, int]:
        """(t, h, w) of what went through the encoder: its units, which are of one size, one after another."""
        units = self.units or tuple(part.grid for part in self.parts)
        return (sum(unit[0] for unit in units), *units[0][1:])

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
        return Shown(self.total, self.kind, len(self.units or self.parts))

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
    """The tokens that a layer began with: (B,) how many of each image, where they stood (None: in order), and the
    choice of those that went on (None: all)."""

    counts: list[int]
    places: Tensor | None = None
    left: EncoderSelection | None = None


@dataclass(frozen=True)
class Sum:
    """Of a layer: what its MLP is given and puts out, of the tokens left; what it puts out itself for all that it
    began with, and how often that had been written into."""

    merged: Tensor
    put_out: Tensor | None = None
    output: Tensor | None = None
    version: int = 0


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
    made of (None: one); arrangements: how each image or video is made of patches, () where its tokens are these, in
    their order; group: patches of a vision token; prefix: leading tokens that are not patches; heads: attention heads;
    depth: layers that feed the features; last: the tower's last layer; arguments: of the layer under way; sizes:
    (B, N) how many tokens each one stands for; proportional: whether attention weighs keys by it.
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
        arrangements: Sequence[Arrangement] = (),
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
        # Those of them that the decoder will see (padding around a picture that is cut into crops never reaches it):
        # what others say of tokens counts these alone.
        visible = visible_patches(arrangements)
        self.seen = list(self.totals) if visible is None else visible.sum(dim=1).tolist()
        self.shown = [Shown(sum(seen), kind, len(seen)) for seen in self.of_units(self.seen)]
        self.counts, self.kept = list(self.totals), list(self.seen)
        self.total = torch.tensor(self.totals, device=device)
        column = torch.arange(max(self.totals), device=device)
        self.valid = column[None] < self.total[:, None]
        self.visible = None if visible is None else visible.to(device)
        self.arrangements, self.kind = arrangements, kind
        # Whether what comes of this may have gradients; layers that are checkpointed run without them all the same.
        self.learns = torch.is_grad_enabled()
        # The tokens that were alive once, and the choices that were made since, which are looked up where they matter.
        self._once_alive, self._since = column.expand(len(grids), -1), list[EncoderSelection]()
        # The sizes behind a leading 1, where they are at hand like this.
        self._led: Tensor | None = None
        if self.full:
            self._led = torch.ones(len(grids), 1 + len(column), device=device)
        self.sizes = self.valid.float() if self._led is None else self._led[:, 1:]
        # What methods that make means write into, layer by layer.
        shape = (depth, len(grids), 1 + max(self.totals))
        self._marks = Blanks(functools.partial(_blank_marks, shape, device))
        self._sums = Blanks(functools.partial(torch.zeros, shape, device=device))
        self._zeros = Zeros(depth, alone=self.learns)
        # Numbers that layers are shown, by what they are.
        self._numbers: dict[tuple[int, ...], Tensor] = {}
        self.proportional = False
        self._sum: Sum | None = None
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
        # What `names` answered since tokens were last cut or merged.
        self._named: Tensor | None = None
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
        for budget, totals in zip(budgets, self.of_units(self.seen), strict=True):
            found += shares_by_size(totals, budget)
        return found

    def spared(self, budgets: Sequence[int]) -> list[bool]:
        """(B,) the units that have no more tokens than `budgets` (B,), or none that the decoder sees."""
        return [not left or left <= budget for left, budget in zip(self.kept, budgets, strict=True)]

    @property
    def candidates(self) -> Tensor:
        """(B, N) the tokens that may be kept: no padding, and seen by the decoder."""
        return self.valid if self.visible is None else self.valid & self.visible

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
    def compact(self, selection: EncoderSelection, cls: Tensor | None) -> None:
        """Notes what flows together and that only what is kept goes on; the next module's inputs are changed
        accordingly. cls: (B, D) vectors of the CLS tokens, if they take places."""

    @abstractmethod
    def average(self, change: Averaging, means: Means) -> None:
        """The same for tokens that become means of one another."""

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
    def averages(self, index: int) -> bool:
        """Whether tokens become means of one another before the MLP of a layer."""

    def hold(self, merged: Tensor) -> None:
        """Notes these means before a layer's MLP, where the layer puts out the sum of what its MLP is given (before
        its norm) and puts out."""
        # Whether somebody wrote into an output can be told of no tensor of inference mode.
        if not self.learns and not merged.is_inference():
            self._sum = Sum(merged)

    def hold_output(self, put_out: Tensor | None) -> None:
        """Notes what the MLP made of them; None where that is not what the layer adds."""
        if self._sum is not None:
            self._sum = None if put_out is None else replace(self._sum, put_out=put_out)

    def hold_layer_output(self, output: Tensor) -> None:
        """Notes what the layer puts out, which has a row for each token that it began with."""
        if self._sum is not None:
            self._sum = replace(self._sum, output=output, version=output._version)

    def added(self, states: Tensor) -> Tensor | None:
        """The input of the next module, cut to the tokens alive, where `states` are what the last layer put out, as it
        did, or all of it but what leads it: means of x + f, f being alike for all members, are the means of x, and f.
        """
        held = self._sum
        if held is None or held.put_out is None or held.output is None or states._version != held.version:
            return None
        if states is held.output:
            return held.merged + held.put_out
        rest = held.output[:, self.prefix :]
        seen = (states.shape, states.stride(), states.storage_offset())
        if states._base is not held.output or seen != (rest.shape, rest.stride(), rest.storage_offset()):
            return None
        return (held.merged + held.put_out)[:, self.prefix :]

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
        """What a pruner sees of the layer that just ran, -1: before the first one; budgets: (B,)."""
        if index < 0:
            # No layer has run.
            query = key = value = self.sizes.new_empty(len(self.totals), 0, 0, 0)
        else:
            query, key, value = self.states(kwargs)
        return EncoderLayer(
            query=query,
            key=key,
            value=value,
            valid=self.candidates,
            total=self.total if self.visible is None else self._on_device(self.seen),
            budget=self._on_device(budgets),
            index=index,
            depth=self.depth,
            scale=scale,
            prefix=self.prefix,
            group=self.group,
            memory=self.memory,
            sizes=self.sizes,
            grids=tuple(self.grids),
            hidden=None if hidden is None else self.hidden(hidden),
            alive=tuple(self.kept),
            budgets=tuple(budgets),
            unseen=tuple(total - seen for total, seen in zip(self.totals, self.seen, strict=True)),
            bias=None if index < 0 else self.key_bias(index),
            columns=tuple(self.counts),
            merged=self.merged,
            blank=functools.partial(self._marks.take, 1 + self.valid.shape[1]),
        )

    def _on_device(self, numbers: Sequence[int]) -> Tensor:
        """(B,) numbers that layers are shown, which travel once."""
        key = tuple(numbers)
        if key not in self._numbers:
            self._numbers[key] = torch.tensor(key, device=self.valid.device)
        return self._numbers[key]

    @property
    def alive(self) -> Tensor:
        """(B, N) the tokens alive."""
        chosen, self._since = self._since, []
        for selection in chosen:
            self._once_alive = self._once_alive.gather(1, selection.order)
        return self._once_alive

    def apply(self, selection: EncoderSelection, index: int, cls: Tensor | None) -> None:
        """Carries a selection out after (or inside) layer `index`."""
        selection = selection.settled()
        assert selection.counts is not None
        counts, merges = list(selection.counts), bool(selection.flows)
        if not merges and counts == self.counts:
            return
        self._seen = Seen(counts)
        if index == self.depth - 1:
            self._seen = Seen(self.counts, left=selection)
        if isinstance(selection, Means) and merges:
            self._average(selection, index)
        else:
            self.compact(selection, cls)
            if merges or self.origins is not None:
                self._found_origins().follow(selection, index, merges=merges)
            self._add_sizes(selection)
        self._named = None
        self.dropped, self.merged = True, self.merged or merges
        for name in ("signals", "last_signals"):
            found = getattr(self, name)
            if found is not None:
                setattr(self, name, _cut(found, selection.order, counts))
        self._cut_columns(selection, counts)

    def _found_origins(self) -> Origins:
        """Who knows where tokens are, from the first merge on."""
        if self.origins is None:
            known = not self.dropped and self.full
            self.origins = Origins(self.alive) if known else Origins.start(self.alive, self.valid, max(self.totals))
        return self.origins

    def _average(self, selection: Means, index: int) -> None:
        """Carries out a selection of means."""
        before = self._led
        if before is None:
            before = torch.nn.functional.pad(self.sizes, (1, 0), value=1.0)
        assert selection.counts is not None
        width = 1 + selection.counts[0]
        # What a gradient is made of later must stay as it is when others of these are written into.
        sums = before.new_zeros(len(before), width) if self.learns else self._sums.take(width)
        sums.scatter_add_(1, selection.landing, before)
        change = Averaging(selection.landing, before if self.merged else None, sums, self._zeros)
        self.average(change, selection)
        self._found_origins().average(change, index)
        self._led, self.sizes = sums, sums[:, 1:]

    def _add_sizes(self, selection: EncoderSelection) -> None:
        """Adds up what tokens stand for that flow together."""
        width = self.valid.shape[1]
        if selection.flows and selection.lossless:
            self.sizes = torch.zeros_like(self.sizes).scatter_add_(1, selection.targets, self.sizes)
        elif selection.flows:
            # A last column takes what goes nowhere.
            sums = self.sizes.new_zeros(selection.keep.shape[0], width + 1)
            sums.scatter_add_(1, selection.targets.masked_fill(selection.targets < 0, width), self.sizes)
            self.sizes = sums
        self._led, self.sizes = None, self.sizes.gather(1, selection.order)

    def _cut_columns(self, selection: EncoderSelection, counts: list[int]) -> None:
        keep, width = selection.keep, self.valid.shape[1]
        for name, value in self.memory.items():
            if value.ndim >= 2 and value.shape[:2] == (keep.shape[0], width):
                self.memory[name] = gather_tokens(value, selection.order)
        if selection.cls is not None:
            named = self.alive.gather(1, selection.cls.clamp(min=0)[:, None])[:, 0]
            self.cls = torch.where(selection.cls >= 0, named, -1 if self.cls is None else self.cls)
        self._since.append(selection)
        if self.visible is not None:
            # What the decoder does not see goes with the first tokens that a unit loses.
            self.visible = self.visible.gather(1, selection.order)
            own = zip(self.kept, self.counts, counts, strict=True)
            self.kept = [seen if now == before else now for seen, before, now in own]
        else:
            self.kept = list(counts)
        self.counts = counts
        if self.full:
            # Padding stands on the right, so that the first columns were full before.
            self.valid = self.valid[:, : max(counts)]
        else:
            kept = torch.tensor(counts, device=keep.device)
            self.valid = torch.arange(max(counts), device=keep.device)[None] < kept[:, None]

    @property
    def full(self) -> bool:
        """Whether all images have equally many tokens alive, so that none is padded."""
        return min(self.counts) == max(self.counts)

    def size_bias(self, *, led: bool = False) -> Tensor | None:
        """(B, N) what attention adds to the logits of each key for the tokens that it stands for, or None; led: behind
        what it adds to that of a CLS token, (B, 1 + N), where there is one."""
        if not self.proportional or not self.merged:
            return None
        led = led and self.prefix > 0
        if led and self._led is not None:
            return self._led.log()
        # Padding stands for no token.
        bias = (self.sizes if self.full else self.sizes.clamp(min=1)).log()
        return torch.nn.functional.pad(bias, (1, 0)) if led else bias

    def key_bias(self, index: int) -> Tensor | None:
        """(B, P + N * group) what the attention of layer `index` added for that, where this layout has it at hand."""
        return None

    def names(self) -> Tensor:
        """(B, N) the token whose index and position each token alive takes: its heaviest member."""
        if self.origins is None:
            return self.alive
        if self._named is None:
            self._named = self.origins.heaviest(max(self.counts), None if self.origins.complete else self.alive)
        return self._named

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
        assert left.counts is not None
        return _cut(signals, left.order, left.counts)

    def note_layer(self, index: int, kwargs: dict[str, Any]) -> None:
        """Records the attention segments of a layer that is about to run, for the accounting."""
        if index < len(self.segments[0]):
            return  # run again by gradient checkpointing
        for image, segments in zip(self.segments, self.layer_segments(kwargs), strict=True):
            # Layers past the features see what the features' layer saw.
            image.append(segments if index < self.depth else image[-1])
        # The features are what the MLP of their layer handed back to all tokens that its attention saw.
        past = [sum(image[-1]) for image in self.segments]
        self.mlp.append(self._alive_patches() if index < self.depth else past)

    def _note_mlp(self, index: int) -> None:
        """Records the tokens that go through the MLP of a layer, where some merged before it."""
        if index < len(self.mlp):
            self.mlp[index] = self._alive_patches()

    def _alive_patches(self) -> list[int]:
        return [self.prefix + tokens * self.group for tokens in self.computed()]

    def computed(self) -> list[int]:
        """(B,) the tokens that layers compute of each unit, as if its image ran alone: those that are alive."""
        return self.counts

    def note_plane(self) -> None:
        """Notes which tokens are alive where values are made of them that the decoder adds between its layers."""
        share = None if self.origins is None else self.origins.share
        self.planes.append(PlaneNote(self.names(), tuple(self.counts), share))

    def images(self, pixels: list[Tensor], maker: object) -> list[EncodedImage]:
        """What the decoder side has to know, unit by unit; `maker` is who will know them again."""
        none: list[None] = [None] * len(self.grids)
        signals: Sequence[LayerSignals | None] = self.signals or none
        last: Sequence[LayerSignals | None] = self.last_signals or none
        names, computed = self.names(), self.computed()
        cls = [-1] * len(self.grids) if self.cls is None else self.cls
        found = []
        for b, grid in enumerate(self.grids):
            alive = names[b, : self.counts[b]]
            image = EncodedImage(
                parts=(Part(grid),),
                units=(grid,),
                visible=self.kept[b],
                projected=computed[b],
                projects=self.totals[b],
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
        whole = self.origins.whole
        owner = names.index_select(0, column if whole else column.clamp(min=0))
        owner = owner if whole else torch.where(column >= 0, owner, column)
        alive, order = image.alive.sort()
        signals, last = (None if s is None else s.cut(order) for s in (image.signals, image.last_signals))
        return replace(
            image, alive=alive, signals=signals, last_signals=last, owner=owner,
            share=self.origins.share[row, : image.total],
            merged_at=self.origins.layer if isinstance(self.origins.layer, int) else self.origins.layer[row],
        )  # fmt: skip


def _blank_marks(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """All True behind a leading False."""
    marks = torch.ones(shape, dtype=torch.bool, device=device)
    marks[..., 0] = False
    return marks


def _cut(signals: Sequence[LayerSignals], order: Tensor, counts: Sequence[int]) -> list[LayerSignals]:
    """The signals of each image's first `counts` (B,) columns of `order` (B, N')."""
    return [one.cut(columns[:n]) for one, columns, n in zip(signals, order, counts, strict=True)]


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
        units=tuple(grid for unit in units for grid in unit.units),
        visible=sum(unit.visible for unit in units),
        projected=sum(unit.projected for unit in units),
        projects=sum(unit.projects for unit in units),
        cls=_joined_cls(units, starts),
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


def _joined_cls(units: Sequence[EncodedImage], starts: Sequence[int]) -> int | Tensor:
    """(U,) the token in whose place the CLS token of each unit stands; -1 where no unit has one."""
    if not any(isinstance(unit.cls, Tensor) for unit in units):
        return -1
    places = torch.stack([torch.as_tensor(unit.cls, device=unit.alive.device) for unit in units])
    return torch.where(places >= 0, places + torch.tensor(starts, device=places.device), -1)


def _joined_signals(units: Sequence[LayerSignals | None]) -> LayerSignals | None:
    known = [unit for unit in units if unit is not None]
    if not known:
        return None
    query, key, value = (torch.cat([getattr(one, name) for one in known], dim=1) for name in ("query", "key", "value"))
    return replace(known[0], query=query, key=key, value=value, lengths=tuple(one.tokens for one in known))


def arranged(image: EncodedImage, arrangement: Arrangement) -> EncodedImage:
    """The image or video as the decoder sees it, from what is known of its patches."""
    device = image.alive.device
    sources = arrangement.sources.to(device)
    every = torch.arange(arrangement.tokens, device=device)
    token = torch.full((arrangement.patches,), arrangement.tokens, device=device)
    # Of what mixes patches nothing is dropped in the encoder, so that any of its patches stands for a token.
    token[sources[:, 0]] = every
    whole = image.alive.numel() == arrangement.patches
    alive = every if whole else token[image.alive].sort().values[: image.visible]
    owner, share = image.owner, image.share
    if owner is not None and share is not None:
        own = owner[sources[:, 0]]
        holder = torch.where(own >= 0, token[own.clamp(min=0)], -1)
        owner, share = holder.masked_fill(holder == arrangement.tokens, -1), share[sources[:, 0]]
    rank = torch.zeros_like(token)
    rank[image.alive] = torch.arange(image.alive.numel(), device=device)
    cls = torch.as_tensor(image.cls, device=device)
    cls = torch.where(cls >= 0, token[cls.clamp(min=0)], -1)
    return replace(
        image,
        parts=arrangement.parts,
        alive=alive,
        signals=_arranged_signals(image.signals, arrangement, rank[sources[alive]], alive),
        last_signals=_arranged_signals(image.last_signals, arrangement, rank[sources[alive]], alive),
        owner=owner,
        share=share,
        cls=cls.masked_fill(cls == arrangement.tokens, -1),
        slots=arrangement.slots,
        structural=arrangement.length - arrangement.tokens,
        projected=arrangement.tokens if arrangement.projected else image.projected,
        projects=arrangement.tokens if arrangement.projected else image.projects,
        arrangement=arrangement,
    )


def _arranged_signals(
    signals: LayerSignals | None, arrangement: Arrangement, sources: Tensor, tokens: Tensor
) -> LayerSignals | None:
    """The signals of patches, unit by unit, as those of `tokens`, which are made of the patches `sources` left."""
    if signals is None:
        return None
    lengths = signals.lengths or (signals.tokens,)
    weights = None if arrangement.weights is None else arrangement.weights.to(tokens.device)[tokens]
    return replace(signals, lengths=lengths, sources=sources.to(signals.query.device), weights=weights)
