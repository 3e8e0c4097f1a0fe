"""The choice itself, for one image of an engine's batch."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vtprune.encoder.selecting import select_encoded
from vtprune.errors import ScoreError
from vtprune.method.pruner import Pruner
from vtprune.method.selecting import select
from vtprune.method.views import LayerSignals

logger = logging.getLogger("vllm.vtprune")


@dataclass(frozen=True)
class Shown:
    """features: (N, D) of one image; grid: (t, h, w); count: how many tokens were promised; pixels: as the tower got
    them; signals: of the layer that feeds the decoder; text, text_ids: (T, D) and (T,) of the prompt, or empty;
    source: the model's folder; module: the weights of a trained method; chosen: (K,) the tokens that `choose_encoded`
    has chosen already, None where the features are what is chosen among."""

    features: Tensor
    grid: tuple[int, int, int]
    count: int
    pixels: Tensor
    signals: LayerSignals
    text: Tensor
    text_ids: Tensor
    source: str
    module: nn.Module | None = None
    chosen: Tensor | None = None


def choose(pruner: Pruner, shown: Shown) -> tuple[Tensor, Tensor]:
    """What goes on of an image: (K, D) vectors, and the (K,) places of their tokens, K the promised count.

    An image whose features are no numbers must not end the engine that others are served by: it keeps tokens evenly
    spread over it, and the log names the method. Raises RuntimeError for a method that breaks its promise.
    """
    total = len(shown.features)
    if shown.chosen is not None:
        return shown.features[shown.chosen], shown.chosen
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
            module=shown.module,
        )
    except ScoreError as error:
        kept = _spread(error, shown.count, total=total, device=shown.features.device)
        return shown.features[kept], kept
    _check(pruner, len(chosen.kept), promised=shown.count, total=total)
    return chosen.features, chosen.kept


def choose_encoded(
    pruner: Pruner, states: Tensor, *, grid: tuple[int, int, int], count: int, signals: LayerSignals
) -> tuple[Tensor, Tensor]:
    """The same of a method that chooses among what the encoder puts out, (P + N * group, D): the states, those of the
    kept tokens with what flowed into them, and the (K,) places of these. The others are not read any more."""
    total = math.prod(grid)
    if count >= total:
        return states, torch.arange(total, device=states.device)
    try:
        chosen = select_encoded(states, pruner, grid=grid, signals=signals)
    except ScoreError as error:
        return states, _spread(error, count, total=total, device=states.device)
    _check(pruner, len(chosen.kept), promised=count, total=total)
    rows = chosen.kept[:, None] * signals.group + torch.arange(signals.group, device=states.device)
    return states.index_copy(0, signals.prefix + rows.flatten(), chosen.features), chosen.kept


def _spread(error: ScoreError, count: int, *, total: int, device: torch.device) -> Tensor:
    """(count,) tokens evenly spread over an image that was not scored."""
    logger.error("%s; the image keeps %d tokens evenly spread over it", error, count)
    return torch.arange(count, device=device) * total // count


def _check(pruner: Pruner, kept: int, *, promised: int, total: int) -> None:
    if kept != promised:
        raise RuntimeError(f"{pruner.name} kept {kept} tokens of {total} where it promised {promised}")
    logger.debug("%s kept %d of %d tokens", pruner.name, kept, total)
