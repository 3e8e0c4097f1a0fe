"""Hooks of the decoder: the prompt is compacted between its layers, hidden states come back at full length."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers.cache_utils import Cache

from vtprune.adapters.base import Adapter
from vtprune.adapters.seams import PIXELS
from vtprune.cache.adopting import (
    adopt_cache,
    cache_in,
    logical_length,
    unsupported_cache,
    unsupported_reason,
    with_cache,
)
from vtprune.cache.books import CacheLayer
from vtprune.decoder.outline import Bools
from vtprune.decoder.planes import Planes
from vtprune.decoder.prompt import ImageSpan, PromptInfo, real_tokens, sight
from vtprune.decoder.revival import Revival
from vtprune.decoder.run import DecoderRun, Observer
from vtprune.decoder.states import check_padding
from vtprune.encoder.encoding import EncodedImage
from vtprune.errors import VTPruneError
from vtprune.hooks.attention import PlannedLayers
from vtprune.hooks.checkpoints import Checkpoints, drops_cache
from vtprune.hooks.eviction import Evictor
from vtprune.hooks.learning import Teacher
from vtprune.hooks.newlines import drop_newlines
from vtprune.hooks.probe import Prober
from vtprune.hooks.recording import Recorder, number_rows
from vtprune.hooks.records import records_of
from vtprune.hooks.returning import Leaving, Returning
from vtprune.hooks.routing import RoutedLayers
from vtprune.hooks.scoring import DecoderScoring
from vtprune.hooks.selecting import TAPS, Dropping, Inputs, Selecting, by_prompt
from vtprune.hooks.state import FRAME, PLAN, RUN, Frame, ThreadState
from vtprune.hooks.taps import Find, Taps
from vtprune.method.facts import ModelFacts
from vtprune.method.plan import Plans
from vtprune.method.sharing import Sharing
from vtprune.method.stages import Query, acts, spares


class DecoderHooks:
    """The decoder's side of a wrapped model."""

    def __init__(
        self,
        adapter: Adapter,
        plans: Plans,
        facts: ModelFacts,
        state: ThreadState,
        *,
        taps: Taps,
        sharing: Sharing | None,
        compact: bool,
        newlines: str,
        maker: object,
        modules: dict[int, nn.Module],
    ) -> None:
        pruners = list(plans.pruners)
        self.adapter, self.pruners, self.facts, self.state, self.compact = adapter, pruners, facts, state, compact
        self._plans, self._sharing, self._newlines = plans, sharing, newlines
        scoring = DecoderScoring(adapter, pruners, self._plans)
        self._evictor = Evictor(adapter, pruners, self._plans)
        self._selecting = Selecting(scoring, facts, modules, sharing)
        self.teacher = Teacher(pruners, scoring=scoring, state=state)
        # By layer, what is tapped of its projections where no cache holds it.
        uncached: dict[int, set[str]] = {layer: set() for layer in self._evictor.watched}
        uncached.update({layer: names for layer, names in self._selecting.taps.items() if names})
        uncached.update({layer: set(TAPS[Query.ALL]) for layer in self.teacher.layers})
        self._taps, self._uncached, self.tapped = taps, uncached, frozenset(uncached)
        self._returning = Returning(adapter, pruners, self.tapped)
        self.planned = PlannedLayers(adapter, pruners, self._plans, tapped=self.tapped, state=state)
        self.routing = RoutedLayers(adapter, pruners, self._plans, modules=modules, state=state)
        # Layers after which the decoder adds something to vision tokens.
        self.adding = frozenset(range(len(adapter.plane_mergers)))
        self.entered = self._selecting.layers | self.tapped | self.routing.layers | self.adding
        self.recorder = Recorder(adapter, plans, facts, state=state, sharing=sharing)
        self.checkpoints = Checkpoints(adapter.decoder_layers, state)
        self.modules = modules
        # Which method decides by every token that it reads, so that none may be taken back.
        self.reads_all = self._returning.pruner or self._evictor.pruner
        self._maker = maker
        self._signature = inspect.signature(adapter.inner.forward)
        self._depth, self._states = facts.decoder_depth, adapter.state_layers

    def tap(self) -> None:
        """Hooks the projections of queries in the layers that methods look at."""
        self._follow("queries", {layer: {"q"} for layer in self.tapped})

    def _follow(self, group: str, taps: dict[int, set[str]]) -> None:
        def find() -> list[Find]:
            layers = list(self.adapter.decoder_layers)
            return [self.adapter.decoder_taps(layers[index]).only(names).modules for index, names in taps.items()]

        self._taps.follow(group, find)

    def _some_drop_cache(self) -> bool:
        """Whether layers that methods look at run without the cache now, since they alone are checkpointed."""
        layers = list(self.adapter.decoder_layers) if self.tapped else []
        return any(drops_cache(layers[index]) for index in self.tapped)

    def open_frame(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Begins a forward of the multimodal model: what it is given reaches the decoder with the call's arguments."""
        inputs = self._signature.bind(*args, **kwargs).arguments
        frame = Frame(inputs)
        self.state.frame = frame
        given = inputs.get("mm_encoder_outputs") or {}
        known = {source.kind for source in self.adapter.sources()}
        others = inputs.get("kwargs", {})
        for kind, pixels in PIXELS.items():
            encoded = given.get(kind)
            given_pixels = inputs.get(pixels, others.get(pixels))
            if kind not in known and (given_pixels is not None or encoded is not None):
                raise VTPruneError(
                    f"{kind} inputs are not supported by {self.adapter.name}, which takes {' and '.join(known)}s"
                )
            if encoded is not None:
                frame.encoded[kind] = self._known(records_of(encoded))
        return args, {**kwargs, FRAME: frame}

    def _known(self, records: list[EncodedImage | None]) -> list[EncodedImage]:
        known = [image for image in records if image is not None and image.maker is self._maker]
        if len(known) == len(records):
            return known
        if not any(acts(pruner) for pruner in self.pruners):
            return []
        raise VTPruneError(
            "these image features were not made by this wrapped model's get_image_features (or were cut by "
            "prefill_chunk_size, which is not supported); pass pixel_values instead"
        )

    def open_decoder(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Begins a forward of the decoder: methods choose what enters, and a run goes along to the layers."""
        self.checkpoints.refresh()
        frame = kwargs.pop(FRAME, None)
        if frame is None or kwargs.get("inputs_embeds") is None:
            return None
        embeds = kwargs["inputs_embeds"]
        cache = self._cache(module, kwargs)
        prompt = self._prompt(embeds, cache, kwargs)
        spans = self._spans(frame, embeds, prompt)
        flash = self.adapter.flash
        if spans:
            self._check_packed(prompt, kwargs, flash=flash)
        layers = self._adopt(cache, spans)
        if layers is None and not spans and not self.routing.routes_text:
            return args, kwargs
        if layers is None or (spans and self._some_drop_cache()):
            # From here on keys and values are tapped, too.
            self._follow("uncached", {layer: names - {"q"} for layer, names in self._uncached.items()})
        rotary = self.adapter.rotary if self.compact else None
        if self._states:
            check_padding(prompt, layers, drops=self._drops(spans))
        run = DecoderRun(prompt, spans, layers, cache=cache, flash=flash, rotary=rotary, states=self._states)
        run.checks, frame.closed = frame.checks, True
        if spans:
            kwargs = dict(kwargs)
            planes = self.adapter.take_planes(kwargs)
            run.planes = None if planes is None else Planes(*planes)
            asked = kwargs.get("output_hidden_states")
            if planes is not None and (self.adapter.records_states if asked is None else asked):
                run.bare = {}
        recording, lessons = self.recorder.open(run), self.teacher.open(run)
        revival = self._returning.open(run)
        run.shaper = revival or self.routing.open(run, recording, lessons) or run.shaper
        if layers is not None and prompt.offset == 0:
            number_rows(run)
        if layers is not None and (prompt.offset == 0 or spans):
            self.adapter.remember(layers, prompt)
        ids = frame.inputs.get("input_ids") if frame.inputs.get("inputs_embeds") is None else None
        prober, dropping = Prober(self.adapter, module, args, kwargs, run=run), Dropping(lessons, recording)
        self._selecting.before_decoder(prober, dropping, Inputs(embeds, ids))
        drop_newlines(run, recording, self._newlines)
        run.observers = self._observers(run, dropping, revival)
        recording.begin(run)
        if cache is not cache_in(kwargs):
            kwargs = with_cache(module.forward, kwargs, cache)
        return args, {**kwargs, RUN: run}

    def _observers(self, run: DecoderRun, dropping: Dropping, revival: Revival | None) -> list[Observer]:
        """Who watches a forward, in the order in which they are shown each layer and told of the end."""
        watching = (
            self._returning.choosing(revival),
            self._selecting.open(run, dropping),
            dropping.lessons,
            None if revival is None else Leaving(revival),
            self._evictor.open(run),
            dropping.recording,
        )
        return [observer for observer in watching if observer is not None]

    def _cache(self, module: Any, kwargs: dict[str, Any]) -> Cache | None:
        cache: Cache | None = cache_in(kwargs)
        if drops_cache(module):
            return None
        if cache is None:
            use_cache = kwargs.get("use_cache")
            use_cache = self.adapter.caches if use_cache is None else use_cache
            cache = self.adapter.new_cache() if use_cache else None
        return cache

    def _prompt(self, embeds: Tensor, cache: Cache | None, kwargs: dict[str, Any]) -> PromptInfo:
        mask = real_tokens(kwargs.get("attention_mask"))
        positions = kwargs.get("position_ids")
        batch, length = embeds.shape[:2]
        offset = logical_length(cache)
        labels = self.state.labels
        if labels is not None and labels.shape != (batch, length):
            if self.modules:
                raise VTPruneError(f"labels say what each of ({batch}, {length}) tokens is, got {tuple(labels.shape)}")
            # Nobody learns from them; the model itself refuses those that it is to make a loss of.
            labels = None
        return PromptInfo(
            batch=batch,
            length=length,
            offset=offset,
            device=embeds.device,
            mask=mask,
            positions=positions,
            cached=cache is not None,
            labels=labels,
            sees=sight(kwargs.get("attention_mask")),
        )

    def _check_packed(self, prompt: PromptInfo, kwargs: dict[str, Any], *, flash: bool) -> None:
        """Raises VTPruneError where conversations are packed into one row in a way that pruning would mix up."""
        packed = prompt.conversations.most > 1
        if self._states and (packed or kwargs.get("cu_seq_lens_q") is not None):
            raise VTPruneError(
                "several conversations are packed into one row, and the state of linear-attention layers would go on "
                "from one to the next; give each of them a row of its own"
            )
        if flash and (packed or kwargs.get("cu_seq_lens_q") is not None):
            raise VTPruneError(
                "several conversations are packed into one row, and flash attention is told where they end by "
                "position ids or lengths that no longer hold once tokens are dropped; load the model with "
                "attn_implementation='sdpa' or 'eager', or give each conversation a row of its own"
            )
        if packed and prompt.cached and self.reads_all is not None:
            raise VTPruneError(
                f"{self.reads_all.name} decides by every token that is read what stays in the cache, and one row of "
                "it holds several conversations here; give each of them a row of its own"
            )

    def _spans(self, frame: Frame, embeds: Tensor, prompt: PromptInfo) -> list[ImageSpan]:
        """Where each image of this forward stands, in the order of the prompt."""
        sources = [source for source in self.adapter.sources() if frame.encoded.get(source.kind)]
        if not sources:
            return []
        given, ids = frame.inputs.get("inputs_embeds"), frame.inputs.get("input_ids")
        shown = embeds if given is None else given
        marks = prompt.look([self.adapter.placeholders(source, ids, shown) for source in sources]).marks
        spans = [
            span
            for source, own in zip(sources, marks, strict=True)
            for span in self._placed(source.kind, frame.encoded[source.kind], own, prompt)
        ]
        spans = spans if len(sources) == 1 else sorted(spans, key=lambda span: (span.row, span.first))
        if self._sharing is not None:
            # What the method leaves whole has no part in the budget.
            pruned = [span for span in spans if not any(spares(one, span.image.kind) for one in self.pruners)]
            for own in by_prompt(pruned):
                for span, share in zip(own, self._sharing.counts([span.image.total for span in own]), strict=True):
                    span.share = share
        return spans

    def _placed(self, kind: str, images: list[EncodedImage], marks: Bools, prompt: PromptInfo) -> Iterator[ImageSpan]:
        """What one source shows: features fill its placeholders in row-major order."""
        rows, places = marks.nonzero()
        first = 0
        for image in images:
            last = first + image.length
            if last > rows.size or rows[first] != rows[last - 1]:
                raise VTPruneError(
                    f"the prompt has {rows.size} {kind} placeholders, its {kind}s need "
                    f"{sum(one.length for one in images)} in unbroken rows"
                )
            row, own = int(rows[first]), places[first:last]
            slots = np.arange(image.length) if image.slots is None else image.slots.cpu().numpy()
            yield ImageSpan(
                row=row,
                stands=own[slots],
                image=image,
                kept=image.alive.to(prompt.device),
                offset=prompt.offset,
                talk=int(prompt.outline.number[row, own[0]]) if prompt.conversations.most > 1 else 0,
                structural=np.delete(own, slots),
            )
            first = last

    def _adopt(self, cache: Cache | None, spans: list[ImageSpan]) -> list[CacheLayer] | None:
        if cache is None:
            return None
        reason = unsupported_reason(cache)
        if reason is None:
            return adopt_cache(cache, self._depth, self._states)
        if self.routing.skips_text or self._drops(spans):
            raise unsupported_cache(reason)
        return None

    def _drops(self, spans: list[ImageSpan]) -> bool:
        """Whether any of these images is to lose tokens."""
        return any(self._plans.of(span.shown).drops for span in spans)

    def before_layer(self, index: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Gives a layer the tokens that it computes."""
        run = kwargs.pop(RUN, None)
        if index in self.entered:
            self.state.enter(run)
        if run is None:
            return None
        args, kwargs = run.layer_inputs(index, args, kwargs)
        planned = self.planned.at(run, index)
        return args, kwargs if planned is None else {**kwargs, PLAN: planned}

    def after_layer(self, index: int, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Shows a layer to those who watch the forward, in the order of `_observers`."""
        run = self.state.leave()
        if isinstance(run, DecoderRun) and output is not None:
            run.observe(index, output, kwargs)

    def close_decoder(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Ends a forward: caches are cut, losses and records made, hidden states brought to the full length."""
        run = kwargs.get(RUN)
        if run is None or output is None:
            return None
        run.checks.settle()
        for observer in run.observers:
            observer.close(run)
        run.checks.settle()
        if isinstance(run.shaper, Revival):
            run.leave_planes()
        return self._restore(run, output)

    def adding_forward(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The forward of a layer, and what the decoder adds to vision tokens after it."""
        output, run = forward(*args, **kwargs), self.state.running
        return run.with_planes(index, output) if isinstance(run, DecoderRun) else output

    def _restore(self, run: DecoderRun, output: Any) -> Any:
        """The decoder's output with hidden states at the full length of the input."""
        states = run.restore(output[0], self._depth - 1)
        if states is output[0] and not run.bare:
            return None
        if isinstance(output, tuple):
            return (states, *output[1:])
        output.last_hidden_state = states
        if output.hidden_states is not None:
            # The first one is the input of layer 0, the others are outputs of layers 0, 1, ...
            # The model notes them before something is added to vision tokens.
            bare = run.bare or {}
            output.hidden_states = tuple(
                run.restore(bare.get(index - 1, one), max(0, index - 1))
                for index, one in enumerate(output.hidden_states)
            )
        return output
