"""Hooks of the decoder: the prompt is compacted between its layers, hidden states come back at full length."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from vtprune.adapters.base import PIXELS, Adapter, Source
from vtprune.cache.adopting import (
    adopt_cache,
    cache_in,
    logical_length,
    unsupported_cache,
    unsupported_reason,
    with_cache,
)
from vtprune.cache.layer import PrunedLayer
from vtprune.decoder.prompt import (
    IGNORED,
    ImageSpan,
    PromptInfo,
    forget_tensors,
    left_signals,
    real_tokens,
    sight,
)
from vtprune.decoder.revival import Revival, check_revival
from vtprune.decoder.run import DecoderRun, Texts
from vtprune.encoder.encoding import EncodedImage
from vtprune.errors import KeptWholeWarning, VTPruneError
from vtprune.hooks.checkpoints import Checkpoints, drops_cache
from vtprune.hooks.eviction import Evictor
from vtprune.hooks.learning import Teacher
from vtprune.hooks.probe import Probe, Prober
from vtprune.hooks.routing import RoutedLayers
from vtprune.hooks.scoring import DecoderScoring
from vtprune.hooks.state import (
    FRAME,
    GENERATION,
    RECORD,
    ROWS,
    RUN,
    Frame,
    ThreadState,
)
from vtprune.method.answers import KEPT_WHOLE, Selection
from vtprune.method.facts import ModelFacts
from vtprune.method.plan import Plans
from vtprune.method.pruner import Pruner
from vtprune.method.stages import (
    BeforeDecoder,
    BetweenLayers,
    Read,
    acts,
    cut_caches,
    drop_layers,
    probe_layer,
    reads,
    revives,
)
from vtprune.method.views import VisionStream
from vtprune.report.generation import Generation
from vtprune.report.history import origins
from vtprune.tensors.attention import full_precision


class DecoderHooks:
    """The decoder's side of a wrapped model."""

    def __init__(
        self,
        adapter: Adapter,
        pruners: list[Pruner],
        facts: ModelFacts,
        state: ThreadState,
        *,
        compact: bool,
        maker: object,
        modules: dict[int, nn.Module],
    ) -> None:
        self.adapter, self.pruners, self.facts, self.state, self.compact = adapter, pruners, facts, state, compact
        self._evictor = Evictor(adapter, pruners)
        self.plans = Plans(pruners)
        self.tapped = {index for pruner in pruners for index in drop_layers(pruner)}
        self.tapped |= self._evictor.watched
        self._teacher = Teacher(pruners)
        self.tapped |= self._teacher.layers
        self.modules = modules
        self.routed = RoutedLayers(adapter, pruners, modules, self.plans)
        self.entered = self.tapped | self.routed.layers
        self.checkpoints = Checkpoints(adapter.decoder_layers, state)
        self._cut = frozenset(index for pruner in pruners for index in cut_caches(pruner))
        self._maker = maker
        self.revives = next((pruner for pruner in pruners if revives(pruner)), None)
        # Which method decides by every token that it reads, so that none may be taken back.
        self.reads_all = self.revives or self._evictor.pruner
        self.last: Generation | None = None
        # Why images were kept whole, as far as that was warned of.
        self._told: set[str] = set()
        self._signature = inspect.signature(adapter.inner.forward)
        self._depth = facts.decoder_depth
        self._scoring = DecoderScoring(adapter, pruners, self._depth, self.plans)

    def open_frame(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        inputs = self._signature.bind(*args, **kwargs).arguments
        frame = Frame(inputs)
        self.state.frame = frame
        given = inputs.get("mm_encoder_outputs") or {}
        known = {source.kind for source in self.adapter.sources()}
        for kind, pixels in PIXELS.items():
            encoded = given.get(kind)
            if kind not in known and (inputs.get(pixels) is not None or encoded is not None):
                raise VTPruneError(f"{kind} inputs are not supported; pass images, or unwrap the model for {kind}s")
            if encoded is not None:
                records = [getattr(tensor, RECORD, None) for tensor in encoded.pooler_output]
                frame.encoded[kind] = self._known(records)
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
            self._check_added(kwargs)
        layers = self._adopt(cache, spans)
        if layers is None and not spans and not self.routed.routes_text:
            return args, kwargs
        rotary = self.adapter.rotary if self.compact else None
        run = DecoderRun(prompt, spans, layers, cache=cache, flash=flash, rotary=rotary)
        if layers is not None and (layers[0].log is not None or (self.revives is not None and spans)):
            check_revival(layers, self.revives, self.tapped, flash=flash, windows=self.adapter.windows)
            run.revival = Revival(layers, prompt, "+".join(pruner.name for pruner in self.pruners))
        run.routed = self.routed if self.routed.layers else None
        if layers is not None and prompt.offset == 0:
            layers[0].aux[ROWS] = torch.arange(prompt.batch, device=prompt.device)[:, None]
        if layers is not None and (prompt.offset == 0 or spans):
            self.adapter.remember(layers, prompt)
        ids = frame.inputs.get("input_ids")
        prober = Prober(self.adapter, module, args, kwargs, run)
        self._select(prober, embeds, ids if frame.inputs.get("inputs_embeds") is None else None)
        self._evictor.open(run)
        forget_tensors(spans)
        run.generation = self._generation(run)
        if cache is not cache_in(kwargs):
            kwargs = with_cache(module.forward, kwargs, cache)
        return args, {**kwargs, RUN: run}

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
            batch, length, offset, embeds.device, mask, positions, cached=cache is not None, labels=labels,
            sees=sight(kwargs.get("attention_mask")),
        )  # fmt: skip

    def _check_packed(self, prompt: PromptInfo, kwargs: dict[str, Any], *, flash: bool) -> None:
        """Raises VTPruneError where conversations are packed into one row in a way that pruning would mix up."""
        packed = prompt.conversations.most > 1
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

    def _check_added(self, kwargs: dict[str, Any]) -> None:
        """Raises VTPruneError for what a decoder adds in the places of vision tokens between its layers, which would
        meet fewer tokens than it is for."""
        added = self.adapter.added_inputs(kwargs)
        if added:
            raise VTPruneError(
                f"this decoder adds {' and '.join(added)} to its vision tokens between layers, which is not pruned "
                "with them; unwrap the model"
            )

    def _spans(self, frame: Frame, embeds: Tensor, prompt: PromptInfo) -> list[ImageSpan]:
        """Where each image of this forward stands, in the order of the prompt."""
        sources = [source for source in self.adapter.sources() if frame.encoded.get(source.kind)]
        spans = [span for source in sources for span in self._placed(source, frame, embeds, prompt)]
        if len(sources) > 1:
            spans.sort(key=lambda span: (span.row, int(span.places[0])))
        return spans

    def _placed(self, source: Source, frame: Frame, embeds: Tensor, prompt: PromptInfo) -> Iterator[ImageSpan]:
        """What one source shows: features fill its placeholders in row-major order."""
        images, given = frame.encoded[source.kind], frame.inputs.get("inputs_embeds")
        marks = self.adapter.placeholders(source, frame.inputs.get("input_ids"), embeds if given is None else given)
        rows, places = marks.nonzero(as_tuple=True)
        first = 0
        for image in images:
            last = first + image.length
            if last > rows.numel() or int(rows[first]) != int(rows[last - 1]):
                raise VTPruneError(
                    f"the prompt has {rows.numel()} {source.kind} placeholders, its {source.kind}s need "
                    f"{sum(one.length for one in images)} in unbroken rows"
                )
            alive, row = image.alive.to(embeds.device), int(rows[first])
            talk = prompt.conversations.of(row, places[first])
            span = ImageSpan(row, places[first:last], image, alive, prompt.offset, talk)
            if image.slots is not None:
                slots, rest = image.slots.to(places.device), torch.ones(image.length, dtype=torch.bool)
                rest[image.slots] = False
                span.places, span.structural = span.places[slots], span.places[rest.to(places.device)]
            yield span
            first = last

    def _adopt(self, cache: Cache | None, spans: list[ImageSpan]) -> list[PrunedLayer] | None:
        if cache is None:
            return None
        reason = unsupported_reason(cache)
        if reason is None:
            return adopt_cache(cache, self._depth)
        skips_text = self.routed.pruner is not None and self.routed.pruner.skips_text
        if skips_text or any(self.plans.of(span.image.total).drops for span in spans):
            raise unsupported_cache(reason)
        return None

    def _select(self, prober: Prober, embeds: Tensor, input_ids: Tensor | None) -> None:
        run = prober.run
        text = run.texts
        unlabelled = self._unlabelled(run) if self.modules else text
        pictures: dict[int, Tensor] = {}
        for span in run.spans:
            run.mark(span)
            span.text_after = int((text[span.key] > span.places[-1]).sum())
        for index, pruner in enumerate(self.pruners):
            probe = self._probe(prober, index)
            for span in run.spans:
                self._tell_whole(index, span)
                if not self.plans.of(span.image.total).acts(index):
                    continue
                words = (unlabelled if index in self.modules else text)[span.key]
                stream = self._stream(run, index, span, embeds, words, input_ids, pictures)
                if probe is not None:
                    stream = replace(stream, probe=probe.of(span, text[span.key], stream.budget))
                memory: dict[str, Any] = {}
                if isinstance(pruner, BetweenLayers):
                    with full_precision(embeds.device):
                        memory = pruner.remember(stream)
                # Decoder layers choose by what is remembered, and the report outlives the forward's graph.
                span.memories[index] = {name: _constant(value) for name, value in memory.items()}
                if isinstance(pruner, BeforeDecoder) and self._selecting(index, span):
                    with full_precision(embeds.device):
                        selection = pruner.select(replace(stream, memory=memory))
                    self._apply(run, span, index, selection, self.plans.of(span.image.total).entering(index), 0)

    def _tell_whole(self, index: int, span: ImageSpan) -> None:
        """Warns, once for each reason, of an image that a method cannot cut to its budget."""
        reason = self.plans.of(span.image.total).whole(index, span.kept.numel())
        if reason and reason not in self._told:
            self._told.add(reason)
            text = f"an image of {span.image.total} tokens is {KEPT_WHOLE}{reason}"
            warnings.warn(text, KeptWholeWarning, stacklevel=2)

    def _selecting(self, index: int, span: ImageSpan) -> bool:
        """Whether a method has to say which tokens of an image enter the decoder."""
        return self.plans.of(span.image.total).selects(index, span.kept.numel())

    def _probe(self, prober: Prober, index: int) -> Probe | None:
        """The decoder layer that a method selects by, of the prompt as it stands, if there is anything to select."""
        pruner, spans = self.pruners[index], prober.run.spans
        layer = probe_layer(pruner)
        rows = {span.row for span in spans if self._selecting(index, span)}
        if layer is None or not rows:
            return None
        for span in spans:
            if span.row in rows:
                span.probed[index] = span.kept.numel()
        return prober.at(layer)

    def _stream(
        self,
        run: DecoderRun,
        index: int,
        span: ImageSpan,
        embeds: Tensor,
        text: Tensor,
        input_ids: Tensor | None,
        pictures: dict[int, Tensor],
    ) -> VisionStream:
        image, pruner, module = span.image, self.pruners[index], self.modules.get(index)
        assert image.pixels is not None
        picture, budget = None, self.plans.of(image.total).entering(index)
        if Read.PICTURE in reads(pruner):
            if id(image) not in pictures:
                pictures[id(image)] = self.adapter.picture(image.pixels, image.grid)
            picture = pictures[id(image)]
        return VisionStream(
            features=run.merged(span, embeds[span.row, span.places[span.kept]]),
            grid=image.grid,
            indices=span.kept,
            total=image.total,
            budget=pruner.budget(image.total) if budget is None else budget,
            signals=left_signals(image.signals, image, span),
            pixels=image.pixels,
            text=embeds[span.row, text],
            text_ids=None if input_ids is None else input_ids[span.row, text],
            last_signals=left_signals(image.last_signals, image, span),
            picture=picture,
            source=self.facts.source,
            text_after=int((text > span.places[-1]).sum()),
            module=module,
            training=module is not None and module.training and torch.is_grad_enabled(),
        )

    def _apply(
        self, run: DecoderRun, span: ImageSpan, index: int, selection: Selection | None, budget: int | None, layer: int
    ) -> None:
        pruner = self.pruners[index]
        if selection is None:
            return
        selection.check(span.kept.numel())
        if budget is not None and selection.kept.numel() > budget and not selection.learns:
            raise VTPruneError(f"{pruner.name} kept {selection.kept.numel()} tokens of a budget of {budget}")
        run.drop(span, selection, layer)
        self._teacher.enrol(run, span, index, selection)
        span.left[index] = span.kept.numel()
        if selection.note:
            span.notes.append(f"{pruner.name}: {selection.note}")

    @staticmethod
    def _unlabelled(run: DecoderRun) -> Texts:
        """The places of each conversation's text without answers: weights that learn are never shown one."""
        labels, text = run.prompt.labels, run.texts_of(run.prompt.conversations)
        if labels is None:
            return text
        return {key: places[labels[key[0], places].to(places.device) == IGNORED] for key, places in text.items()}

    def _generation(self, run: DecoderRun) -> Generation:
        """The record of this generation: the cache's own, unless this forward brings a prompt of its own."""
        cache, prompt = run.cache, run.prompt
        known = getattr(cache, GENERATION, None) if cache is not None else None
        if known is not None and prompt.offset > 0 and not run.spans:
            return known
        texts = prompt.conversations.counts(prompt.real()).tolist()
        for span in run.spans:
            texts[span.row][span.talk] -= span.image.total
        earlier: list[ImageSpan] = []
        if known is not None and run.layers is not None and prompt.offset > 0:
            # Rows may have been reordered or repeated since; from here on they count as they stand.
            earlier = known.live_spans(known.origins(origins(run.layers)), prompt.offset)
            run.layers[0].aux[ROWS] = torch.arange(prompt.batch, device=prompt.device)[:, None]
        generation = Generation(
            self.adapter.cost, self.pruners, self.facts, self._depth, self._dtype, earlier + run.spans,
            texts, len(earlier), prompt.offset,
        )  # fmt: skip
        if cache is not None:
            setattr(cache, GENERATION, generation)
        return generation

    @property
    def _dtype(self) -> torch.dtype:
        return next(iter(self.adapter.language_model.parameters())).dtype

    def before_layer(self, index: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        run = kwargs.pop(RUN, None)
        if index in self.entered:
            self.state.enter(run)
        if run is None:
            return None
        return run.layer_inputs(index, args, kwargs)

    def after_layer(self, index: int, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        run = self.state.leave()
        if not isinstance(run, DecoderRun) or output is None or index <= run.decided:
            return
        if not run.spans and run.revival is None and run.watch is None:
            return
        run.decided = index
        hidden = output[0] if isinstance(output, tuple) else output
        embeddings, revival, places = kwargs["position_embeddings"], run.revival, run.layout(index).places
        before = [span.kept for span in run.spans]
        # What is tapped makes choices, which have no gradient; hidden states that merge or wait for later have one.
        run.taps = {name: states.detach() for name, states in run.taps.items()}
        with full_precision(hidden.device):
            self._evictor.watch(run, index, embeddings)
        if revival is not None and revival.decides(index):
            query, mask = self.adapter.decoder_query(run.taps, embeddings), kwargs.get("attention_mask")
            with full_precision(hidden.device):
                last = run.prompt.conversations.ends(places)[1][:, 0]
                revival.decide(index, query, last, self.adapter.decoder_scale, mask, hidden)
            front = revival.width(index)
            hidden, embeddings = hidden[:, front:], (embeddings[0][:, front:], embeddings[1][:, front:])
            run.taps = {name: states[:, front:] for name, states in run.taps.items()}
        for span, order, layer in self._scoring.views(run, index, embeddings, hidden):
            pruner = self.pruners[order]
            assert isinstance(pruner, BetweenLayers)
            with full_precision(hidden.device):
                selection = pruner.prune_decoder(layer)
            budget = self.plans.of(span.image.total).left(order, index, layer.entered)
            self._apply(run, span, order, selection, budget, index + 1)
        wanted = self._teacher.wanted(run, index)
        if wanted:
            words = self._unlabelled(run)
            views = self._scoring.shown(run, index, embeddings, hidden, words, wanted)
            self._teacher.show(run, views)
        if revival is not None:
            revival.record(index, run.spans, before, places, hidden, embeddings)
        run.taps.clear()

    def close_decoder(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        run = kwargs.get(RUN)
        if run is None or output is None:
            return None
        generation = run.generation
        self._teacher.close(run)
        if run.losses:
            self.state.loss = torch.stack([loss.to(run.prompt.device) for loss in run.losses.values()]).sum()
        if run.revival is not None:
            run.revival.close(run.spans)
        if self._cut and run.spans:
            run.cut_caches(self._cut)
        self._evictor.close(run)
        if run.prompt.offset > 0 and not run.spans:
            generation.steps += 1
        generation.note_cache(run)
        if self.state.call is None or self.state.call.asks_for(run):
            self.last = generation
        return self._restore(run, output)

    def _restore(self, run: DecoderRun, output: Any) -> Any:
        """The decoder's output with hidden states at the full length of the input."""
        states = run.restore(output[0], self._depth - 1)
        if states is output[0]:
            return None
        if isinstance(output, tuple):
            return (states, *output[1:])
        output.last_hidden_state = states
        if output.hidden_states is not None:
            # The first one is the input of layer 0, the others are outputs of layers 0, 1, ...
            output.hidden_states = tuple(
                run.restore(one, max(0, index - 1)) for index, one in enumerate(output.hidden_states)
            )
        return output


def _constant(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
