"""What a method dropped between decoder layers, written down, to be dropped again without scoring anything."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

import vtprune
from vtprune.errors import VTPruneError
from vtprune.method.answers import Selection
from vtprune.method.catalogue import PrunerInfo
from vtprune.method.pruner import Pruner
from vtprune.method.stages import BetweenLayers, Query
from vtprune.method.views import DecoderLayer, VisionStream
from vtprune.report.report import Report


@dataclass(frozen=True)
class Replay(BetweenLayers):
    """Drops what another method dropped between decoder layers, without scoring anything.

    chosen: for each image, the decoder layer after which tokens drop to the indices (K,) that stay of those left;
    after: text tokens behind each image, by which they are told apart.
    """

    chosen: tuple[dict[int, Tensor], ...] = field(default=(), compare=False)
    after: tuple[int, ...] = ()

    # Not even that.
    query = Query.LAST
    info: ClassVar[PrunerInfo] = PrunerInfo(
        "replay", "decoder", paper="", arxiv="", licence="", needs="choices made beforehand"
    )

    def budget(self, tokens: int) -> int:
        """What the last drop leaves."""
        return min(kept.numel() for image in self.chosen for kept in image.values())

    def remember(self, stream: VisionStream) -> dict[str, Any]:
        """Which image this is."""
        return {"image": self.after.index(stream.text_after)}

    def drop_layers(self) -> tuple[int, ...]:
        """Those after which tokens dropped."""
        return tuple(sorted({layer for image in self.chosen for layer in image}))

    def drop_budget(self, tokens: int, layer: int, entered: int) -> int:
        """What is left of the image that keeps the most."""
        return max(image[layer].numel() for image in self.chosen if layer in image)

    def prune_decoder(self, layer: DecoderLayer) -> Selection | None:
        """The choice made beforehand."""
        kept = self.chosen[layer.memory["image"]].get(layer.index)
        return None if kept is None else Selection(kept)


@dataclass(frozen=True)
class Recorded:
    """What a method did to a prompt: its report after the prefill, and the same choices in two other forms."""

    pruner: Pruner
    report: Report
    replay: Replay
    plan: dict[int, Tensor]

    @property
    def promised(self) -> float:
        """The speed-up of the prefill by FLOPs, scoring included."""
        return self.report.flops_full / self.report.flops

    @property
    def promised_unscored(self) -> float:
        """The same, scoring left out."""
        return self.report.flops_full / (self.report.flops - self.report.flops_breakdown.scoring)


def record(model: Any, inputs: dict[str, Tensor], pruner: Pruner) -> Recorded:
    """Prefills a prompt of one row, whose images are of one size, under the pruner, and writes down its choices.

    Raises VTPruneError for a method that drops nothing between decoder layers, or something elsewhere.
    """
    with torch.inference_mode(), vtprune.wrapped(model, pruner):
        model(**inputs, use_cache=True, logits_to_keep=1)
        report = vtprune.report(model)
    images, device = report.samples[0].images, inputs["input_ids"].device
    if (
        any(len(image.kept) < image.tokens for image in images)
        or report.tokens_per_layer[0] == report.tokens_per_layer[-1]
    ):
        raise VTPruneError(
            f"{pruner.name}: choices are written down for methods that drop tokens between decoder layers, and only "
            "there; vtprune.evals.speed.overhead times any method"
        )
    marks = inputs["input_ids"][0] == model.config.image_token_id
    places = marks.nonzero().flatten().split([image.tokens for image in images])
    after = tuple(int((~marks[int(own[-1]) :]).sum()) for own in places)
    chosen = tuple(_drops([torch.tensor(kept, device=device) for kept in image.kept_per_layer]) for image in images)
    alive = []
    for layer in range(len(report.tokens_per_layer)):
        left = ~marks
        for own, image in zip(places, images, strict=True):
            left[own[image.kept_per_layer[layer]]] = True
        alive.append(left.nonzero().flatten())
    before = tuple({layer - 1: kept for layer, kept in drops.items()} for drops in chosen)
    return Recorded(pruner, report, Replay(0.5, before, after), _drops(alive))


def _drops(alive: list[Tensor]) -> dict[int, Tensor]:
    """For each layer at which fewer of the ascending `alive` are left: where they stood at the one before."""
    return {
        layer: torch.searchsorted(earlier, now)
        for layer, (earlier, now) in enumerate(itertools.pairwise(alive), 1)
        if now.numel() < earlier.numel()
    }
