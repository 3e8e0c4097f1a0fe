"""Turbo: in every encoder layer, tokens that say nothing new and matter little flow into their likes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from vtprune.errors import VTPruneError
from vtprune.method.answers import EncoderSelection
from vtprune.method.facts import Work
from vtprune.method.pruner import Tunable
from vtprune.method.registry import register
from vtprune.method.views import EncoderLayer
from vtprune.pruners.parts.bipartite import Bipartite, flowing
from vtprune.pruners.parts.checks import check_choice, check_count, check_factor
from vtprune.pruners.parts.patches import saliency

SCALE = 30


@register(
    "turbo",
    paper="Turbo: Informativity-Driven Acceleration Plug-In for Vision-Language Large Models",
    arxiv="2407.11717",
    licence="none (no licence file; parts from BLIP, BSD-3, and ToMe, CC BY-NC 4.0)",
    needs="q and k of every encoder layer; attention that takes a bias for each key (not FlashAttention)",
)
@dataclass(frozen=True)
class Turbo(Bipartite):
    """Turbo: Informativity-Driven Acceleration Plug-In for Vision-Language Large Models (ECCV 2024, arXiv 2407.11717,
    first as 2312.07408).

    alpha: weight of semantic value; beta, gamma: it is multiplied by beta ** |gamma - layer|; r: tokens that merge
    in each layer, as released, instead of `keep`; layers: only the first so many of the encoder layers that feed
    the decoder merge, None is all; merge: False drops the tokens that would flow into others, to measure what
    merging buys. `default_keep` is what the authors' BLIP runs leave at r=30: 216 of 576.

    Between attention and MLP of each layer every second token (the CLS token's place is the first, it never
    merges) may flow into the one of the others with the most similar head-mean key: those with the highest
    cosine minus 30 * alpha * beta ** |gamma - layer| times their CLS attention do. Vectors are means weighted
    by the tokens that each one stands for, and these weigh keys in the layers that follow (log size).

    Reference: anakin-skywalker-Joseph/Turbo (no licence file; read, not copied). The 30 is in the code, not in the
    paper; alpha 5, beta 1, gamma 0 are what its commands for VQA, captions and retrieval set (defaults of the
    code: alpha 1). Departures: `keep` is met exactly, N - keep spread evenly over the layers, earlier layers
    merging more where later ones, which halve the tokens at most, could not catch up, and no lower bound of 40
    tokens; tokens stay in raster order, so in each layer neighbours part (the code puts the destinations last)
    and a merged one takes the place of its lowest member. With r a layer merges half of its tokens at most.

    Encoders without CLS (SigLIP, Qwen; not in the paper): the attention that a token receives, mean over heads and
    queries, is its semantic value. On Qwen whole merge groups flow patch by patch, keys (with their rotary
    embedding) are averaged over them and attention summed; layers that attend within windows are scored over the
    whole image, and tokens of different windows may merge.
    """

    alpha: float = 5.0
    beta: float = 1.0
    gamma: float = 0.0
    r: int | None = None
    layers: int | None = None
    merge: bool = True

    @property
    def default_keep(self) -> float | None:
        """What the authors' runs at r=30 leave; None where `r` decides."""
        return None if self.r is not None else 216 / 576

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("alpha", "beta", "gamma"):
            check_factor(self.name, option, getattr(self, option))
        for option in ("r", "layers"):
            if getattr(self, option) is not None:
                check_count(self.name, option, getattr(self, option))
        check_choice(self.name, "merge", self.merge, (True, False))
        self.check_rates(self.r)

    def rates(self, layers: int) -> tuple[int, ...] | None:
        """`r` in each of them."""
        return None if self.r is None else (self.r,) * layers

    def resolve(self) -> dict[str, Any]:
        """`layers` resolved; raises VTPruneError where the encoder has fewer, or cannot get to a share that low, and
        where what semantic value weighs in one of them is no finite number."""
        found = super().resolve()
        for index in range(found["layers"]):
            self._coefficient(index)
        return found

    @property
    def weighs_keys(self) -> bool:
        """Whether it merges."""
        return self.merge

    def search_space(self, tokens: float) -> dict[str, Tunable]:
        """How much semantic value weighs, and how fast that fades with depth."""
        return {"alpha": Tunable(0.0, 10.0), "beta": Tunable(0.5, 1.0)}

    def prune_encoder(self, layer: EncoderLayer) -> EncoderSelection:
        """What merges in this layer; raises ScoreError for NaN, VTPruneError for a budget out of reach."""
        value = saliency(layer, sized=self.merge)
        matches, left = self.matched(layer, value, self._coefficient(layer.index))
        if self.merge:
            return flowing(layer, matches, left)
        into = matches.into(layer.valid.shape[1])
        keep = into == torch.arange(into.shape[1], device=into.device)
        return EncoderSelection.drop(layer.valid & keep, left)

    def _coefficient(self, index: int) -> float:
        """What semantic value weighs in a layer; raises VTPruneError where it is no finite number."""
        try:
            found = SCALE * self.alpha * self.beta ** abs(self.gamma - index)
        except (OverflowError, ZeroDivisionError):
            found = math.inf
        if not math.isfinite(found):
            raise VTPruneError(
                f"turbo: alpha * beta ** |gamma - {index}| overflows with alpha={self.alpha!r}, beta={self.beta!r}, "
                f"gamma={self.gamma!r}; beta lies near 1"
            )
        return found

    def flops(self, work: Work) -> int:
        """In every layer the attention row (all rows without CLS) and the similarities between the two halves."""
        rows = 0
        for layer in work.encoder_layers:
            patches = work.encoder_patches[layer]
            rows += patches if work.has_cls else patches // work.units * patches
        return super().flops(work) + 2 * rows * work.encoder_width
