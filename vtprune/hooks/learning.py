"""What the decoder teaches the weights that a method brings: scores by the attention of one of its layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtprune.method.answers import Selection
from vtprune.method.pruner import Pruner
from vtprune.method.stages import Guided
from vtprune.method.views import DecoderLayer
from vtprune.tensors.attention import full_precision

if TYPE_CHECKING:
    from vtprune.decoder.run import DecoderRun, ImageSpan


@dataclass(frozen=True)
class Lesson:
    """The scores (N,) that a method, by its place in the list, gave the tokens (N,) that an image then had, and the
    layer that they are to learn from, once it ran."""

    span: ImageSpan
    order: int
    indices: Tensor
    scores: Tensor
    layer: DecoderLayer | None = None


class Teacher:
    """Brings together the scores that methods give before the decoder and the layers that they learn from.

    A layer is only looked at when it runs; losses are computed after the last one, outside of what gradient
    checkpointing computes twice.
    """

    def __init__(self, pruners: list[Pruner]) -> None:
        self._guided = {order: pruner for order, pruner in enumerate(pruners) if isinstance(pruner, Guided)}
        found = {order: pruner.learns_from() for order, pruner in self._guided.items()}
        self._layer_of = {order: layer for order, layer in found.items() if layer is not None}
        self.layers = set(self._layer_of.values())

    def enrol(self, run: DecoderRun, span: ImageSpan, order: int, selection: Selection) -> None:
        """Notes the scores of a choice that was carried out."""
        if selection.scores is not None and order in self._layer_of:
            kept = selection.kept.to(selection.scores.device)
            run.lessons.append(Lesson(span, order, span.kept, selection.scores[kept]))

    def wanted(self, run: DecoderRun, index: int) -> list[tuple[ImageSpan, int]]:
        """The images and methods that learn from layer `index`."""
        return [(one.span, one.order) for one in run.lessons if self._layer_of[one.order] == index]

    def show(self, run: DecoderRun, views: Iterable[tuple[ImageSpan, int, DecoderLayer]]) -> None:
        """Notes the layer for those that wanted it."""
        seen = {(id(span), order): layer for span, order, layer in views}
        run.lessons = [replace(one, layer=seen.get((id(one.span), one.order), one.layer)) for one in run.lessons]

    def close(self, run: DecoderRun) -> None:
        """Leaves each method's mean loss over its images with the run."""
        losses: dict[int, list[Tensor]] = {}
        for one in run.lessons:
            if one.layer is None:
                continue
            # A later method of the list may have dropped some tokens since.
            left = torch.isin(one.indices, one.layer.indices.to(one.indices.device)).to(one.scores.device)
            with full_precision(run.prompt.device):
                losses.setdefault(one.order, []).append(self._guided[one.order].lesson(one.scores[left], one.layer))
        for order, found in losses.items():
            # Routed layers count from 0.
            run.losses[-1 - order] = torch.stack(found).mean()
        run.lessons = []
