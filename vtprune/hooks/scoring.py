"""What methods see of a decoder layer that ran, image by image."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from vtprune.adapters.base import Adapter
from vtprune.decoder.prompt import ImageSpan
from vtprune.decoder.run import DecoderRun, LayerView
from vtprune.method.deferred import later
from vtprune.method.plan import Plans
from vtprune.method.pruner import Pruner
from vtprune.method.stages import NOTHING, BetweenLayers, Query, Read
from vtprune.method.views import DecoderLayer
from vtprune.tensors.compaction import fill_index
from vtprune.tensors.taps import tapped

States = tuple[Tensor, Tensor]


class DecoderScoring:
    """The decoder layers of one model, and the methods that score them."""

    def __init__(self, adapter: Adapter, pruners: list[Pruner], plans: Plans) -> None:
        self.adapter, self.pruners, self.plans = adapter, pruners, plans
        self.layers = list(adapter.decoder_layers)


def one_column(columns: list[list[int]], device: torch.device) -> Tensor | int:
    """(B, C) these columns, or the one that they are if each row has the same one alone."""
    first = columns[0][0]
    return first if all(row == [first] for row in columns) else torch.tensor(columns, device=device)


class SeenLayer:
    """A layer that ran as methods see it; unlabelled: whether they see each conversation's text without answers."""

    def __init__(self, scoring: DecoderScoring, run: DecoderRun, view: LayerView, *, unlabelled: bool = False) -> None:
        self._scoring, self._run, self._view = scoring, run, view
        self._words = run.unlabelled_words if unlabelled else run.words
        self._text = run.unlabelled if unlabelled else run.texts
        self._packed = view.places is not None
        self._ends = run.ends([kept.numel() for kept in view.kept], packed=self._packed)
        self._states: dict[Query, States] = {}

    @cached_property
    def _last(self) -> Tensor | int:
        """(B, C) the columns of the last token of each conversation's prompt, or the one where all rows have the
        same."""
        return one_column(self._ends[1], self._view.hidden.device)

    @cached_property
    def _where(self) -> Tensor | None:
        """(B, L) the column of each place, where only what is alive has one."""
        places = self._view.places
        return None if places is None else fill_index(places, self._run.prompt.length)

    def _vision(self, span: ImageSpan) -> Tensor:
        """The columns of an image's tokens."""
        places = self._view.places
        if places is None:
            return span.standing
        if len(places) == 1:
            # Images are alive where they are asked about.
            return torch.searchsorted(places[0], span.standing)
        assert self._where is not None
        return self._where[span.row].index_select(0, span.standing)

    def _words_of(self, span: ImageSpan) -> Tensor:
        """The columns of an image's text."""
        places, words = self._view.places, self._text[span.key]
        if places is None:
            return words
        if len(places) == 1:
            # Of the text line ends may be gone.
            return (torch.searchsorted(places[0], words, right=True) - 1).clamp_(min=0)
        assert self._where is not None
        return self._where[span.row].index_select(0, words)

    @cached_property
    def _held(self) -> States | None:
        """(B, KV, n, d) keys and values as the layer's cache has them, if it has one; not where methods see some heads
        alone, those that read vision."""
        view, sizes = self._view, self._scoring.adapter.decoder_sizes
        whole = tapped(view.taps, "q").shape[2:].numel() == sizes.heads * sizes.head_size
        return self._run.cached(view.index, view.hidden.shape[1]) if whole else None

    @torch.no_grad()
    def _seen(self, asks: Query) -> States:
        """(B, H, n, d) queries and keys of the layer, or what `asks` says of them: the queries of the last token of
        each prompt alone, these and all keys of the next layer, or no columns at all."""
        view, adapter = self._view, self._scoring.adapter
        if asks is Query.NOBODY:
            none = view.hidden.new_empty(view.hidden.shape[0], 0, 0, 0)
            return none, none
        if asks is Query.NEXT_LAYER:
            layer = self._scoring.layers[view.index + 1]
            return adapter.query_and_keys(layer, view.hidden, view.embeddings, self._last)
        query = adapter.decoder_query(view.taps, view.embeddings, self._last if asks is Query.LAST else None)
        keys = adapter.decoder_keys(view.taps, view.embeddings) if self._held is None else self._held[0]
        return query, adapter.repeated(keys)

    @cached_property
    @torch.no_grad()
    def _values(self) -> Tensor:
        """(B, H, n, d) of the layer."""
        adapter, held = self._scoring.adapter, self._held
        return adapter.repeated(adapter.decoder_values(self._view.taps) if held is None else held[1])

    def _value(self, row: int) -> Tensor:
        return self._values[row]

    def _after(self, span: ImageSpan) -> int:
        """The column after an image's last token."""
        return self._run.column_after(span, [kept.numel() for kept in self._view.kept], packed=self._packed)

    def of(self, span: ImageSpan, order: int, budget: int | None) -> DecoderLayer:
        """For one image, and the method at place `order` of the list, which is to leave it so many tokens at the most;
        None: as many as it finds right."""
        view, row, scoring = self._view, span.row, self._scoring
        pruner = scoring.pruners[order]
        asks, looks = Query.ALL, NOTHING
        if isinstance(pruner, BetweenLayers):
            asks, looks = pruner.query, pruner.layer_reads
        if asks not in self._states:
            self._states[asks] = self._seen(asks)
        query, key = (part[row] for part in self._states[asks])
        if asks in (Query.LAST, Query.NEXT_LAYER):
            query = query[:, span.talk, None]
        hidden = Read.HIDDEN in looks
        first, last = (ends[row][span.talk] for ends in self._ends)
        return DecoderLayer(
            query=query,
            key=key,
            value=later(self._value, row) if asks is Query.ALL else key[:, :0],
            vision=self._vision(span),
            last=last,
            scale=scoring.adapter.decoder_scale,
            total=span.image.total,
            indices=span.kept,
            budget=span.kept.numel() if budget is None else budget,
            index=view.index,
            depth=pruner.model.decoder_depth,
            text=later(self._words_of, span),
            memory=span.memories.get(order, {}),
            entered=span.entered.numel(),
            processed=span.processed,
            hidden=view.hidden[row] if hidden else None,
            final_norm=scoring.adapter.final_normed if hidden else None,
            rotary=later(_of_row, view.embeddings, row),
            first=first,
            text_after=later(span.words_after, self._words[span.key]),
            after=later(self._after, span),
        )


def _of_row(embeddings: States, row: int) -> States:
    """The rotary embeddings (n, d) of one row, from those (B or 1, n, d) of all."""
    cos, sin = (part[row if len(part) > 1 else 0] for part in embeddings)
    return cos, sin
