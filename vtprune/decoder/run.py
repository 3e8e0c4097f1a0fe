"""One forward of the decoder: vision tokens drop out between layers, masks, positions and caches follow.

A run keeps tokens, layouts and masks. What watches its layers is an `Observer`, what changes their input a `Shaper`;
both keep their own state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from vtprune.cache.adopting import all_slots
from vtprune.cache.books import CacheLayer
from vtprune.cache.layer import PrunedLayer
from vtprune.cache.names import PLANES, SHIFT
from vtprune.cache.slots import Slots
from vtprune.cache.waiting import Tokens
from vtprune.decoder.heads import HeadCascade
from vtprune.decoder.outline import Bools, Ints, Key
from vtprune.decoder.planes import Planes
from vtprune.decoder.prompt import ImageSpan, PromptInfo
from vtprune.encoder.encoding import Call
from vtprune.errors import VTPruneError
from vtprune.method.answers import Selection
from vtprune.method.checks import Checks
from vtprune.method.kinds import VIDEO
from vtprune.tensors.apart import Apart
from vtprune.tensors.compaction import (
    biased_mask,
    fill_index,
    gather_tokens,
    layer_mask,
    pick,
    places_of,
    relative_places,
)

Rotary = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
# The places (T,) of the text tokens of each conversation with an image, by `ImageSpan.key`.
Texts = dict[Key, Tensor]


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


@dataclass(frozen=True)
class Entering:
    """The tokens that a decoder layer computes: those of the input at `layout`, with hidden states (B, n, D), behind
    the ones of earlier forwards that return (`front`), if any; joined: (B, r + n, D) both of them where they stand
    together already; held: the layout of the tokens whose keys and values the layer has, where these are more."""

    layout: Layout
    states: Tensor
    front: Tokens | None = None
    joined: Tensor | None = None
    held: Layout | None = None

    def all_states(self) -> Tensor:
        """(B, r + n, D) the hidden states of all of them."""
        if self.front is None:
            return self.states
        if self.joined is not None:
            return self.joined
        return torch.cat([self.front.states.to(self.states), self.states], dim=1)

    def embeddings(self, own: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The rotary embeddings of all of them, from those of the input's `own`."""
        if self.front is None:
            return own
        cos, sin = (part.expand(self.states.shape[0], *part.shape[1:]) for part in own)
        return (
            torch.cat([self.front.cos.to(cos), cos], dim=1),
            torch.cat([self.front.sin.to(sin), sin], dim=1),
        )


class Shaper:
    """Changes which tokens the layers of one forward compute; this one changes nothing."""

    def enter(self, run: DecoderRun, index: int, states: Tensor) -> Entering:
        """The tokens that layer `index` computes; states: (B, n, D) what the layer before it put out."""
        return run.alive_at(index, states)

    def mask(self, given: Any, places: Tensor | None, slots: Slots | None) -> Tensor | None:
        """The attention mask of the layer that was entered last, cut from the one `given`, None for the run's own;
        places: of its queries, slots: of its keys."""
        return None

    def own_embeddings(self, held: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The rotary embeddings of the input's tokens that the layer entered last computes, from those of all of them
        whose keys it has."""
        return held

    def leave(self, index: int, states: Tensor) -> Tensor:
        """The input's own tokens among the states (B, n, D) that layer `index` put out."""
        return states


@dataclass(frozen=True)
class LayerView:
    """A decoder layer that ran, as observers see it.

    taps: what its projections put out, by name, as constants; hidden: (B, n, D) what the layer did; embeddings:
    cosines and sines (B or 1, n, d) that it turned queries and keys by; mask: what it attended with. places: (B, m) of
    the input's own tokens, the last of the n, None for all; kept: the tokens of each of the run's images that it had.
    """

    index: int
    taps: dict[str, Tensor]
    hidden: Tensor
    embeddings: tuple[Tensor, Tensor]
    mask: Any
    places: Tensor | None
    kept: tuple[Tensor, ...]

    def without_front(self, count: int) -> LayerView:
        """The same without the first `count` tokens, which no other observer has to do with."""
        if not count:
            return self
        cos, sin = self.embeddings
        return replace(
            self,
            taps={name: states[:, count:] for name, states in self.taps.items()},
            hidden=self.hidden[:, count:],
            embeddings=(cos[:, count:], sin[:, count:]),
            mask=None if self.mask is None else self.mask[:, :, count:],
        )


class Observer:
    """Watches the layers of one forward; this one sees nothing. It is handed the run and holds none, so that the run
    goes as soon as the forward is over."""

    def wants(self, index: int) -> bool:
        """Whether it looks at decoder layer `index`."""
        return False

    def after(self, run: DecoderRun, view: LayerView) -> LayerView:
        """Looks at a layer once it ran, and answers what the observers after it see."""
        return view

    def close(self, run: DecoderRun) -> None:
        """Called when the last layer ran."""


class DecoderRun:
    """The tokens, layouts and masks of one decoder forward; made before the first layer, dropped after the last.

    shaper: what changes the input of its layers; observers: what watches them, in the order in which they are asked;
    taps: what the projections of the layer under way put out; states: the layers of linear attention, which fold
    their tokens into a state.
    """

    def __init__(
        self,
        prompt: PromptInfo,
        spans: list[ImageSpan],
        layers: list[CacheLayer] | None,
        *,
        cache: Cache | None,
        flash: bool,
        rotary: Rotary | None,
        states: frozenset[int] = frozenset(),
    ) -> None:
        self.prompt, self.spans, self.layers = prompt, spans, layers
        self.cache, self.flash, self.rotary, self.states = cache, flash, rotary, states
        self.shaper = Shaper()
        self.observers: Sequence[Observer] = ()
        self.taps: dict[str, Tensor] = {}
        # Of the scores that tokens drop by.
        self.checks = Checks()
        # Which heads of planned layers read vision.
        self.cascade = HeadCascade()
        # What is added to vision tokens after the first layers, and the places of those that returned to this one.
        self.planes: Planes | None = None
        # What layers put out before something was added, where the model's own records say that; else None.
        self.bare: dict[int, Tensor] | None = None
        self._front: Tensor | None = None
        # What the layer entered last computes; the last answer of `apart`, and of which places it is.
        self.given = Layout()
        self._apart: tuple[Tensor | None, Apart] | None = None
        # (B, L) which tokens of the input are alive, once some are not, and whether the next layer has other ones.
        self._alive: Tensor | None = None
        self._moved = False
        self.bias: Tensor | None = None
        self._observed = -1
        # Of a run that took over another one's tokens: how many each row has.
        self._taken: list[int] | None = None
        # The last answer of `row_counts`, and what it was for.
        self._counted: tuple[tuple[int, ...], list[int]] | None = None
        self._staying: Ints | None = None
        # By image: the places of its tokens and their new vectors, until the next layer is fed them.
        self._changed: dict[ImageSpan, tuple[Tensor, Tensor]] = {}
        self._layouts: dict[int, Layout] = {}
        self._masks: dict[tuple[int, int, int], tuple[Tensor | None, Tensor | None]] = {}
        self._slots: dict[tuple[int, int, int], tuple[Any, Slots]] = {}
        self._sinces: dict[tuple[int, int, int], tuple[Any, Tensor]] = {}
        self._announced: set[int] = set()
        # The last mask that a state layer was given, and of which places it is.
        self._columns: tuple[Tensor, Tensor] | None = None
        # The rotary embeddings of one sequence as one tensor, and the cosines that they were made of.
        self._both: tuple[Tensor, Tensor] | None = None
        # The last rotary embeddings of returning tokens and others, and what they were made of.
        self._turned: tuple[tuple[Tensor, ...], tuple[Tensor, Tensor]] | None = None

    @cached_property
    def _vision(self) -> tuple[Bools, Bools]:
        """(B, L) where a vision token of this input's images stands, and where any placeholder of them does."""
        tokens = np.zeros((self.prompt.batch, self.prompt.length), dtype=np.bool_)
        every = tokens.copy()
        for span in self.spans:
            tokens[span.row, span.stands] = True
            every[span.row, span.stands] = every[span.row, span.structural] = True
        return tokens, every

    @cached_property
    def _asked(self) -> Ints:
        """(B, L) which conversation each token of its prompt belongs to: images are judged by these."""
        return self.prompt.outline.asked(self._vision[1])

    @cached_property
    def words(self) -> dict[Key, Ints]:
        """The places (T,) of the text that images are judged by, without padding, placeholders and what stands between
        the frames of a video, for each conversation with an image."""
        return self._words_of(self._asked)

    def _words_of(self, number: Ints) -> dict[Key, Ints]:
        text = np.where(self._vision[1], -1, number)
        for span in self.spans:
            if span.image.kind == VIDEO:
                # What stands between its frames (when they were taken) is the video's, no question about it.
                text[span.row, span.first : span.stands[-1]] = -1
        keys = {span.key for span in self.spans}
        return {(row, talk): (text[row] == talk).nonzero()[0] for row, talk in keys}

    @cached_property
    def texts(self) -> Texts:
        """`words`, on the device."""
        return {key: self.on_device(places) for key, places in self.words.items()}

    @cached_property
    def unlabelled_words(self) -> dict[Key, Ints]:
        """The places of each conversation's text without answers: weights that learn are never shown one."""
        outline = self.prompt.outline
        words = self._words_of(outline.number)
        if outline.answers is None:
            return words
        return {key: places[~outline.answers[key[0], places]] for key, places in words.items()}

    @cached_property
    def unlabelled(self) -> Texts:
        """`unlabelled_words`, on the device."""
        return {key: self.on_device(places) for key, places in self.unlabelled_words.items()}

    def on_device(self, places: Ints) -> Tensor:
        """Places (T,) as a tensor."""
        return torch.from_numpy(places).to(self.prompt.device)

    def ends(self, kept: Sequence[int], *, packed: bool) -> tuple[list[list[int]], list[list[int]]]:
        """The columns of the first token of each conversation and of the last one of its prompt, both (B, C), 0 where
        a row holds fewer. kept: tokens alive of each image; packed: whether only what is alive has a column."""
        if not packed:
            return self._whole_ends
        first, last, counts = [], [], self.row_counts(kept)
        for row, (starts, ends) in enumerate(zip(*self._whole_ends, strict=True)):
            pad = max(counts) - counts[row]
            first.append([pad + self._before(row, start, kept) if start else pad for start in starts])
            # What is alive at the end of the input is counted already.
            whole = self.prompt.length - 1
            last.append(
                [max(0, pad + (counts[row] if end == whole else self._before(row, end + 1, kept)) - 1) for end in ends]
            )
        return first, last

    def column_after(self, span: ImageSpan, kept: Sequence[int], *, packed: bool) -> int:
        """The column after an image's last token, where so many of each image are alive."""
        end = int(span.stands[-1]) + 1
        if not packed:
            return end
        counts = self.row_counts(kept)
        return max(counts) - counts[span.row] + self._before(span.row, end, kept)

    @cached_property
    def _whole_ends(self) -> tuple[list[list[int]], list[list[int]]]:
        """By row, the places where each conversation begins, and those where its prompt ends."""
        outline = self.prompt.outline
        first, last = [], []
        for own, asked in zip(outline.number, self._asked, strict=True):
            starts, ends = [], []
            for talk in range(outline.most):
                mine, prompt = (own == talk).nonzero()[0], (asked == talk).nonzero()[0]
                starts.append(int(mine[0]) if mine.size else 0)
                ends.append(int(prompt[-1]) if prompt.size else 0)
            first.append(starts)
            last.append(ends)
        return first, last

    @property
    def _never_dropped(self) -> Ints:
        """(B, L + 1) how many tokens before each place are no padding and no vision tokens, newlines that were dropped
        left out."""
        if self._staying is None:
            stays = (self.prompt.outline.number >= 0) & ~self._vision[0]
            for span in self.spans:
                stays[span.row, span.gone] = False
            self._staying = np.zeros((len(stays), self.prompt.length + 1), dtype=np.int64)
            np.cumsum(stays, axis=1, out=self._staying[:, 1:])
        return self._staying

    def _before(self, row: int, place: int, kept: Sequence[int]) -> int:
        """Tokens alive before a place of a row that is not inside an image."""
        own = (count for span, count in zip(self.spans, kept, strict=True) if span.row == row and span.first < place)
        return int(self._never_dropped[row, place]) + sum(own)

    def row_counts(self, kept: Sequence[int] | None = None) -> list[int]:
        """(B,) tokens of each row that are alive, where so many of each image are (None: as many as now)."""
        if self._taken is not None:
            return self._taken
        key = tuple(span.kept.numel() for span in self.spans) if kept is None else tuple(kept)
        if self._counted is None or self._counted[0] != key:
            self._counted = key, [self._before(row, self.prompt.length, key) for row in range(self.prompt.batch)]
        return self._counted[1]

    def before(self, span: ImageSpan, kept: Sequence[int]) -> int:
        """Tokens of this input that are alive before an image, where so many of each image are."""
        return self._before(span.row, span.first, kept)

    def apart(self, kept: Sequence[int]) -> Apart:
        """The tokens that the layer entered last is given, vision apart from all else, where it has so many of each
        image; the same for layers with the same tokens."""
        places, known = self.given.places, self._apart
        if known is None or known[0] is not places:
            counts = [0] * self.prompt.batch
            for span, count in zip(self.spans, kept, strict=True):
                counts[span.row] += count
            vision = torch.from_numpy(self._vision[0]).to(self.prompt.device)
            if places is not None:
                vision = vision.gather(1, places.clamp(min=0)) & (places >= 0)
            known = self._apart = places, Apart.of(vision, counts)
        return known[1]

    def drop(self, span: ImageSpan, selection: Selection) -> None:
        """Keeps only the selected ones of the tokens that the span still has, from the next layer on."""
        left = selection.kept.to(span.kept.device)
        start = self._observed + 1
        if self.planes is not None and start < self.planes.depth:
            self.planes.follow(selection, span.row, span.standing, start=start)
        span.keep(left)
        self.mark(span)
        vectors, earlier = selection.vectors, self._changed.get(span)
        if vectors is None and earlier is not None:
            vectors = earlier[1][left.to(earlier[1].device)]
        if vectors is not None:
            self._changed[span] = span.standing, vectors
        if selection.bias is not None:
            self._add_bias(span, selection.bias)

    def drop_structural(self, span: ImageSpan, gone: Ints) -> None:
        """Takes some of an image's placeholders that are no vision tokens out, before the first layer."""
        span.gone, self._staying, self._counted = gone, None, None
        self.mark(span)
        assert self._alive is not None
        self._alive[span.row, self.on_device(gone)] = False

    def _add_bias(self, span: ImageSpan, values: Tensor) -> None:
        """Adds values (K,) to what every layer adds to the attention logits of the span's tokens as keys."""
        prompt = self.prompt
        if self.states:
            raise VTPruneError(
                "linear-attention layers have no attention logits that a bias could be learned by; train on a decoder "
                "without such layers, or by the attention of a layer"
            )
        if self.flash:
            raise VTPruneError("flash attention takes no bias to learn by; train with attn_implementation='sdpa'")
        if self.bias is None:
            shape = prompt.batch, prompt.offset + prompt.length
            self.bias = values.new_zeros(shape, device=prompt.device)
        places = prompt.offset + span.standing
        rows = torch.full_like(places, span.row)
        self.bias = self.bias.index_put((rows, places), values.to(self.bias), accumulate=True)

    def merged(self, span: ImageSpan, states: Tensor) -> Tensor:
        """The states (N, D) of a span's tokens, or the vectors that merging has made of them before the next layer."""
        changed = self._changed.get(span)
        return states if changed is None else changed[1].to(states)

    def mark(self, span: ImageSpan) -> None:
        """Notes that only `span.kept` of the image is alive."""
        if span.kept.numel() == span.places.numel():
            return
        if self._alive is None:
            # Once anything is dropped the padding goes with it: layers compute no more than the longest row needs.
            self._alive = self._real(self.prompt.real()).clone()
        self._alive[span.row].index_fill_(0, span.places, False).index_fill_(0, span.standing, True)
        self._moved = True

    def _real(self, real: Tensor) -> Tensor:
        """(B, L) what is no padding; an image counts with all of its tokens, whatever the mask hides of it."""
        if not self._hides_vision:
            return real
        own = torch.from_numpy(self._vision[0]).to(real.device)
        return real | torch.nn.functional.pad(own, (real.shape[1] - own.shape[1], 0))

    @cached_property
    def _hides_vision(self) -> bool:
        """Whether the mask calls a vision token padding."""
        return bool((self._vision[0] & (self.prompt.outline.number < 0)).any())

    def take_over(self, other: DecoderRun) -> None:
        """Starts with the tokens and vectors that another run of this prompt has before its first layer."""
        self._alive, self._moved = None if other._alive is None else other._alive.clone(), other._moved
        self._taken = other.row_counts()
        self._changed = dict(other._changed)
        self.planes = other.planes

    def layout(self, index: int) -> Layout:
        """The layout of a layer; fixed the first time that it is asked for."""
        if index in self._layouts:
            return self._layouts[index]
        previous = self._layouts.get(index - 1, Layout())
        if not self._moved and not self._changed:
            # Renumbered positions depend on each layer's own past, so they are not handed on.
            embeddings = previous.embeddings if self.rotary is None else None
            layout = Layout(previous.places, previous.ragged, embeddings=embeddings)
        else:
            layout = self._new_layout(previous)
        for span in self.spans:
            span.layers.append(span.kept)
        self._layouts[index] = layout
        return layout

    def _new_layout(self, previous: Layout) -> Layout:
        places, ragged, relative = previous.places, previous.ragged, None
        if self._moved:
            assert self._alive is not None
            counts = self.row_counts()
            if places is None:
                places = relative = places_of(self._alive, counts)
            else:
                relative = places_of(self._still(places), counts)
                places = pick(places, relative)
            ragged = min(counts) < max(counts)
            self._moved = False
        layout = Layout(places, ragged, relative)
        for span, (where, vectors) in self._changed.items():
            at = where
            if places is not None:
                at = relative_places(where[None], places[span.row, None], self.prompt.length)[0]
            layout.vectors.append((span.row, at, vectors))
        self._changed = {}
        return layout

    def _still(self, places: Tensor) -> Tensor:
        """(B, n) which of the tokens at these places (B, n) are alive."""
        assert self._alive is not None
        if len(places) == 1:
            # A row alone has no padding.
            return self._alive.gather(1, places)
        return self._alive.gather(1, places.clamp(min=0)) & (places >= 0)

    def alive_at(self, index: int, states: Tensor) -> Entering:
        """The tokens alive at decoder layer `index`; states: (B, n, D) of the input's own tokens that the layer before
        it put out."""
        layout = self.layout(index)
        if layout.relative is not None:
            states = gather_tokens(states, layout.relative)
        return Entering(layout, _place_vectors(states, layout.vectors))

    def layer_inputs(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The inputs of decoder layer `index`, cut to the tokens that it computes, with this layer's own mask."""
        entering = self.shaper.enter(self, index, args[0] if args else kwargs["hidden_states"])
        layout = self.given = entering.layout
        self._front = None if entering.front is None else entering.front.places
        slots, ragged = self._announce(index, entering)
        given = kwargs.get("attention_mask")
        mask = self.shaper.mask(given, layout.places, slots)
        if index in self.states:
            mask = self._state_mask(given, layout)
        elif mask is None:
            if entering.held is not None:
                # Queries that are some of the tokens only do not attend as the model's own causal mask has it.
                slots, ragged = slots or self._every_slot, True
            mask = self._mask(given, layout, slots, ragged)
            if self.bias is not None:
                mask = biased_mask(
                    mask=mask, bias=self.bias, queries=layout.places, keys=None if slots is None else slots.tensor,
                    offset=self.prompt.offset, dtype=entering.states.dtype,
                )  # fmt: skip
        held = entering.held or layout
        embeddings = self._embeddings(index, held, entering.states, kwargs["position_embeddings"])
        embeddings = self.shaper.own_embeddings(embeddings)
        states, embeddings = entering.all_states(), self._joined_embeddings(entering, embeddings)
        kwargs = {**kwargs, "attention_mask": mask}
        if embeddings is not kwargs["position_embeddings"]:
            kwargs["position_embeddings"] = embeddings
            # Gapped 1-D positions would be taken for packed sequences; rotary has used them already.
            kwargs["position_ids"] = None
        if args:
            return (states, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": states}

    def with_planes(self, index: int, states: Tensor) -> Tensor:
        """The states (B, r + n, D) that layer `index` put out, with what the decoder adds after it to vision tokens,
        those that returned to it among them."""
        front, planes = self._front, self.planes
        if self.bare is not None:
            self.bare[index] = states
        if planes is not None and index < planes.depth:
            own = states if front is None else states[:, front.shape[1] :]
            own = own + planes.at(index, self.layout(index).places).to(own)
            states = own if front is None else torch.cat([states[:, : front.shape[1]], own], dim=1)
        known = None if front is None or self.layers is None else self.entries(index).aux.get(PLANES)
        if front is None or known is None:
            return states
        back = states[:, : front.shape[1]] + gather_tokens(known, front).to(states)
        return torch.cat([back, states[:, front.shape[1] :]], dim=1)

    def leave_planes(self) -> None:
        """Leaves with the cache what tokens of this input need of them if they return."""
        if self.planes is None or self.layers is None:
            return
        for index in range(self.planes.depth):
            self.entries(index).extend(PLANES, self.planes.at(index, None), self.prompt.offset)

    def _joined_embeddings(self, entering: Entering, own: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The rotary embeddings of all tokens of a layer; layers with the same ones share them."""
        if entering.front is None:
            return own
        key = entering.front.places, own[0], own[1]
        if self._turned is None or any(one is not two for one, two in zip(key, self._turned[0], strict=True)):
            self._turned = key, entering.embeddings(own)
        return self._turned[1]

    def observe(self, index: int, output: Any, kwargs: dict[str, Any]) -> None:
        """Shows a layer that ran, with these keyword arguments, to those who watch it: once, in their order."""
        watching = [one for one in self.observers if one.wants(index)] if index > self._observed else []
        self._observed = max(index, self._observed)
        if watching:
            view = LayerView(
                index=index,
                # What is tapped makes choices, which have no gradient; what merges or waits for later has one.
                taps={name: _chosen_by(states) for name, states in self.taps.items()},
                hidden=output[0] if isinstance(output, tuple) else output,
                embeddings=kwargs["position_embeddings"],
                mask=kwargs.get("attention_mask"),
                places=self.layout(index).places,
                kept=tuple(span.kept for span in self.spans),
            )
            for observer in watching:
                view = observer.after(self, view)
        self.taps.clear()

    def cached(self, index: int, count: int) -> tuple[Tensor, Tensor] | None:
        """(B, KV, n, d) the keys and values of the last `count` tokens that a layer has just computed, as its cache
        has them, None without a cache of such; nobody writes into them."""
        layer = None if self.layers is None else self.layers[index]
        if not isinstance(layer, PrunedLayer) or layer.expects or layer.keys is None or layer.values is None:
            return None
        keys, values = _chosen_by(layer.keys), _chosen_by(layer.values)
        past = keys.shape[2] - count
        return (keys[:, :, past:], values[:, :, past:]) if past else (keys, values)

    def entries(self, index: int) -> PrunedLayer:
        """The cache of decoder layer `index`, which holds entries."""
        assert self.layers is not None
        layer = self.layers[index]
        assert isinstance(layer, PrunedLayer)
        return layer

    def _announce(self, index: int, entering: Entering) -> tuple[Slots | None, bool]:
        """The places of the layer's keys, once its cache knows those of this input, and whether they are ragged."""
        prompt, layout = self.prompt, entering.held or entering.layout
        if self.layers is None:
            return self._extend(None, layout, None), layout.ragged
        if index in self.states:
            # Its cache knows no places, and it has a mask of its own kind.
            return None, layout.ragged
        layer = self.entries(index)
        if index not in self._announced:
            self._announced.add(index)
            front = None if entering.front is None else entering.front.places
            slots = self._extend(layer.places, layout, front)
            ragged = layout.ragged or (front is not None and prompt.batch > 1)
            since = self._extended_since(layer, slots, front)
            layer.announce(slots, prompt.offset + prompt.length, ragged=ragged, since=since)
        return layer.places, layer.ragged

    def _extended_since(self, layer: PrunedLayer, slots: Slots | None, front: Tensor | None) -> Tensor | None:
        """`PrunedLayer.since` for the `slots` of a layer after this input, with the places `front` before its own;
        layers with the same slots share one tensor."""
        past = layer.since
        if slots is None or (front is None and past is None):
            return past
        key = (id(past), id(slots), id(front))
        if key not in self._sinces:
            held = 0 if layer.keys is None else layer.keys.shape[-2]
            returning = 0 if front is None else front.shape[1]
            whole = slots.tensor
            old = whole.new_zeros(held) if past is None else past
            came = whole.new_full((returning,), self.prompt.offset)
            new = whole.new_zeros(whole.shape[1] - held - returning)
            self._sinces[key] = ((past, slots, front), torch.cat([old, came, new]))
        return self._sinces[key][1]

    @cached_property
    def _every_slot(self) -> Slots:
        """The slots of a layer that has all places up to the end of this input."""
        prompt = self.prompt
        return Slots(all_slots(prompt.offset + prompt.length, prompt.batch, prompt.device))

    def _extend(self, past: Slots | None, layout: Layout, front: Tensor | None) -> Slots | None:
        """The slots of a layer after this input, with the places `front` before its own; layers with the same slots go
        on sharing them."""
        if past is None and layout.places is None and front is None:
            return None
        key = (id(past), id(layout.places), id(front))
        if key not in self._slots:
            # These are kept alive with the entry, so their ids cannot be reused within this forward.
            self._slots[key] = ((past, front), self._extended(past, layout.places, front))
        return self._slots[key][1]

    def _extended(self, past: Slots | None, places: Tensor | None, front: Tensor | None) -> Slots:
        prompt = self.prompt
        if past is not None and places is None and front is None:
            return past.extended(prompt.offset, prompt.length)
        if places is not None and not prompt.offset:
            return Slots(places)
        old = all_slots(prompt.offset, prompt.batch, prompt.device) if past is None else past.tensor
        if places is None:
            new = all_slots(prompt.offset + prompt.length, prompt.batch, prompt.device)[:, prompt.offset :]
        else:
            new = torch.where(places < 0, places, places + prompt.offset)
        parts = [old, new] if front is None else [old, front, new]
        return Slots(torch.cat([part.to(old.device) for part in parts], dim=1))

    def _mask(self, mask: Tensor | None, layout: Layout, slots: Slots | None, ragged: bool) -> Tensor | None:
        if slots is None or (mask is None and not ragged):
            return mask
        # Layers of another type (sliding windows) come with another mask.
        key = (id(mask), id(layout.places), id(slots))
        if key not in self._masks:
            own = layer_mask(mask, layout.places, slots.tensor, self.prompt.offset, ragged=ragged, flash=self.flash)
            self._masks[key] = (mask, own)
        return self._masks[key][1]

    def _state_mask(self, mask: Tensor | None, layout: Layout) -> Tensor | None:
        """(B, n) which columns of a state layer hold a token, None for all: padding before a row's first token leaves
        no trace in its state, and what was dropped has no column. `mask`: the model's own, for all places."""
        places = layout.places
        if places is None:
            return mask
        if not layout.ragged:
            return None
        if self.prompt.offset:
            raise VTPruneError(
                "rows that go on after a cache are left with different numbers of tokens, and padding between the two "
                "would change the state of linear-attention layers; give each conversation a cache of its own"
            )
        if self._columns is None or self._columns[0] is not places:
            self._columns = places, places >= 0
        return self._columns[1]

    def _embeddings(
        self, index: int, layout: Layout, states: Tensor, full: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        if self.rotary is not None:
            return self._compact_embeddings(index, layout, states, full)
        if layout.places is None:
            return full
        if layout.embeddings is None:
            layout.embeddings = self._cut_embeddings(layout.places, full)
        return layout.embeddings

    def _cut_embeddings(self, places: Tensor, full: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The rotary embeddings at these places (B, n), from the `full` ones: of one sequence both are cut at once."""
        if len(places) > 1 or full[0].device != full[1].device:
            return gather_tokens(full[0], places), gather_tokens(full[1], places)
        if self._both is None or self._both[0] is not full[0]:
            self._both = full[0], torch.stack(full)
        cos, sin = self._both[1].index_select(2, places[0].to(full[0].device)).unbind()
        return cos, sin

    def _compact_embeddings(
        self, index: int, layout: Layout, states: Tensor, full: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Rotary embeddings of positions renumbered without the dropped tokens, layer by layer."""
        assert self.rotary is not None
        layer = self.entries(index) if self.layers is not None else None
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
        """Leaves in the caches of these layers only the vision tokens that are alive after the last layer; a state
        stays as it is. Where positions are renumbered, those of later tokens count what a layer's cache holds,
        whatever it held before."""
        if self.layers is None or not self.spans:
            return
        more = [
            index
            for index in sorted(indices - self.states)
            # A layer that is checkpointed alone ran without its cache.
            if not self.entries(index).expects
            and any(span.layers[index].numel() > span.layers[-1].numel() for span in self.spans)
        ]
        if not more:
            return
        offset, end = self.prompt.offset, self.prompt.offset + self.prompt.length
        gone = torch.zeros(self.prompt.batch, end, dtype=torch.bool, device=self.prompt.device)
        for span in self.spans:
            final = span.places.index_select(0, span.layers[-1])
            gone[span.row, offset:].index_fill_(0, span.places, True).index_fill_(0, final, False)
        stay = self._real(self.prompt.real_so_far()) & ~gone
        left = self.row_counts([span.layers[-1].numel() for span in self.spans])
        # Layers that share slots go on sharing them, and their masks.
        known: dict[int, tuple[Slots, Tensor, Tensor | None]] = {}
        for index in more:
            layer = self.entries(index)
            slots = layer.slots
            if slots is None:
                slots = all_slots(gone.shape[1], gone.shape[0], gone.device)
            key = -1 if layer.places is None else id(layer.places)
            if key not in known:
                at = slots.clamp(min=0) if layer.ragged else slots
                stays = (stay.gather(1, at) & (slots >= 0)) if layer.ragged else stay.gather(1, at)
                columns = places_of(stays, None if self.prompt.offset else left)
                new, removed = pick(slots, columns), None
                if self.rotary is not None:
                    removed = _marked(slots.masked_fill(~gone.gather(1, at), -1), gone.shape[1])
                known[key] = (Slots(new), columns, removed)
            stay_at, columns, removed = known[key]
            layer.cut(stay_at, columns)
            if removed is not None:
                layer.add(SHIFT, removed.cumsum(dim=1))

    def restore(self, states: Tensor, index: int) -> Tensor:
        """Hidden states after layer `index` at the full length: a dropped place repeats the last kept one."""
        states = self.shaper.leave(index, states)
        places = self.layout(index).places
        if places is None or states.shape[1] != places.shape[1]:
            return states
        return gather_tokens(states, fill_index(places, self.prompt.length))


def _chosen_by(states: Tensor) -> Tensor:
    """States that choices are made by, which have no gradient."""
    return states.detach() if states.requires_grad else states


def _marked(places: Tensor, length: int) -> Tensor:
    """(B, length) 1 at the `places` (B, n) (-1: none) of a sequence, 0 elsewhere, int64."""
    marks = torch.zeros(places.shape[0], length + 1, dtype=torch.long, device=places.device)
    return marks.scatter_(1, places.masked_fill(places < 0, length), 1)[:, :length]


def _place_vectors(states: Tensor, vectors: list[tuple[int, Tensor, Tensor]]) -> Tensor:
    if not vectors:
        return states
    columns = torch.cat([at for _, at, _ in vectors]).to(states.device)
    values = torch.cat([value for _, _, value in vectors]).to(states)
    if len(states) == 1:
        return states.index_copy(1, columns, values[None])
    rows = torch.cat([torch.full_like(at, row) for row, at, _ in vectors]).to(states.device)
    return states.index_put((rows, columns), values)
