"""Turbo: in every encoder layer, tokens that say nothing new and matter little flow into their likes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vtprune.errors import CannotCut, VTPruneError
from vtprune.method.answers import EncoderSelection
from vtprune.method.checks import check_scores
from vtprune.method.facts import Work
from vtprune.method.pruner import Tunable, asked
from vtprune.method.registry import register
from vtprune.method.stages import InEncoder
from vtprune.method.views import EncoderLayer
from vtprune.pruners.parts.checks import check_choice, check_count, check_factor
from vtprune.pruners.parts.patches import mean_keys, saliency


def count_now(alive: int, budget: int, layers: int) -> int:
    """How many of `alive` tokens merge in the first of `layers` layers, so that `budget` are left after the last:
    an even share, or more where the layers to come, which halve the tokens at most, could not catch up."""
    return max(0, -(-(alive - budget) // layers), alive - budget * 2 ** (layers - 1))


def least(alive: int, layers: int) -> int:
    """What is left of `alive` tokens where each of `layers` layers merges as many as it can."""
    return -(-alive // 2**layers)


def after(alive: int, most: int, layers: int) -> int:
    """What is left of `alive` tokens where each of `layers` layers merges `most`, or half of them."""
    for _ in range(layers):
        alive -= min(most, alive // 2)
    return alive


def bipartite(
    metric: Tensor, value: Tensor, valid: Tensor | None, count: Sequence[int], *, first: int, coefficient: float
) -> Tensor:
    """(B, N) int64 where each token flows to: `count` (B,) of each image into another one, all others into themselves.

    metric: (B, N, d) unit vectors; value: (B, N) semantic value; valid: (B, N) bool, padding on the right, None for
    none. Every second token from the column `first` on may flow into the one of the others whose cosine is highest;
    those do where that cosine minus `coefficient` times their own value is highest. Ties go to the lowest index.
    Raises ScoreError for NaN.
    """
    batch, tokens = value.shape
    a, b = slice(first, None, 2), slice(1 - first, None, 2)
    cosines = torch.matmul(metric[:, a], metric[:, b].transpose(1, 2))
    if valid is not None:
        value, cosines = check_scores(value, "turbo"), check_scores(cosines, "turbo")
        cosines = cosines.masked_fill(~valid[:, None, b], float("-inf"))
    best, partner = cosines.max(dim=-1)
    score = torch.sub(best, value[:, a], alpha=coefficient)
    # What is no number in the values, or in the vectors, is none in the score that is made of them.
    score = check_scores(score, "turbo") if valid is None else score.masked_fill(~valid[:, a], float("-inf"))
    order = torch.sort(score, dim=-1, descending=True, stable=True).indices[:, : max(count)]
    into = torch.arange(tokens, device=value.device)[None]
    into = into if batch == 1 else into.repeat(batch, 1)
    partner = 2 * partner.gather(1, order) + (1 - first)
    if min(count) != max(count):
        merges = torch.arange(max(count), device=value.device) < torch.tensor(count, device=value.device)[:, None]
        partner = torch.where(merges, partner, 2 * order + first)
    into[:, a].scatter_(1, order, partner)
    return into


def weighted_mean(keep: Tensor, into: Tensor, sizes: Tensor, valid: Tensor | None) -> EncoderSelection:
    """What is not kept flows `into` its partner in proportion to the tokens that each one stands for; all (B, N),
    `valid` None where there is no padding."""
    own = sizes if valid is None else sizes.where(valid, 0)
    sums = torch.zeros_like(sizes).scatter_add_(1, into, own).gather(1, into)
    if valid is None:
        return EncoderSelection(keep, into, sizes / sums, lossless=True)
    return EncoderSelection(valid & keep, into.masked_fill(~valid, -1), sizes / sums.clamp(min=1))


SCALE = 30


@register(
    "turbo",
    paper="Turbo: Informativity-Driven Acceleration Plug-In for Vision-Language Large Models",
    arxiv="2407.11717",
    licence="none (no licence file; parts from BLIP, BSD-3, and ToMe, CC BY-NC 4.0)",
    needs="q and k of every encoder layer; attention that takes a bias for each key (not FlashAttention)",
)
@dataclass(frozen=True)
class Turbo(InEncoder):
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

    before_mlp = True
    merges = True

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
        if self.r is not None and self.keep is not None:
            raise VTPruneError(
                f"turbo: r={self.r} decides how many tokens are left, so keep={self.keep} contradicts it"
            )

    def resolve(self) -> dict[str, Any]:
        """`layers` resolved; raises VTPruneError where the encoder has fewer, or cannot get to a share that low."""
        layers = self.model.encoder_depth if self.layers is None else self.layers
        if layers > self.model.encoder_depth:
            raise VTPruneError(
                f"turbo: layers={layers}, but only {self.model.encoder_depth} encoder layers feed the decoder"
            )
        keep = asked(self)
        if isinstance(keep, float) and keep * 2**layers < 1:
            raise VTPruneError(
                f"turbo: {layers} encoder layers that halve the tokens at most cannot get to keep="
                f"{keep:.3g}; the smallest that works is {0.5**layers:.3g}"
            )
        for index in range(layers):
            self._coefficient(index)
        return {"layers": layers}

    def budget(self, tokens: int) -> int:
        """`keep`, or what `r` leaves (known once the model is)."""
        if self.r is None:
            return super().budget(tokens)
        if self.layers is None:
            raise VTPruneError("turbo: what r leaves depends on the encoder's depth; wrap a model, or set layers")
        return after(tokens, self.r, self.layers)

    def encoder_budget(self, tokens: int) -> int:
        """`budget`; raises CannotCut where the layers, each of which halves the tokens at most, leave more."""
        budget = self.budget(tokens)
        if self.r is None and self.layers is not None and least(tokens, self.layers) > budget:
            raise CannotCut(
                f"turbo: {self.layers} encoder layers that halve the tokens at most cannot leave {budget} of "
                f"{tokens}; the smallest keep that works for this image is {least(tokens, self.layers)}"
            )
        return budget

    @property
    def weighs_keys(self) -> bool:
        """Whether it merges."""
        return self.merge

    def search_space(self, tokens: float) -> dict[str, Tunable]:
        """How much semantic value weighs, and how fast that fades with depth."""
        return {"alpha": Tunable(0.0, 10.0), "beta": Tunable(0.5, 1.0)}

    def encoder_layers(self) -> tuple[int, ...]:
        """All of them, or the first `layers`."""
        return tuple(range(self.model.encoder_depth if self.layers is None else self.layers))

    def prune_encoder(self, layer: EncoderLayer) -> EncoderSelection:
        """What merges in this layer; raises ScoreError for NaN, VTPruneError for a budget out of reach."""
        remaining = (self.layers or layer.depth) - layer.index
        counts = [self._count(*sizes, remaining) for sizes in zip(layer.alive, layer.budgets, strict=True)]
        left = tuple(alive - merging for alive, merging in zip(layer.alive, counts, strict=True))
        value, metric = saliency(layer, sized=self.merge), mean_keys(layer)
        coefficient = self._coefficient(layer.index)
        valid = None if layer.full else layer.valid
        # With CLS in the first place every second token is at an odd one.
        first = int(layer.prefix > 0)
        into = bipartite(metric, value, valid, counts, first=first, coefficient=coefficient)
        keep = into == torch.arange(into.shape[1], device=into.device)
        if not self.merge:
            return EncoderSelection.drop(layer.valid & keep, left)
        found = weighted_mean(keep, into, layer.sizes, valid)
        return replace(found, counts=left, flows=any(counts), sound=True)

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

    def _count(self, alive: int, budget: int, layers: int) -> int:
        if self.r is not None:
            return min(self.r, alive // 2, max(0, alive - budget))
        count = count_now(alive, budget, layers)
        if count > alive // 2:
            raise VTPruneError(
                f"turbo: {layers} encoder layers that halve the tokens at most cannot leave {budget} of {alive}; the "
                f"smallest keep that works for this image is {least(alive, layers)}"
            )
        return count

    def flops(self, work: Work) -> int:
        """In every layer the attention row (all rows without CLS) and the similarities between the two halves."""
        total = 0
        for layer in work.encoder_layers:
            patches = work.encoder_patches[layer]
            tokens = (patches - work.has_cls) * work.tokens // work.patches
            rows = 1 if work.has_cls else patches // work.units
            pairs = (tokens // 2) * (tokens - tokens // 2) // work.units
            total += 2 * rows * patches * work.encoder_width + 2 * pairs * work.encoder_width // work.encoder_heads
        return total
