"""One forward of the decoder: vision tokens drop out between layers, masks, positions and caches follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from vtprune.cache.adopting import all_slots
from vtprune.cache.layer import PrunedLayer
from vtprune.decoder.conversation import Conversations
from vtprune.decoder.packing import Packed
from vtprune.decoder.prompt import ImageSpan, PromptInfo
from vtprune.decoder.revival import Revival
from vtprune.encoder.encoding import Call
from vtprune.errors import VTPruneError
from vtprune.method.answers import Merge, Selection
from vtprune.tensors.compaction import (
    biased_mask,
    fill_index,
    gather_tokens,
    layer_mask,
    places_of,
    relative_places,
)

if TYPE_CHECKING:
    from vtprune.hooks.eviction import Watch
    from vtprune.hooks.learning import Lesson
    from vtprune.hooks.routing import RoutedLayers

# How many tokens were dropped before each place, in a layer whose positions are renumbered.
SHIFT = "position_shift"

Rotary = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
# The places (T,) of the text tokens of each conversation with an image, by `ImageSpan.key`.
Texts = dict[tuple[int, int], Tensor]


@dataclass
class Layout:
    """Which places of the input a layer processes: (B, n), -1 padding, or None for all of them.

    ragged: whether some are padding; relative: where these stand among the tokens of the layer before, or None if
    nothing changed.
    vectors: (row, column, vector) of tokens that others were merged into.
    """

    places: Tensor | None = None
    ragged: bool = False
    relative: Tensor | None = None
    vectors: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)
    embeddings: tuple[Tensor, Tensor] | None = None
    shift: Tensor | None = None


class DecoderRun:
    """The state of one decoder forward; made before the first layer, dropped after the last."""

    def __init__(
        self,
        prompt: PromptInfo,
        spans: list[ImageSpan],
        layers: list[PrunedLayer] | None,
        *,
        cache: Cache | None,
        flash: bool,
        rotary: Rotary | None,
    ) -> None:
        self.prompt, self.spans, self.layers = prompt, spans, layers
        self.cache, self.flash, self.rotary = cache, flash, rotary
        self.generation: Any = None
        self.revival: Revival | None = None
        self.taps: dict[str, Tensor] = {}
        self.alive: Tensor | None = None
        # By span: its row, the places of its tokens and their new vectors, until the next layer is fed them.
        self._changed: dict[int, tuple[int, Tensor, Tensor]] = {}
        self._layouts: dict[int, Layout] = {}
        self._masks: dict[tuple[int, int, int], tuple[Tensor | None, Tensor | None]] = {}
        self._slots: dict[tuple[int, int, int], tuple[Any, Tensor | None]] = {}
        self._announced: set[int] = set()
        self.decided = -1
        self.watch: Watch | None = None
        self.routed: RoutedLayers | None = None
        self.packed: Packed | None = None
        self.losses: dict[int, Tensor] = {}
        self.lessons: list[Lesson] = []
        self.bias: Tensor | None = None
        self._routed_layouts: dict[int, Layout] = {}

    @cached_property
    def questions(self) -> Conversations:
        """The conversations of this input without their answers: images are judged by these."""
        images = torch.zeros(self.prompt.batch, self.prompt.length, dtype=torch.bool, device=self.prompt.device)
        for span in self.spans:
            images[span.row, span.places] = True
            if span.structural is not None:
                images[span.row, span.structural] = True
        return self.prompt.questions(images)

    @cached_property
    def texts(self) -> Texts:
        """The places of the text that images are judged by."""
        return self.texts_of(self.questions)

    def texts_of(self, conversations: Conversations) -> Texts:
        """The places of the text of each conversation with an image, without padding and placeholders."""
        number = conversations.number.clone()
        for span in self.spans:
            number[span.row, span.places] = -1
            if span.structural is not None:
                number[span.row, span.structural] = -1
        keys = {span.key for span in self.spans}
        return {(row, talk): (number[row] == talk).nonzero().flatten() for row, talk in keys}

    def ends(self, places: Tensor | None) -> tuple[Tensor, Tensor]:
        """The columns, among the tokens at `places` (B, n) (None: all), of the first token of each conversation and of
        the last one of its prompt: both (B, C)."""
        return self.prompt.conversations.ends(places)[0], self.questions.ends(places)[1]

    def drop(self, span: ImageSpan, selection: Selection, layer: int) -> None:
        """Keeps only the selected ones of the tokens that the span still has, from decoder layer `layer` on."""
        left = selection.kept.to(span.kept.device)
        before, span.kept = span.kept, span.kept[left]
        span.memories = {
            index: {
                name: values[left.to(values.device)] if isinstance(values, Tensor) else values
                for name, values in memory.items()
            }
            for index, memory in span.memories.items()
        }
        for merge in selection.merges:
            whole = Merge(int(before[merge.into]), tuple(int(before[m]) for m in merge.members), merge.weights)
            span.merges.append((layer, whole))
        self.mark(span)
        vectors, earlier = selection.vectors, self._changed.get(id(span))
        if vectors is None and earlier is not None:
            vectors = earlier[2][left.to(earlier[2].device)]
        if vectors is not None:
            self._changed[id(span)] = span.row, span.places[span.kept], vectors
        if selection.bias is not None:
            self._add_bias(span, selection.bias)

    def _add_bias(self, span: ImageSpan, values: Tensor) -> None:
        """Adds values (K,) to what every layer adds to the attention logits of the span's tokens as keys."""
        prompt = self.prompt
        if self.flash:
            raise VTPruneError("flash attention takes no bias to learn by; train with attn_implementation='sdpa'")
        if self.bias is None:
            shape = prompt.batch, prompt.offset + prompt.length
            self.bias = values.new_zeros(shape, device=prompt.device)
        places = prompt.offset + span.places[span.kept]
        rows = torch.full_like(places, span.row)
        self.bias = self.bias.index_put((rows, places), values.to(self.bias), accumulate=True)

    def merged(self, span: ImageSpan, states: Tensor) -> Tensor:
        """The states (N, D) of a span's tokens, or the vectors that merging has made of them before the next layer."""
        changed = self._changed.get(id(span))
        return states if changed is None else changed[2].to(states)

    def mark(self, span: ImageSpan) -> None:
        """Notes that only `span.kept` of the image is alive."""
        if span.kept.numel() == span.places.numel():
            return
        if self.alive is None:
            # Once anything is dropped the padding goes with it: layers compute no more than the longest row needs.
            self.alive = self.prompt.real().clone()
        self.alive[span.row, span.places] = False
        self.alive[span.row, span.places[span.kept]] = True

    def take_over(self, other: DecoderRun) -> None:
        """Starts with the tokens and vectors that another run of this prompt has before its first layer."""
        self.alive = None if other.alive is None else other.alive.clone()
        self._changed = dict(other._changed)

    def layout(self, index: int) -> Layout:
        """The layout of a layer; fixed the first time that it is asked for."""
        if index in self._layouts:
            return self._layouts[index]
        previous = self._layouts.get(index - 1, Layout())
        if self.alive is None and not self._changed:
            # Renumbered positions depend on each layer's own past, so they are not handed on.
            embeddings = previous.embeddings if self.rotary is None else None
            layout = Layout(previous.places, previous.ragged, embeddings=embeddings)
        else:
            layout = self._new_layout(previous)
        for span in self.spans:
            if not span.history or span.history[-1][1] is not span.kept:
                span.history.append((index, span.kept))
        self._layouts[index] = layout
        return layout

    def _new_layout(self, previous: Layout) -> Layout:
        places, ragged, relative = previous.places, previous.ragged, None
        if self.alive is not None:
            places = places_of(self.alive if places is None else self._still(places))
            relative = relative_places(places, previous.places, self.prompt.length)
            ragged = len(places) > 1 and bool((places < 0).any())
            self.alive = None
        layout = Layout(places, ragged, relative)
        for row, where, vectors in self._changed.values():
            at = where
            if places is not None:
                at = relative_places(where[None], places[row : row + 1], self.prompt.length)[0]
            layout.vectors.append((row, at, vectors))
        self._changed = {}
        return layout

    def _still(self, places: Tensor) -> Tensor:
        assert self.alive is not None
        before = torch.zeros(*self.alive.shape[:1], self.alive.shape[1] + 1, dtype=torch.bool, device=places.device)
        before.scatter_(1, places.masked_fill(places < 0, self.prompt.length), True)
        return self.alive & before[:, :-1]

    def layer_inputs(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The inputs of decoder layer `index`, cut to the tokens alive, with this layer's own mask."""
        layout = self.layout(index)
        revival = self.revival
        states = args[0] if args else kwargs["hidden_states"]
        if revival is not None:
            states = revival.split(states)
        if layout.relative is not None:
            states = gather_tokens(states, layout.relative)
        states = _place_vectors(states, layout.vectors)
        layout, states = self._pack(index, layout, states)
        slots, ragged = self._announce(index, layout)
        mask = kwargs.get("attention_mask")
        embeddings = self._embeddings(index, layout, states, kwargs["position_embeddings"])
        if revival is not None and revival.active and slots is not None:
            mask = revival.mask(mask, layout.places, slots)
            states, embeddings = revival.join(index, states, embeddings)
        else:
            mask = self._mask(mask, layout, slots, ragged)
            if self.bias is not None:
                mask = biased_mask(mask, self.bias, layout.places, slots, self.prompt.offset, states.dtype)
        kwargs = {**kwargs, "attention_mask": mask}
        if embeddings is not kwargs["position_embeddings"]:
            kwargs["position_embeddings"] = embeddings
            # Gapped 1-D positions would be taken for packed sequences; rotary has used them already.
            kwargs["position_ids"] = None
        if args:
            return (states, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": states}

    def _pack(self, index: int, layout: Layout, states: Tensor) -> tuple[Layout, Tensor]:
        """Of the tokens of a layout those that a routed layer computes, and their hidden states."""
        self.packed = None
        routes = None if self.routed is None else self.routed.routes(self, index, states, layout.places)
        if routes is None:
            return layout, states
        self.packed = Packed.of(states, routes)
        columns = self.packed.columns
        if columns is None:
            return layout, states
        places = columns
        if layout.places is not None:
            places = layout.places.gather(1, columns.clamp(min=0)).masked_fill(columns < 0, -1)
        # Kept while the run lives: slots and masks are known by the identity of these places.
        self._routed_layouts[index] = Layout(places, ragged=len(places) > 1)
        return self._routed_layouts[index], self.packed.inside

    def _announce(self, index: int, layout: Layout) -> tuple[Tensor | None, bool]:
        """The places of the layer's keys, once its cache knows those of this input, and whether they are ragged."""
        prompt = self.prompt
        if self.layers is None:
            return layout.places, layout.ragged
        layer = self.layers[index]
        if index not in self._announced:
            self._announced.add(index)
            front = None if self.revival is None else self.revival.front
            slots = self._extend(layer.slots, layout, front)
            returning = 0 if front is None else front.shape[1]
            ragged = layout.ragged or (returning > 0 and prompt.batch > 1)
            layer.announce(slots, prompt.offset + prompt.length, ragged=ragged, returning=returning)
        return layer.slots, layer.ragged

    def _extend(self, past: Tensor | None, layout: Layout, front: Tensor | None) -> Tensor | None:
        """The slots of a layer after this input, with the places `front` before its own; layers with equal slots share
        one tensor."""
        if past is None and layout.places is None and front is None:
            return None
        key = (id(past), id(layout.places), id(front))
        if key not in self._slots:
            prompt = self.prompt
            old = all_slots(prompt.offset, prompt.batch, prompt.device) if past is None else past
            if layout.places is None:
                new = torch.arange(prompt.offset, prompt.offset + prompt.length, device=prompt.device)
                new = new.expand(prompt.batch, -1)
            else:
                new = torch.where(layout.places < 0, layout.places, layout.places + prompt.offset)
            parts = [old, new] if front is None else [old, front, new]
            # These are kept alive with the entry, so their ids cannot be reused within this forward.
            self._slots[key] = ((past, front), torch.cat([part.to(old.device) for part in parts], dim=1))
        return self._slots[key][1]

    def _mask(self, mask: Tensor | None, layout: Layout, slots: Tensor | None, ragged: bool) -> Tensor | None:
        # Layers of another type (sliding windows) come with another mask.
        key = (id(mask), id(layout.places), id(slots))
        if key not in self._masks:
            offset = self.prompt.offset
            self._masks[key] = (mask, layer_mask(mask, layout.places, slots, offset, ragged=ragged, flash=self.flash))
        return self._masks[key][1]

    def _embeddings(
        self, index: int, layout: Layout, states: Tensor, full: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        if self.rotary is not None:
            return self._compact_embeddings(index, layout, states, full)
        if layout.places is None:
            return full
        if layout.embeddings is None:
            cos, sin = full
            layout.embeddings = gather_tokens(cos, layout.places), gather_tokens(sin, layout.places)
        return layout.embeddings

    def _compact_embeddings(
        self, index: int, layout: Layout, states: Tensor, full: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Rotary embeddings of positions renumbered without the dropped tokens, layer by layer."""
        assert self.rotary is not None
        layer = self.layers[index] if self.layers is not None else None
        shift = None if layer is None else layer.at_end(SHIFT)
        if layout.places is None and shift is None:
            return full
        if layout.embeddings is None:
            prompt = self.prompt
            places = layout.places
            if places is None:
                places = torch.arange(prompt.length, device=prompt.device).expand(prompt.batch, -1)
            # Padding was packed away, too, but it never had a position of its own to give up.
            kept = _marked(places, prompt.length).masked_fill(~prompt.real(), 1)
            gone = prompt.conversations.running_sum(1 - kept)
            before = gone if shift is None else gone + shift.to(gone.device)
            positions = self._positions() - before
            layout.embeddings = self.rotary(states, gather_tokens(positions, places).clamp(min=0))
            layout.shift = before
        if layer is not None and layout.shift is not None:
            layer.extend(SHIFT, layout.shift, self.prompt.offset)
        return layout.embeddings

    def _positions(self) -> Tensor:
        prompt = self.prompt
        if prompt.positions is not None:
            return prompt.positions.expand(prompt.batch, -1)
        column = torch.arange(prompt.offset, prompt.offset + prompt.length, device=prompt.device)
        return column.expand(prompt.batch, -1)

    def cut_caches(self, indices: frozenset[int]) -> None:
        """Leaves in the caches of these layers only the vision tokens that are alive after the last layer. Where
        positions are renumbered, those of later tokens count what a layer's cache holds, whatever it held before."""
        if self.layers is None or not self.spans:
            return
        gone = torch.zeros(self.prompt.batch, self.prompt.offset + self.prompt.length, dtype=torch.bool)
        gone = gone.to(self.prompt.device)
        for span in self.spans:
            span.cut = indices
            final = span.history[-1][1]
            gone[span.row, self.prompt.offset + span.places] = True
            gone[span.row, self.prompt.offset + span.places[final]] = False
        real = self.prompt.real_so_far()
        # Layers that share slots go on sharing them, and their masks.
        known: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        for index in sorted(indices):
            layer = self.layers[index]
            slots = layer.slots
            if slots is None:
                slots = all_slots(gone.shape[1], gone.shape[0], gone.device)
            key = -1 if layer.slots is None else id(slots)
            if key not in known:
                drop = gone.gather(1, slots.clamp(min=0))
                columns = places_of((slots >= 0) & ~drop & real.gather(1, slots.clamp(min=0)))
                new = slots.gather(1, columns.clamp(min=0)).masked_fill(columns < 0, -1)
                known[key] = (new, columns, _marked(slots.masked_fill(~drop, -1), gone.shape[1]))
            new, columns, removed = known[key]
            if bool(removed.any()):
                layer.cut(new, columns)
                if self.rotary is not None:
                    layer.add(SHIFT, removed.cumsum(dim=1))

    def restore(self, states: Tensor, index: int) -> Tensor:
        """Hidden states after layer `index` at the full length: a dropped place repeats the last kept one."""
        front = 0 if self.revival is None else self.revival.width(index)
        states = states[:, front:] if front else states
        places = self.layout(index).places
        if places is None or states.shape[1] != places.shape[1]:
            return states
        return gather_tokens(states, fill_index(places, self.prompt.length))


def _marked(places: Tensor, length: int) -> Tensor:
    """(B, length) 1 at the `places` (B, n) (-1: none) of a sequence, 0 elsewhere, int64."""
    marks = torch.zeros(places.shape[0], length + 1, dtype=torch.long, device=places.device)
    return marks.scatter_(1, places.masked_fill(places < 0, length), 1)[:, :length]


def _place_vectors(states: Tensor, vectors: list[tuple[int, Tensor, Tensor]]) -> Tensor:
    if not vectors:
        return states
    rows = torch.cat([torch.full_like(at, row) for row, at, _ in vectors]).to(states.device)
    columns = torch.cat([at for _, at, _ in vectors]).to(states.device)
    values = torch.cat([value for _, _, value in vectors]).to(states)
    return states.index_put((rows, columns), values)
