"""Asking methods which tokens of each image enter the decoder, and which go on after its layers; and doing what they
answer."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.decoder.prompt import ImageSpan, left_signals
from vtprune.decoder.run import DecoderRun, LayerView, Observer
from vtprune.errors import KeptWholeWarning, VTPruneError
from vtprune.hooks.learning import Lessons
from vtprune.hooks.probe import Probe, Prober
from vtprune.hooks.recording import Recording
from vtprune.hooks.scoring import DecoderScoring, SeenLayer
from vtprune.method.answers import KEPT_WHOLE, Selection
from vtprune.method.facts import ModelFacts
from vtprune.method.pruner import Pruner
from vtprune.method.views import VisionStream
from vtprune.tensors.attention import full_precision


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
        budget: int,
        layer: int,
    ) -> None:
        """Keeps of an image what the pruner at place `order` of the list answered, from decoder layer `layer` on.

        Raises VTPruneError for an answer that is none, or that keeps more than the budget.
        """
        if selection is None:
            return
        before = span.kept
        selection.check(before.numel())
        if selection.kept.numel() > budget and not pruner.adaptive and not selection.learns:
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

    layers: those layers; cut: the layers whose caches are cut, in the end, to what the last one left.
    """

    def __init__(
        self,
        scoring: DecoderScoring,
        facts: ModelFacts,
        modules: dict[int, nn.Module],
    ) -> None:
        self.scoring, self.facts, self.modules = scoring, facts, modules
        self.adapter, self.pruners = scoring.adapter, scoring.pruners
        self._depth = facts.decoder_depth
        self._by_layer: dict[int, list[tuple[int, Pruner]]] = {}
        for order, pruner in enumerate(self.pruners):
            for index in pruner.decoder_layers(self._depth):
                self._by_layer.setdefault(index, []).append((order, pruner))
        self.layers = frozenset(self._by_layer)
        self.cut = frozenset(index for pruner in self.pruners for index in pruner.cache_layers(self._depth))
        # Why images were kept whole, as far as that was warned of.
        self._told: set[str] = set()

    def open(self, run: DecoderRun, dropping: Dropping) -> Scoring | None:
        """Who asks the methods about the images of one forward, if it brings any."""
        return Scoring(self, dropping) if run.spans else None

    def acting(self, index: int) -> list[tuple[int, Pruner]]:
        """The methods that may act after a layer, with their places in the list."""
        return self._by_layer.get(index, [])

    def before_decoder(self, prober: Prober, dropping: Dropping, inputs: Inputs) -> None:
        """Has every method remember what it needs of each image, and choose."""
        run, recording = prober.run, dropping.recording
        for span in run.spans:
            run.mark(span)
            recording.of(span).text_after = (run.texts[span.key] > span.places[-1]).sum()
        for order, pruner in enumerate(self.pruners):
            probe = self._probe(prober, recording, order)
            for span in run.spans:
                self._tell_whole(pruner, span)
                if not (pruner.adaptive or pruner.drops(span.image.total, self._depth)):
                    continue
                stream = self._stream(run, span, order=order, inputs=inputs)
                if probe is not None:
                    stream = replace(stream, probe=probe.of(span, run.texts[span.key], stream.budget))
                with full_precision(inputs.embeds.device):
                    memory = pruner.remember(stream)
                # Decoder layers choose by what is remembered, and the report outlives the forward's graph.
                span.memories[order] = {name: _constant(value) for name, value in memory.items()}
                if pruner.selects and self._selecting(pruner, span):
                    with full_precision(inputs.embeds.device):
                        selection = pruner.select(replace(stream, memory=memory))
                    dropping.apply(run, span, selection, order=order, pruner=pruner, budget=stream.budget, layer=0)

    def _tell_whole(self, pruner: Pruner, span: ImageSpan) -> None:
        """Warns, once for each reason, of an image that a method cannot cut to its budget."""
        reason = pruner.unmet(span.image.total, span.kept.numel())
        if reason and reason not in self._told:
            self._told.add(reason)
            text = f"an image of {span.image.total} tokens is {KEPT_WHOLE}{reason}"
            warnings.warn(text, KeptWholeWarning, stacklevel=2)

    @staticmethod
    def _selecting(pruner: Pruner, span: ImageSpan) -> bool:
        """Whether a method has to say which tokens of an image enter the decoder."""
        return pruner.adaptive or pruner.input_budget(span.image.total) < span.kept.numel()

    def _probe(self, prober: Prober, recording: Recording, order: int) -> Probe | None:
        """The decoder layer that a method selects by, of the prompt as it stands, if there is anything to select."""
        pruner, spans = self.pruners[order], prober.run.spans
        layer = pruner.probe_layer(self._depth)
        rows = {span.row for span in spans if self._selecting(pruner, span)}
        if layer is None or not rows:
            return None
        for span in spans:
            if span.row in rows:
                recording.of(span).probed[order] = span.kept.numel()
        return prober.at(layer)

    def _stream(self, run: DecoderRun, span: ImageSpan, *, order: int, inputs: Inputs) -> VisionStream:
        image, pruner, module, row = span.image, self.pruners[order], self.modules.get(order), span.row
        text = (run.texts if module is None else run.unlabelled)[span.key]
        assert image.pixels is not None
        picture = None
        if pruner.reads_picture:
            if id(image) not in inputs.pictures:
                inputs.pictures[id(image)] = self.adapter.picture(image.pixels, image.grid)
            picture = inputs.pictures[id(image)]
        return VisionStream(
            features=run.merged(span, inputs.embeds[row, span.places[span.kept]]),
            grid=image.grid,
            indices=span.kept,
            total=image.total,
            budget=pruner.input_budget(image.total),
            signals=left_signals(image.signals, image, span),
            pixels=image.pixels,
            text=inputs.embeds[row, text],
            text_ids=None if inputs.ids is None else inputs.ids[row, text],
            last_signals=left_signals(image.last_signals, image, span),
            picture=picture,
            source=self.facts.source,
            text_after=int((text > span.places[-1]).sum()),
            module=module,
            training=module is not None and module.training and torch.is_grad_enabled(),
        )


@dataclass(frozen=True)
class Scoring(Observer):
    """Asks the methods, in their order and image by image, which tokens go on; each one sees what those before it
    left."""

    of: Selecting
    dropping: Dropping

    def wants(self, index: int) -> bool:
        """Whether a method may act after this layer."""
        return index in self.of.layers

    def after(self, run: DecoderRun, view: LayerView) -> LayerView:
        """Drops what the methods leave out, from the next layer on."""
        seen = None
        for span in run.spans:
            for order, pruner in self.of.acting(view.index):
                if not asked(pruner, span, view.index):
                    continue
                seen = seen or SeenLayer(self.of.scoring, run, view, run.texts)
                self.dropping.recording.of(span).asked.setdefault(order, []).append(view.index)
                layer = seen.of(span, order)
                with full_precision(view.hidden.device):
                    selection = pruner.prune_decoder(layer)
                self.dropping.apply(
                    run, span, selection, order=order, pruner=pruner, budget=layer.budget, layer=view.index + 1
                )
        return view

    def close(self, run: DecoderRun) -> None:
        """Cuts the caches that are to hold only what the last layer left."""
        if self.of.cut and run.layers is not None:
            run.cut_caches(self.of.cut)
            for span in run.spans:
                self.dropping.recording.of(span).cut = self.of.cut


def asked(pruner: Pruner, span: ImageSpan, index: int) -> bool:
    """Whether a method has to say which tokens of an image go on after a decoder layer."""
    entered = span.entered.numel()
    if pruner.adaptive:
        return pruner.acts_after(span.image.total, index, entered)
    return pruner.decoder_budget(span.image.total, index, entered) < span.kept.numel()


def _constant(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
