"""What methods with weights of their own learn by: the attention of a decoder layer, for scores, and what is added to
the loss of a forward."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.decoder.prompt import ImageSpan
from vtprune.decoder.run import DecoderRun, LayerView, Observer
from vtprune.hooks.scoring import DecoderScoring, SeenLayer
from vtprune.hooks.state import ThreadState
from vtprune.method.answers import Selection
from vtprune.method.pruner import Pruner
from vtprune.method.stages import Guided
from vtprune.method.views import DecoderLayer
from vtprune.tensors.attention import full_precision


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
    """Brings together the scores that methods give before the decoder and the layers that they learn from; hooks add
    what comes of it to a forward's loss."""

    def __init__(self, pruners: list[Pruner], *, scoring: DecoderScoring, state: ThreadState) -> None:
        self.scoring, self.state = scoring, state
        self.guided = {order: pruner for order, pruner in enumerate(pruners) if isinstance(pruner, Guided)}
        found = {order: pruner.learns_from() for order, pruner in self.guided.items()}
        self.layer_of = {order: layer for order, layer in found.items() if layer is not None}
        self.layers = set(self.layer_of.values())

    def open(self, run: DecoderRun) -> Lessons:
        """What is learned in one forward."""
        return Lessons(self)

    def open_loss(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Before a forward of the whole model: nothing is added to its loss so far, and its labels are known."""
        self.state.loss, self.state.lessons = None, []
        if kwargs.get("labels") is not None:
            self.state.labels = kwargs["labels"]

    def add_loss(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Adds what methods add to the loss of a forward with labels."""
        self.state.labels = None
        loss = self.state.loss
        if loss is None or output is None or kwargs.get("labels") is None:
            return None
        if isinstance(output, tuple):
            return (output[0] + loss.to(output[0]), *output[1:])
        output.loss = output.loss + loss.to(output.loss)
        return output


class Lessons(Observer):
    """What is learned in one forward.

    A layer is only looked at when it runs; losses are computed after the last one, outside of what gradient
    checkpointing computes twice.
    """

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher
        self._lessons: list[Lesson] = []
        # What routing adds to the loss, by layer.
        self.routing: dict[int, Tensor] = {}

    def enrol(self, span: ImageSpan, before: Tensor, selection: Selection, *, order: int) -> None:
        """Notes the scores of a choice among the tokens `before` (N,) that was carried out."""
        if selection.scores is not None and order in self._teacher.layer_of:
            kept = selection.kept.to(selection.scores.device)
            self._lessons.append(Lesson(span, order, span.kept, selection.scores[kept]))

    def wants(self, index: int) -> bool:
        """Whether something learns from this layer."""
        return any(self._layer_of(one) == index for one in self._lessons)

    def after(self, run: DecoderRun, view: LayerView) -> LayerView:
        """Notes the layer for those that learn from it."""
        seen = SeenLayer(self._teacher.scoring, run, view, unlabelled=True)
        self._lessons = [
            replace(one, layer=seen.of(one.span, one.order, None)) if self._layer_of(one) == view.index else one
            for one in self._lessons
        ]
        return view

    def close(self, run: DecoderRun) -> None:
        """Leaves with this thread what is added to the loss: what was learned in the encoder, routing's, and each
        method's mean over its images."""
        losses: dict[int, list[Tensor]] = {}
        for one in self._lessons:
            if one.layer is None:
                continue
            # A later method of the list may have dropped some tokens since.
            left = torch.isin(one.indices, one.layer.indices.to(one.indices.device)).to(one.scores.device)
            with full_precision(run.prompt.device):
                lesson = self._teacher.guided[one.order].lesson(one.scores[left], one.layer)
            losses.setdefault(one.order, []).append(lesson)
        state = self._teacher.state
        found = [*state.lessons, *self.routing.values(), *(torch.stack(own).mean() for own in losses.values())]
        if found:
            state.loss = torch.stack([loss.to(run.prompt.device) for loss in found]).sum()

    def _layer_of(self, lesson: Lesson) -> int:
        return self._teacher.layer_of[lesson.order]
