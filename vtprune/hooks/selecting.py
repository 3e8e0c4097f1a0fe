"""Asking methods which tokens of each image enter the decoder, and which go on after its layers; and doing what they
answer."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.decoder.outline import Ints
from vtprune.decoder.prompt import ImageSpan, left_signals
from vtprune.decoder.run import DecoderRun, LayerView, Observer
from vtprune.errors import KeptWholeWarning, VTPruneError
from vtprune.hooks.learning import Lessons
from vtprune.hooks.probe import Probe, Prober
from vtprune.hooks.recording import Recording
from vtprune.hooks.scoring import DecoderScoring, SeenLayer
from vtprune.method.answers import KEPT_WHOLE, Selection
from vtprune.method.asking import started, together
from vtprune.method.facts import ModelFacts
from vtprune.method.plan import Plan
from vtprune.method.pruner import Pruner
from vtprune.method.stages import BeforeDecoder, BetweenLayers, Query, Read, cut_caches, probe_layer, reads
from vtprune.method.views import VisionStream
from vtprune.tensors.attention import full_precision

# Whose queries are found in what the layer that ran projected.
TAPPED = (Query.ALL, Query.LAST)


@dataclass(frozen=True)
class Dropping:
    """Carries out what the methods of one forward answer, and tells those who have to know: lessons, recording."""

    lessons: Lessons
    recording: Recording

    def apply(
        self,
        run: DecoderRun,
        span: ImageSpan,
        selection: Selection | None,
        *,
        order: int,
        pruner: Pruner,
        budget: int | None,
        layer: int,
    ) -> None:
        """Keeps of an image what the pruner at place `order` of the list answered, from decoder layer `layer` on.

        Raises VTPruneError for an answer that is none, or that keeps more than the budget (None: the method
        decides).
        """
        if selection is None:
            return
        before = span.kept
        try:
            selection.check(before.numel())
        except VTPruneError:
            # It may be the scores that are at fault.
            run.checks.settle()
            raise
        if budget is not None and selection.kept.numel() > budget and not selection.learns:
            raise VTPruneError(f"{pruner.name} kept {selection.kept.numel()} tokens of a budget of {budget}")
        run.drop(span, selection)
        self.lessons.enrol(span, before, selection, order=order)
        self.recording.dropped(span, before, selection, order=order, name=pruner.name, layer=layer)


@dataclass(frozen=True)
class Inputs:
    """What a forward of the decoder is given: embeddings (B, L, D), and the ids (B, L) that they are of, unless the
    caller handed in embeddings; pictures: of images that a method has looked at, by identity."""

    embeds: Tensor
    ids: Tensor | None
    pictures: dict[int, Tensor] = field(default_factory=dict)


class Selecting:
    """Asks the methods of one wrapped model, in their order, which tokens of each image enter the decoder, and says
    after which layers they are asked again.

    layers: those layers; read: those whose projections methods look at; cut: the layers whose caches are cut, in the
    end, to what the last one left.
    """

    def __init__(
        self,
        scoring: DecoderScoring,
        facts: ModelFacts,
        modules: dict[int, nn.Module],
    ) -> None:
        self.scoring, self.facts, self.modules = scoring, facts, modules
        self.adapter, self.pruners = scoring.adapter, scoring.pruners
        self.plans = scoring.plans
        self._by_layer: dict[int, list[tuple[int, BetweenLayers]]] = {}
        for order, pruner in enumerate(self.pruners):
            if isinstance(pruner, BetweenLayers):
                for index in pruner.drop_layers():
                    self._by_layer.setdefault(index, []).append((order, pruner))
        self.layers = frozenset(self._by_layer)
        looking = [own for own in self._by_layer if any(one.query in TAPPED for _, one in self._by_layer[own])]
        self.read = frozenset(looking)
        self.cut = frozenset(index for pruner in self.pruners for index in cut_caches(pruner))
        # Why images were kept whole, as far as that was warned of.
        self._told: set[str] = set()

    def open(self, run: DecoderRun, dropping: Dropping) -> Scoring | None:
        """Who asks the methods about the images of one forward, if it brings any."""
        return Scoring(self, dropping) if run.spans else None

    def acting(self, index: int) -> list[tuple[int, BetweenLayers]]:
        """The methods that may act after a layer, with their places in the list."""
        return self._by_layer.get(index, [])

    def before_decoder(self, prober: Prober, dropping: Dropping, inputs: Inputs) -> None:
        """Has every method remember what it needs of each image, and choose."""
        run, recording = prober.run, dropping.recording
        for span in run.spans:
            run.mark(span)
            recording.of(span).text_after = _after(run.words[span.key], span)
        for order, pruner in enumerate(self.pruners):
            probe = self._probe(prober, recording, order)
            for span in run.spans:
                self._tell_whole(self.plans.of(span.image.total), span, order)
            acting = [span for span in run.spans if self.plans.of(span.image.total).acts(order)]
            streams = [self._stream(run, span, order=order, inputs=inputs) for span in acting]
            if probe is not None:
                streams = [
                    self._probed(run, probe, span, stream) for span, stream in zip(acting, streams, strict=True)
                ]
            with full_precision(inputs.embeds.device), run.checks.collecting():
                streams = _remembering(pruner, streams)
            for span, stream in zip(acting, streams, strict=True):
                # Decoder layers choose by what is remembered, and the report outlives the forward's graph.
                span.memories[order] = {name: _constant(value) for name, value in stream.memory.items()}
            if not isinstance(pruner, BeforeDecoder):
                continue
            asked = [
                (span, stream)
                for span, stream in zip(acting, streams, strict=True)
                if self.plans.of(span.image.total).selects(order, span.kept.numel())
            ]
            with full_precision(inputs.embeds.device), run.checks.collecting():
                selections = together([started(pruner.select, stream) for _, stream in asked])
            for (span, _), selection in zip(asked, selections, strict=True):
                budget = self.plans.of(span.image.total).entering(order)
                dropping.apply(run, span, selection, order=order, pruner=pruner, budget=budget, layer=0)

    def _probed(self, run: DecoderRun, probe: Probe, span: ImageSpan, stream: VisionStream) -> VisionStream:
        """The stream of an image with the layer that its method selects by."""
        after = run.column_after(span, [one.kept.numel() for one in run.spans], packed=probe.where is not None)
        layer = probe.of(span, run.texts[span.key], stream.budget, after=after, text_after=stream.text_after)
        return replace(stream, probe=layer)

    def _tell_whole(self, plan: Plan, span: ImageSpan, order: int) -> None:
        """Warns, once for each reason, of an image that a method cannot cut to its budget."""
        reason = plan.whole(order, span.kept.numel())
        if reason and reason not in self._told:
            self._told.add(reason)
            text = f"an image of {span.image.total} tokens is {KEPT_WHOLE}{reason}"
            warnings.warn(text, KeptWholeWarning, stacklevel=2)

    def _probe(self, prober: Prober, recording: Recording, order: int) -> Probe | None:
        """The decoder layer that a method selects by, of the prompt as it stands, if there is anything to select."""
        pruner, spans = self.pruners[order], prober.run.spans
        layer = probe_layer(pruner)
        rows = {span.row for span in spans if self.plans.of(span.image.total).selects(order, span.kept.numel())}
        if layer is None or not rows:
            return None
        for span in spans:
            if span.row in rows:
                recording.of(span).probed[order] = span.kept.numel()
        return prober.at(layer)

    def _stream(self, run: DecoderRun, span: ImageSpan, *, order: int, inputs: Inputs) -> VisionStream:
        image, pruner, module, row = span.image, self.pruners[order], self.modules.get(order), span.row
        text = (run.texts if module is None else run.unlabelled)[span.key]
        words = (run.words if module is None else run.unlabelled_words)[span.key]
        assert image.pixels is not None
        picture, budget = None, self.plans.of(image.total).entering(order)
        if Read.PICTURE in reads(pruner):
            if id(image) not in inputs.pictures:
                inputs.pictures[id(image)] = self.adapter.picture(image.pixels, image.grid)
            picture = inputs.pictures[id(image)]
        return VisionStream(
            features=run.merged(span, inputs.embeds[row, span.places[span.kept]]),
            grid=image.grid,
            indices=span.kept,
            total=image.total,
            budget=pruner.budget(image.total) if budget is None else budget,
            signals=left_signals(image.signals, image, span),
            pixels=image.pixels,
            text=inputs.embeds[row, text],
            text_ids=None if inputs.ids is None else inputs.ids[row, text],
            last_signals=left_signals(image.last_signals, image, span),
            picture=picture,
            source=self.facts.source,
            text_after=_after(words, span),
            module=module,
            training=module is not None and module.training and torch.is_grad_enabled(),
        )


@dataclass(frozen=True)
class Scoring(Observer):
    """Asks the methods, in their order, which tokens of each image go on; each one sees what those before it left."""

    of: Selecting
    dropping: Dropping

    def wants(self, index: int) -> bool:
        """Whether a method may act after this layer."""
        return index in self.of.layers

    def after(self, run: DecoderRun, view: LayerView) -> LayerView:
        """Drops what the methods leave out, from the next layer on."""
        seen = None
        for order, pruner in self.of.acting(view.index):
            asked = [span for span in run.spans if self._asks(span, order, view.index)]
            if not asked:
                continue
            seen = seen or SeenLayer(self.of.scoring, run, view, run.words)
            layers = [seen.of(span, order) for span in asked]
            with full_precision(view.hidden.device), run.checks.collecting():
                selections = together([started(pruner.prune_decoder, layer) for layer in layers])
            for span, selection in zip(asked, selections, strict=True):
                self.dropping.recording.of(span).asked.setdefault(order, []).append(view.index)
                budget = self.of.plans.of(span.image.total).left(order, view.index, span.entered.numel())
                self.dropping.apply(
                    run, span, selection, order=order, pruner=pruner, budget=budget, layer=view.index + 1
                )
        return view

    def _asks(self, span: ImageSpan, order: int, index: int) -> bool:
        plan = self.of.plans.of(span.image.total)
        return plan.asks(order, index, span.entered.numel(), alive=span.kept.numel())

    def close(self, run: DecoderRun) -> None:
        """Cuts the caches that are to hold only what the last layer left."""
        if self.of.cut and run.layers is not None:
            run.cut_caches(self.of.cut)
            for span in run.spans:
                self.dropping.recording.of(span).cut = self.of.cut


def _after(words: Ints, span: ImageSpan) -> int:
    """How many words, by their places (T,), stand after an image."""
    return int((words > span.stands[-1]).sum())


def _remembering(pruner: Pruner, streams: list[VisionStream]) -> list[VisionStream]:
    """The streams with what the method remembers of each."""
    if not isinstance(pruner, BetweenLayers):
        return streams
    memories = together([started(pruner.remember, stream) for stream in streams])
    return [replace(stream, memory=memory) for stream, memory in zip(streams, memories, strict=True)]


def _constant(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
