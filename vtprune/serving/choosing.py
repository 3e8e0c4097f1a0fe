"""The choice itself, for one image of an engine's batch."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from vtprune.errors import ScoreError
from vtprune.method.pruner import Pruner
from vtprune.method.selecting import select
from vtprune.method.views import LayerSignals

logger = logging.getLogger("vllm.vtprune")


@dataclass(frozen=True)
class Shown:
    """features: (N, D) of one image; grid: (t, h, w); count: how many tokens were promised; pixels: as the tower got
    them; signals: of the layer that feeds the decoder; text, text_ids: (T, D) and (T,) of the prompt, or empty;
    source: the model's folder."""

    features: Tensor
    grid: tuple[int, int, int]
    count: int
    pixels: Tensor
    signals: LayerSignals
    text: Tensor
    text_ids: Tensor
    source: str


def choose(pruner: Pruner, shown: Shown) -> tuple[Tensor, Tensor]:
    """What goes on of an image: (K, D) vectors, and the (K,) places of their tokens, K the promised count.

    An image whose features are no numbers must not end the engine that others are served by: it keeps tokens evenly
    spread over it, and the log names the method. Raises RuntimeError for a method that breaks its promise.
    """
    total = len(shown.features)
    if shown.count >= total:
        return shown.features, torch.arange(total, device=shown.features.device)
    try:
        chosen = select(
            shown.features,
            pruner,
            grid=shown.grid,
            signals=shown.signals,
            pixels=shown.pixels,
            text=shown.text,
            text_ids=shown.text_ids,
            source=shown.source,
        )
    except ScoreError as error:
        logger.error("%s; the image keeps %d tokens evenly spread over it", error, shown.count)
        kept = torch.arange(shown.count, device=shown.features.device) * total // shown.count
        return shown.features[kept], kept
    if len(chosen.kept) != shown.count:
        raise RuntimeError(f"{pruner.name} kept {len(chosen.kept)} tokens of {total} where it promised {shown.count}")
    logger.debug("%s kept %d of %d tokens", pruner.name, shown.count, total)
    return chosen.features, chosen.kept
