"""Tokens that were left out and may return: which forwards know such, who chooses among them, and what waits."""

from __future__ import annotations

from dataclasses import dataclass

from vtprune.adapters.base import Adapter
from vtprune.cache.books import books, entry_layers
from vtprune.decoder.revival import Revival, check_revival
from vtprune.decoder.run import DecoderRun, LayerView, Observer
from vtprune.method.pruner import Pruner
from vtprune.method.stages import revives
from vtprune.tensors.attention import full_precision


class Returning:
    """The hooks' work for the one method of a list whose tokens return, if there is one; tapped: the decoder layers
    whose queries can be seen."""

    def __init__(self, adapter: Adapter, pruners: list[Pruner], tapped: frozenset[int]) -> None:
        self.pruner = next((pruner for pruner in pruners if revives(pruner)), None)
        self._name = "+".join(pruner.name for pruner in pruners)
        self._adapter, self._tapped = adapter, tapped

    def open(self, run: DecoderRun) -> Revival | None:
        """The shaper of a forward on a cache whose tokens may return, or that leaves some out which may; raises
        VTPruneError where they cannot."""
        layers = run.layers
        if layers is None or (books(layers).log is None and (self.pruner is None or not run.spans)):
            return None
        entries = entry_layers(layers)
        check_revival(entries, self.pruner, self._tapped, flash=run.flash, windows=self._adapter.windows)
        return Revival(entries, run.prompt, self._name)

    def choosing(self, revival: Revival | None) -> Choosing | None:
        """Who chooses among the tokens of the cache, if there are any."""
        return None if revival is None or revival.log is None else Choosing(revival, self._adapter)


@dataclass(frozen=True)
class Choosing(Observer):
    """Chooses anew, after each layer that something waits behind, which tokens of the cache the next ones attend to;
    who watches after it sees the input's own tokens alone."""

    revival: Revival
    adapter: Adapter

    def wants(self, index: int) -> bool:
        """Whether tokens are chosen after this layer, or have returned to it."""
        return self.revival.width(index) > 0 or self.revival.decides(index)

    def after(self, run: DecoderRun, view: LayerView) -> LayerView:
        """Raises ScoreError for attention that is not a number."""
        revival = self.revival
        if revival.decides(view.index):
            query = self.adapter.decoder_query(view.taps, view.embeddings)
            with full_precision(view.hidden.device), run.checks.collecting():
                last = run.prompt.conversations.ends(view.places)[1][:, 0]
                revival.decide(view, query=query, last=last, scale=self.adapter.decoder_scale)
        return view.without_front(revival.width(view.index))


@dataclass(frozen=True)
class Leaving(Observer):
    """Keeps, beside the cache, what the layers leave out of the images that came with this input, and in the end what
    this forward attended to."""

    revival: Revival

    def wants(self, index: int) -> bool:
        """Whether there is a layer after this one that something could wait for."""
        return index + 1 < len(self.revival.layers)

    def after(self, run: DecoderRun, view: LayerView) -> LayerView:
        """Notes what was dropped since the layer ran."""
        if any(span.kept is not kept for span, kept in zip(run.spans, view.kept, strict=True)):
            self.revival.record(view, run.spans)
        return view

    def close(self, run: DecoderRun) -> None:
        """Leaves the log with the cache."""
        self.revival.close(run.spans)
