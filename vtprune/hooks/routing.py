"""Asking a method which tokens a decoder layer computes, and noting what it answered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vtprune.adapters.base import Adapter
from vtprune.decoder.conversation import Conversations
from vtprune.decoder.prompt import ImageSpan
from vtprune.decoder.run import DecoderRun
from vtprune.method.answers import Routes
from vtprune.method.plan import Plans
from vtprune.method.pruner import Pruner
from vtprune.method.stages import InLayers
from vtprune.method.views import RoutedTokens
from vtprune.tensors.attention import full_precision
from vtprune.tensors.compaction import fill_index


class RoutedLayers:
    """The hooks' work for the one method of a list that routes, if there is one."""

    def __init__(self, adapter: Adapter, pruners: list[Pruner], modules: dict[int, nn.Module], plans: Plans) -> None:
        found = [
            (order, pruner)
            for order, pruner in enumerate(pruners)
            if isinstance(pruner, InLayers) and pruner.routed_layers()
        ]
        self.pruner: InLayers | None = found[0][1] if found else None
        self._order = found[0][0] if found else -1
        self.layers = frozenset(self.pruner.routed_layers()) if self.pruner else frozenset()
        self._module = modules.get(found[0][0]) if found else None
        self._modules: list[Any] = list(adapter.decoder_layers)
        self._adapter, self._plans = adapter, plans

    @property
    def routes_text(self) -> bool:
        """Whether forwards without an image are routed, too."""
        return self.pruner is not None and self.pruner.routes_text

    def routes(self, run: DecoderRun, index: int, states: Tensor, places: Tensor | None) -> Routes | None:
        """Which of the tokens at `places` (B, n) (None: all) of the input a layer computes, or None where it is not
        routed."""
        pruner = self.pruner
        if pruner is None or index not in self.layers or not (run.spans or pruner.routes_text):
            return None
        numbers = _numbers(run.spans)
        image = torch.full((run.prompt.batch, run.prompt.length), -1, device=states.device)
        for span, number in zip(run.spans, numbers, strict=True):
            image[span.row, span.places] = number
        real = run.prompt.real().to(states.device)
        if places is not None:
            real = real.gather(1, places.clamp(min=0)) & (places >= 0)
            image = image.gather(1, places.clamp(min=0)).masked_fill(places < 0, -1)
        width = max([0, *numbers]) + 1
        totals, budgets = ([[0] * width for _ in range(run.prompt.batch)] for _ in range(2))
        for span, number in zip(run.spans, numbers, strict=True):
            total, entered = span.image.total, span.kept_at(0).numel()
            totals[span.row][number] = total
            budgets[span.row][number] = self._plans.of(total).routed(self._order, index, entered)
        tokens = RoutedTokens(
            states, self._adapter.decoder_norm(self._modules[index]), real, image,
            torch.tensor(totals, device=states.device), torch.tensor(budgets, device=states.device),
            index, pruner.model.decoder_depth, self._module, bool(self._adapter.language_model.training),
            continues=run.prompt.offset > 0 and not run.spans,
        )  # fmt: skip
        with full_precision(states.device):
            routes = pruner.route(tokens)
        self._note(run, index, routes, places, real & (image < 0))
        return routes

    def _note(self, run: DecoderRun, index: int, routes: Routes, places: Tensor | None, text: Tensor) -> None:
        """Leaves with the images, and with the generation, what the layer computes of this input."""
        if routes.loss is not None:
            run.losses[index] = routes.loss
        if run.prompt.offset and not run.spans:
            return
        where = None if places is None else fill_index(places, run.prompt.length)
        for span in run.spans:
            columns = span.places[span.kept]
            columns = columns if where is None else where[span.row, columns]
            span.routed[index] = span.kept, routes.kept[span.row, columns].to(span.kept.device)
        number = run.prompt.conversations.number
        if places is not None:
            number = number.gather(1, places.clamp(min=0))
        run.generation.routed_text[index] = Conversations(number, run.prompt.conversations.most).counts(
            routes.kept & text
        )


def _numbers(spans: list[ImageSpan]) -> list[int]:
    """Which of its row's images each one is."""
    return [sum(other.row == span.row for other in spans[:at]) for at, span in enumerate(spans)]
