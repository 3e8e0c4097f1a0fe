"""Writing down what a forward of the decoder does to its images, for the report."""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune.adapters.base import Adapter
from vtprune.cache.books import books
from vtprune.cache.names import GENERATION, ROWS
from vtprune.decoder.prompt import ImageSpan
from vtprune.decoder.run import DecoderRun, Observer
from vtprune.hooks.state import ThreadState
from vtprune.method.answers import Selection
from vtprune.method.facts import ModelFacts
from vtprune.method.plan import Plans
from vtprune.method.pruner import asked
from vtprune.method.sharing import Sharing
from vtprune.report.generation import Generation
from vtprune.report.history import origins
from vtprune.report.trail import ImageTrail, Trail, still_there


class Recorder:
    """Keeps the records of one wrapped model; last: that of its last generation, whichever thread ran it."""

    def __init__(
        self, adapter: Adapter, plans: Plans, facts: ModelFacts, *, state: ThreadState, sharing: Sharing | None
    ) -> None:
        self.last: Generation | None = None
        self.state = state
        self._adapter, self._plans, self._facts = adapter, plans, facts
        self._sharing = sharing

    def open(self, run: DecoderRun) -> Recording:
        """The record of one forward."""
        return Recording(self, run.spans)

    def generation(self, run: DecoderRun, trail: Trail) -> Generation:
        """The record of this generation: the cache's own, unless this forward brings a prompt of its own."""
        cache, prompt = run.cache, run.prompt
        known = getattr(cache, GENERATION, None) if cache is not None else None
        if known is not None and prompt.offset > 0 and not run.spans:
            return known
        texts = prompt.outline.counts()
        for span in run.spans:
            texts[span.row][span.talk] -= span.image.total
        earlier: list[ImageTrail] = []
        if known is not None and run.layers is not None and prompt.offset > 0:
            # Rows may have been reordered or repeated since; from here on they count as they stand.
            earlier = still_there(known.images, known.origins(origins(run.layers)), prompt.offset)
            number_rows(run)
        plans = self._plans.now()
        generation = Generation(
            cost=self._adapter.cost,
            plans=plans,
            asked=[asked(one) if self._sharing is None else self._sharing.keep for one in plans.pruners],
            facts=self._facts,
            depth=self._facts.decoder_depth,
            dtype=next(iter(self._adapter.language_model.parameters())).dtype,
            trail=trail,
            texts=texts,
            earlier=earlier,
            offset=prompt.offset,
        )
        if cache is not None:
            setattr(cache, GENERATION, generation)
        return generation


class Recording(Observer):
    """The record of one forward while it runs: the trail of each of its images."""

    def __init__(self, recorder: Recorder, spans: list[ImageSpan]) -> None:
        self._recorder = recorder
        self.trail = Trail.of(spans)
        self._of = dict(zip(spans, self.trail.images, strict=True))
        self._generation: Generation | None = None

    def of(self, span: ImageSpan) -> ImageTrail:
        """The trail of one of the forward's images."""
        return self._of[span]

    def begin(self, run: DecoderRun) -> None:
        """From here on the report of the run's cache is that of this forward's prompt, if it brings one."""
        self._generation = self._recorder.generation(run, self.trail)

    def dropped(
        self, span: ImageSpan, before: Tensor, selection: Selection, *, order: int, name: str, layer: int
    ) -> None:
        """Notes what the pruner `name`, at place `order` of the list, chose among the tokens `before` (N,); layer: the
        decoder layer before which they dropped out."""
        trail = self.of(span)
        if selection.merges:
            trail.merges.append((layer, before, selection.merges))
        trail.left[order] = span.kept.numel()
        if selection.note:
            trail.notes.append(f"{name}: {selection.note}")

    def close(self, run: DecoderRun) -> None:
        """Notes what is left of the images, and what the cache holds."""
        for span, trail in self._of.items():
            trail.layers, trail.memories, trail.seen = span.layers, span.memories, span.seen
        generation, recorder = self._generation, self._recorder
        assert generation is not None
        if run.prompt.offset > 0 and not run.spans:
            generation.steps += 1
        # A first prompt says on the host whether any of its rows is padded.
        whole = bool(run.spans) and not run.prompt.offset and bool((run.prompt.outline.number >= 0).all())
        generation.note_cache(run.cache, run.layers, run.prompt.mask, padded=not whole)
        if recorder.state.call is None or recorder.state.call.asks_for(run):
            recorder.last = recorder.state.generation = generation


def number_rows(run: DecoderRun) -> None:
    """Leaves with the cache that its rows stand as those of this prompt."""
    assert run.layers is not None
    books(run.layers).aux[ROWS] = torch.arange(run.prompt.batch, device=run.prompt.device)[:, None]
