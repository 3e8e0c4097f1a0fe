"""Asking methods which tokens of each image enter the decoder, and which go on after its layers; and doing what they
answer."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vtprune.decoder.prompt import ImageSpan, left_signals
from vtprune.decoder.run import DecoderRun, LayerView, Observer
from vtprune.encoder.encoding import EncodedImage
from vtprune.errors import KeptWholeWarning, VTPruneError
from vtprune.hooks.learning import Lessons
from vtprune.hooks.probe import Probe, Prober
from vtprune.hooks.recording import Recording
from vtprune.hooks.scoring import DecoderScoring, SeenLayer
from vtprune.method.answers import KEPT_WHOLE, Selection
from vtprune.method.asking import Asking, answers_of, started, together
from vtprune.method.facts import ModelFacts
from vtprune.method.kinds import VIDEO
from vtprune.method.parting import remember_by_part, select_by_part
from vtprune.method.plan import Plan
from vtprune.method.pruner import Pruner, forms
from vtprune.method.sharing import BY_SIZE, Sharing, by_importance
from vtprune.method.stages import (
    BeforeDecoder,
    BetweenLayers,
    Query,
    Read,
    by_rectangle,
    cut_caches,
    drop_layers,
    probe_layer,
    reads,
)
from vtprune.method.views import DecoderLayer, Rectangle, VisionStream
from vtprune.tensors.attention import full_precision

Shared = TypeVar("Shared", VisionStream, DecoderLayer)
# What is tapped of a layer by whose queries a method goes.
TAPS: dict[Query, tuple[str, ...]] = {Query.ALL: ("q", "k", "v"), Query.LAST: ("q", "k")}


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

        Raises VTPruneError for an answer that is none, that keeps more than the budget (None: the method decides), or
        that leaves a row without any token.
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
        if not selection.kept.numel() and not run.row_counts()[span.row]:
            raise VTPruneError(
                f"{pruner.name} takes the whole image out, and row {span.row} of the input has nothing else; give it "
                "text"
            )
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

    layers: those layers; taps: by layer, what methods read of its projections; cut: the layers whose caches are cut,
    in the end, to what the last one left.
    """

    def __init__(
        self,
        scoring: DecoderScoring,
        facts: ModelFacts,
        modules: dict[int, nn.Module],
        sharing: Sharing | None,
    ) -> None:
        self.scoring, self.facts, self.modules = scoring, facts, modules
        # Whether the images of a prompt share their budget by how their tokens rank.
        self.pools = sharing is not None and sharing.by == "importance"
        self.adapter, self.pruners = scoring.adapter, scoring.pruners
        self.plans = scoring.plans
        self._by_layer: dict[int, list[tuple[int, BetweenLayers]]] = {}
        for order, pruner in enumerate(self.pruners):
            if isinstance(pruner, BetweenLayers):
                for index in {layer for form in forms(pruner) for layer in drop_layers(form)}:
                    self._by_layer.setdefault(index, []).append((order, pruner))
        self.layers = frozenset(self._by_layer)
        self.taps = {
            layer: {tap for _, one in acting for tap in TAPS.get(one.query, ())}
            for layer, acting in self._by_layer.items()
        }
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
            recording.of(span).text_after = span.words_after(run.words[span.key])
        for order, pruner in enumerate(self.pruners):
            probe = self._probe(prober, recording, order)
            for span in run.spans:
                self._tell_whole(self.plans.of(span.shown), span, order)
            acting = [span for span in run.spans if self._looks(self.plans.of(span.shown), order)]
            streams = [self._stream(run, span, order=order, inputs=inputs) for span in acting]
            if probe is not None:
                streams = [
                    self._probed(run, probe, span, stream) for span, stream in zip(acting, streams, strict=True)
                ]
            own = [self.plans.of(span.shown).pruners[order] for span in acting]
            with full_precision(inputs.embeds.device), run.checks.collecting():
                streams = _remembering(own, streams)
            for span, stream in zip(acting, streams, strict=True):
                # Decoder layers choose by what is remembered, and the report outlives the forward's graph.
                span.memories[order] = {name: _constant(value) for name, value in stream.memory.items()}
            asking = self.with_their_prompts(
                [
                    span
                    for span, one in zip(acting, own, strict=True)
                    if isinstance(one, BeforeDecoder) and self.plans.of(span.shown).selects(order, span.kept.numel())
                ],
                acting,
            )
            asked = [
                (span, stream, one)
                for span, stream, one in zip(acting, streams, own, strict=True)
                if span in asking and isinstance(one, BeforeDecoder)
            ]
            with full_precision(inputs.embeds.device), run.checks.collecting():
                selections = together([_selecting(one, self.to_rank(stream)) for _, stream, one in asked])
            answers = [(span, selection) for (span, _, _), selection in zip(asked, selections, strict=True)]
            entering = functools.partial(self._entering, order)
            for span, selection, budget in self.pooled(run, answers, entering, name=pruner.name):
                dropping.apply(run, span, selection, order=order, pruner=pruner, budget=budget, layer=0)

    def _entering(self, order: int, span: ImageSpan) -> int | None:
        return self.plans.of(span.shown).entering(order)

    def with_their_prompts(self, asked: list[ImageSpan], acting: list[ImageSpan]) -> list[ImageSpan]:
        """The images that are asked about; where the images of a prompt share a budget by importance, also those that
        are within their own part of it."""
        if not self.pools:
            return asked
        keys = {span.key for span in asked}
        # Each image keeps one token, so that one with a single token left has nothing to share.
        return [span for span in acting if span.key in keys and span.kept.numel() > 1]

    def to_rank(self, view: Shared) -> Shared:
        """What a method is shown of an image; where its tokens are to be ranked among those of others, with a budget
        below them all, so that it does rank them."""
        if not self.pools:
            return view
        alive = view.vision.numel() if isinstance(view, DecoderLayer) else view.indices.numel()
        return replace(view, budget=min(view.budget, alive - 1))

    def pooled(
        self,
        run: DecoderRun,
        answers: Sequence[tuple[ImageSpan, Selection | None]],
        budget: Callable[[ImageSpan], int | None],
        *,
        name: str,
    ) -> list[tuple[ImageSpan, Selection | None, int | None]]:
        """What is chosen of each image, and how many tokens may be, None where that is left to the choice: as
        answered, or chosen anew over all images of a prompt."""
        if not self.pools:
            return [(span, selection, budget(span)) for span, selection in answers]
        asked = dict(answers)
        if any(budget(span) is None for span in asked):
            raise VTPruneError(f"{name} decides itself how many tokens stay, so that nothing is shared; {BY_SIZE}")
        prompts = [own for own in by_prompt(run.spans) if any(span in asked for span in own)]
        shared = [
            started(
                by_importance,
                name,
                [asked[span] for span in own if span in asked],
                # Those that were not asked keep what they have.
                sum((budget(span) or 0) - (span not in asked) * span.kept.numel() for span in own),
            )
            for own in prompts
        ]
        return [
            (span, selection, None)
            for own, chosen in zip(prompts, together(shared), strict=True)
            for span, selection in zip([span for span in own if span in asked], chosen, strict=True)
        ]

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
            a = "a video" if span.image.kind == VIDEO else "an image"
            text = f"{a} of {span.image.total} tokens is {KEPT_WHOLE}{reason}"
            warnings.warn(text, KeptWholeWarning, stacklevel=2)

    @staticmethod
    def _looks(plan: Plan, order: int) -> bool:
        """Whether a method looks at the tokens of an image before the decoder, to choose or to remember."""
        return isinstance(plan.pruners[order], (BeforeDecoder, BetweenLayers)) and plan.acts(order)

    def _probe(self, prober: Prober, recording: Recording, order: int) -> Probe | None:
        """The decoder layer that a method selects by, of the prompt as it stands, if there is anything to select."""
        pruner, spans = self.pruners[order], prober.run.spans
        layer = probe_layer(pruner)
        rows = {span.row for span in spans if self.plans.of(span.shown).selects(order, span.kept.numel())}
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
        plan, own = self.plans.of(span.shown), inputs.embeds[row]
        picture, budget, rectangles = None, plan.entering(order), self._rectangles(image, pruner)
        if Read.PICTURE in reads(pruner) and not rectangles:
            if id(image) not in inputs.pictures:
                inputs.pictures[id(image)] = self.adapter.picture(image)
            picture = inputs.pictures[id(image)]
        return VisionStream(
            features=run.merged(span, own.index_select(0, span.standing)),
            grid=image.grid,
            indices=span.kept,
            total=image.total,
            budget=plan.pruners[order].budget(image.total) if budget is None else budget,
            signals=left_signals(image.signals, image, span),
            pixels=self.adapter.laid_out(image) if Read.PIXELS in reads(pruner) and not rectangles else image.pixels,
            text=own.index_select(0, text),
            text_ids=None if inputs.ids is None else inputs.ids[row].index_select(0, text),
            last_signals=left_signals(image.last_signals, image, span),
            picture=picture,
            source=self.facts.source,
            text_after=span.words_after(words),
            module=module,
            training=module is not None and module.training and torch.is_grad_enabled(),
            kind=image.kind,
            rectangles=rectangles,
        )

    def _rectangles(self, image: EncodedImage, pruner: Pruner) -> tuple[Rectangle, ...]:
        """What a method of rows and columns is shown of each of the rectangles that an image's tokens form, where
        these are several."""
        if len({part.grid[1:] for part in image.parts}) == 1 or not by_rectangle(pruner):
            return ()
        assert image.pixels is not None
        found, wanted = [], reads(pruner)
        for number, part in enumerate(image.parts):
            # Laid out for those alone that look at them.
            own = self.adapter.part_pixels(image, number) if wanted & {Read.PICTURE, Read.PIXELS} else image.pixels
            picture = self.adapter.real_colours(own[None]) if Read.PICTURE in wanted else None
            found.append(Rectangle(part.grid, own, picture))
        return tuple(found)


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
            plans = {span: self.of.plans.of(span.shown) for span in run.spans}
            asked = self.of.with_their_prompts(
                [span for span, plan in plans.items() if self._asks(plan, span, order, view.index)], run.spans
            )
            if not asked:
                continue
            seen = seen or SeenLayer(self.of.scoring, run, view)
            left = {span: plan.left(order, view.index, span.entered.numel()) for span, plan in plans.items()}
            layers = [(plans[span].pruners[order], seen.of(span, order, left[span])) for span in asked]
            with full_precision(view.hidden.device), run.checks.collecting():
                selections = answers_of(
                    [
                        (own.prune_decoder, self.of.to_rank(layer))
                        for own, layer in layers
                        if isinstance(own, BetweenLayers)
                    ]
                )
            answers = list(zip(asked, selections, strict=True))
            for span, selection, budget in self.of.pooled(run, answers, left.__getitem__, name=pruner.name):
                self.dropping.recording.of(span).asked.setdefault(order, []).append(view.index)
                self.dropping.apply(
                    run, span, selection, order=order, pruner=pruner, budget=budget, layer=view.index + 1
                )
        return view

    @staticmethod
    def _asks(plan: Plan, span: ImageSpan, order: int, index: int) -> bool:
        return plan.asks(order, index, span.entered.numel(), alive=span.kept.numel())

    def close(self, run: DecoderRun) -> None:
        """Cuts the caches that are to hold only what the last layer left."""
        if self.of.cut and run.layers is not None:
            run.cut_caches(self.of.cut)
            for span in run.spans:
                self.dropping.recording.of(span).cut = self.of.cut


def by_prompt(spans: Sequence[ImageSpan]) -> list[list[ImageSpan]]:
    """Images by the conversation that they belong to."""
    found: dict[tuple[int, int], list[ImageSpan]] = {}
    for span in spans:
        found.setdefault(span.key, []).append(span)
    return list(found.values())


def _selecting(pruner: BeforeDecoder, stream: VisionStream) -> Asking[Selection | None]:
    """The call that asks a method about an image, or about each of its rectangles."""
    if stream.rectangles:
        return started(select_by_part, pruner, stream)
    return started(pruner.select, stream)


def _remembering(pruners: list[Pruner], streams: list[VisionStream]) -> list[VisionStream]:
    """The streams with what their method remembers of each; pruners: it, as it treats each stream."""
    asked = [(one, stream) for one, stream in zip(pruners, streams, strict=True) if isinstance(one, BetweenLayers)]
    if not asked:
        return streams
    memories = together(
        [
            started(remember_by_part, one, stream) if stream.rectangles else started(one.remember, stream)
            for one, stream in asked
        ]
    )
    return [replace(stream, memory=memory) for stream, memory in zip(streams, memories, strict=True)]


def _constant(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) and value.requires_grad else value
