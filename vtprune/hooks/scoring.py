"""What methods see of a decoder layer that ran, image by image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from vtprune.adapters.base import Adapter
from vtprune.decoder.prompt import ImageSpan
from vtprune.decoder.run import DecoderRun, Texts
from vtprune.method.plan import Plans
from vtprune.method.pruner import Pruner
from vtprune.method.stages import NOTHING, BetweenLayers, Query, Read, drop_layers
from vtprune.method.views import DecoderLayer
from vtprune.tensors.compaction import fill_index

States = tuple[Tensor, Tensor, Tensor]


class DecoderScoring:
    """Shows the layers of one model's decoder to the methods that score them."""

    def __init__(self, adapter: Adapter, pruners: list[Pruner], depth: int, plans: Plans) -> None:
        self.adapter, self.pruners, self.depth, self._plans = adapter, pruners, depth, plans
        self._layers = list(adapter.decoder_layers)

    def views(
        self, run: DecoderRun, index: int, embeddings: tuple[Tensor, Tensor], hidden: Tensor
    ) -> Iterator[tuple[ImageSpan, int, DecoderLayer]]:
        """Each image and method (by its place in the list) that has to say which tokens go on after layer `index`.

        embeddings: of that layer; hidden: (B, n, D) after it. What a method answers is to be carried out before
        the next view is asked for.
        """
        scoring = [order for order, pruner in enumerate(self.pruners) if index in drop_layers(pruner)]
        if not any(self._asked(span, order, index) for order in scoring for span in run.spans):
            return
        wanted = ((span, order) for span in run.spans for order in scoring if self._asked(span, order, index))
        for span, order, layer in self.shown(run, index, embeddings, hidden, run.texts, wanted):
            span.asked.setdefault(order, []).append(index)
            yield span, order, layer

    def shown(
        self,
        run: DecoderRun,
        index: int,
        embeddings: tuple[Tensor, Tensor],
        hidden: Tensor,
        text: Texts,
        wanted: Iterable[tuple[ImageSpan, int]],
    ) -> Iterator[tuple[ImageSpan, int, DecoderLayer]]:
        """Layer `index` as each of these images and methods sees it; arguments as for `views`, and `text`:
        places of each conversation's text tokens."""
        places = run.layout(index).places
        where = None if places is None else fill_index(places, run.prompt.length)
        first, last = run.ends(places)
        cos, sin = (part.expand(hidden.shape[0], *part.shape[1:]) for part in embeddings)
        states: dict[tuple[bool, bool], States] = {}
        for span, order in wanted:
            row, pruner = span.row, self.pruners[order]
            asks, looks = Query.ALL, NOTHING
            if isinstance(pruner, BetweenLayers):
                asks, looks = pruner.query, pruner.layer_reads
            kind = asks is Query.NEXT_LAYER, asks is Query.LAST
            if kind not in states:
                states[kind] = self._states(run, index, embeddings, hidden, last, *kind)
            query, key, value = (part[row] for part in states[kind])
            if any(kind):
                query = query[:, span.talk, None]
            vision, words = span.places[span.kept], text[span.key]
            if where is not None:
                vision, words = where[row, vision], where[row, words]
            entered = span.kept_at(0).numel()
            budget = self._plans.of(span.image.total).left(order, index, entered)
            layer = DecoderLayer(
                query=query,
                key=key,
                value=value,
                vision=vision,
                last=int(last[span.key]),
                scale=self.adapter.decoder_scale,
                total=span.image.total,
                indices=span.kept,
                budget=span.kept.numel() if budget is None else budget,
                index=index,
                depth=self.depth,
                text=words,
                memory=span.memories.get(order, {}),
                entered=entered,
                processed=sum(span.kept_at(one).numel() for one in range(index + 1)),
                hidden=hidden[row] if Read.HIDDEN in looks else None,
                rotary=(cos[row], sin[row]),
                first=int(first[span.key]),
            )
            yield span, order, layer

    @torch.no_grad()
    def _states(
        self,
        run: DecoderRun,
        index: int,
        embeddings: tuple[Tensor, Tensor],
        hidden: Tensor,
        last: Tensor,
        ahead: bool,
        single: bool,
    ) -> States:
        """q, k and v of the layer that ran; `single`: of queries those in the columns `last` (B, C) alone; `ahead`:
        these queries and all keys of the next layer."""
        if not ahead:
            return self.adapter.decoder_states(run.taps, embeddings, last if single else None)
        query, key = self.adapter.query_and_keys(self._layers[index + 1], hidden, embeddings, last)
        return query, key, key[:, :, :0]

    def _asked(self, span: ImageSpan, order: int, index: int) -> bool:
        """Whether a method has to say which tokens of an image go on after a decoder layer."""
        plan = self._plans.of(span.image.total)
        return plan.asks(order, index, span.kept_at(0).numel(), alive=span.kept.numel())
