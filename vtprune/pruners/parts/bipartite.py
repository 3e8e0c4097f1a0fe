"""Merging in every encoder layer: every second token may flow into the one of the others that is most like it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vtprune.errors import CannotCut, VTPruneError
from vtprune.method.answers import EncoderSelection, Means
from vtprune.method.checks import check_scores
from vtprune.method.facts import Work
from vtprune.method.pruner import asked
from vtprune.method.stages import InEncoder
from vtprune.method.views import EncoderLayer
from vtprune.pruners.parts.patches import mean_keys


def count_now(alive: int, budget: int, layers: int) -> int:
    """How many of `alive` tokens merge in the first of `layers` layers, so that `budget` are left after the last:
    an even share, or more where the layers to come, which halve the tokens at most, could not catch up."""
    return max(0, -(-(alive - budget) // layers), alive - budget * 2 ** (layers - 1))


def least(alive: int, layers: int) -> int:
    """What is left of `alive` tokens where each of `layers` layers merges as many as it can."""
    return -(-alive // 2**layers)


def after(alive: int, rates: Sequence[int]) -> int:
    """What is left of `alive` tokens where each layer merges as many as its rate says, or half of them."""
    for rate in rates:
        alive -= min(rate, alive // 2)
    return alive


@dataclass(frozen=True)
class Matches:
    """Which of every second token flows into which of the others, of a batch of (B, N) tokens.

    order: (B, n) the places of those that may flow among their own kind, the first `count` (B,) of each image do;
    partner: (B, M) the place, among the others, of the one that each of them is most like; first: the column that the
    first of them stands in.
    """

    order: Tensor
    partner: Tensor
    count: Sequence[int]
    first: int

    @property
    def halves(self) -> tuple[slice, slice]:
        """The columns of those that may flow, and those of the others."""
        return slice(self.first, None, 2), slice(1 - self.first, None, 2)

    def into(self, tokens: int) -> Tensor:
        """(B, N) int64 where each of so many tokens flows to, those that stay into themselves."""
        order, count = self.order, self.count
        batch, device = order.shape[0], order.device
        into = torch.arange(tokens, device=device)[None]
        into = into if batch == 1 else into.repeat(batch, 1)
        partner = 2 * self.partner.gather(1, order) + (1 - self.first)
        if min(count) != max(count):
            merges = torch.arange(max(count), device=device) < torch.tensor(count, device=device)[:, None]
            partner = torch.where(merges, partner, 2 * order + self.first)
        into[:, self.halves[0]].scatter_(1, order, partner)
        return into

    def land(self, marks: Tensor) -> Tensor:
        """(B, 1 + N) behind a leading 0 which of the tokens that stay, counted from 1, each token flows into, where
        all images merge as many; takes those that do not stay out of `marks` (B, 1 + N), all True behind a False."""
        flowing, others = self.halves
        stays = marks[:, 1:][:, flowing]
        stays.scatter_(1, self.order, False)
        landing = marks.cumsum(dim=1)
        places = landing[:, 1:]
        own, there = places[:, flowing], places[:, others].gather(1, self.partner)
        torch.where(stays, own, there, out=own)
        return landing


def matched(
    metric: Tensor,
    valid: Tensor | None,
    count: Sequence[int],
    *,
    first: int,
    method: str,
    value: Tensor | None = None,
    coefficient: float = 0.0,
) -> Matches:
    """What flows into what, `count` (B,) tokens of each image.

    metric: (B, N, d) unit vectors; valid: (B, N) bool, padding on the right, None for none. Every second token from
    the column `first` on may flow into the one of the others whose cosine is highest; those do where that cosine,
    less `coefficient` times their own `value` (B, N) if there is one, is highest. Ties go to the lowest index. Raises
    ScoreError, in the name of `method`, for NaN.
    """
    a, b = slice(first, None, 2), slice(1 - first, None, 2)
    cosines = torch.matmul(metric[:, a], metric[:, b].transpose(1, 2))
    if valid is not None:
        value, cosines = None if value is None else check_scores(value, method), check_scores(cosines, method)
        cosines = cosines.masked_fill(~valid[:, None, b], float("-inf"))
    best, partner = cosines.max(dim=-1)
    score = best if value is None else torch.sub(best, value[:, a], alpha=coefficient)
    # What is no number in the values, or in the vectors, is none in the score that is made of them.
    if valid is None:
        score = check_scores(score, method, still=True)
    else:
        score = score.masked_fill(~valid[:, a], float("-inf"))
    order = torch.sort(score, dim=-1, descending=True, stable=True).indices[:, : max(count)]
    return Matches(order, partner, count, first)


def bipartite(metric: Tensor, valid: Tensor | None, count: Sequence[int], *, first: int, method: str) -> Tensor:
    """(B, N) int64 where each token flows to, by nothing but cosines (`matched`)."""
    return matched(metric, valid, count, first=first, method=method).into(metric.shape[1])


def weighted_mean(keep: Tensor, into: Tensor, sizes: Tensor, valid: Tensor | None) -> EncoderSelection:
    """What is not kept flows `into` its partner in proportion to the tokens that each one stands for; all (B, N),
    `valid` None where there is no padding."""
    own = sizes if valid is None else sizes.where(valid, 0)
    sums = torch.zeros_like(sizes).scatter_add_(1, into, own).gather(1, into)
    if valid is None:
        return EncoderSelection(keep, into, sizes / sums, lossless=True)
    return EncoderSelection(valid & keep, into.masked_fill(~valid, -1), sizes / sums.clamp(min=1))


class Bipartite(InEncoder):
    """A method that merges like this between attention and MLP of each encoder layer, or of the first `layers`.

    It meets `keep` exactly, N - keep spread evenly over the layers, or merges as many in each layer as its rates say.
    """

    before_mlp = True
    merges = True

    @property
    @abstractmethod
    def layers(self) -> int | None:
        """How many of the layers that feed the decoder merge, the first ones; None is all."""

    @abstractmethod
    def rates(self, layers: int) -> tuple[int, ...] | None:
        """How many tokens merge in each of so many layers at most; None where `keep` decides."""

    def check_rates(self, r: object) -> None:
        """Raises VTPruneError for a `keep` beside rates that `r` gives."""
        if r is not None and self.keep is not None:
            raise VTPruneError(
                f"{self.name}: r={r} decides how many tokens are left, so keep={self.keep} contradicts it"
            )

    def resolve(self) -> dict[str, Any]:
        """`layers` resolved; raises VTPruneError where the encoder has fewer, or cannot get to a share that low."""
        layers = self.model.encoder_depth if self.layers is None else self.layers
        if layers > self.model.encoder_depth:
            raise VTPruneError(
                f"{self.name}: layers={layers}, but only {self.model.encoder_depth} encoder layers feed the decoder"
            )
        keep = asked(self)
        if isinstance(keep, float) and keep * 2**layers < 1:
            raise VTPruneError(
                f"{self.name}: {layers} encoder layers that halve the tokens at most cannot get to keep="
                f"{keep:.3g}; the smallest that works is {0.5**layers:.3g}"
            )
        self.rates(layers)
        return {"layers": layers}

    def budget(self, tokens: int) -> int:
        """`keep`, or what the rates leave (known once the model is)."""
        if self.rates(self.layers or 1) is None:
            return super().budget(tokens)
        if self.layers is None:
            raise VTPruneError(
                f"{self.name}: what r leaves depends on the encoder's depth; wrap a model, or set layers"
            )
        return after(tokens, self.rates(self.layers) or ())

    def encoder_budget(self, tokens: int) -> int:
        """`budget`; raises CannotCut where the layers, each of which halves the tokens at most, leave more."""
        budget = self.budget(tokens)
        if self.layers is None or self.rates(self.layers) is not None:
            return budget
        if least(tokens, self.layers) > budget:
            raise CannotCut(
                f"{self.name}: {self.layers} encoder layers that halve the tokens at most cannot leave {budget} of "
                f"{tokens}; the smallest keep that works for this image is {least(tokens, self.layers)}"
            )
        return budget

    def encoder_layers(self) -> tuple[int, ...]:
        """All of them, or the first `layers`."""
        return tuple(range(self.model.encoder_depth if self.layers is None else self.layers))

    def matched(
        self, layer: EncoderLayer, value: Tensor | None = None, coefficient: float = 0.0
    ) -> tuple[Matches, tuple[int, ...]]:
        """What flows into what in this layer, and how many tokens of each image are left; raises ScoreError for NaN,
        VTPruneError for a budget out of reach."""
        counts = [self._count(layer, *sizes) for sizes in zip(layer.alive, layer.budgets, strict=True)]
        left = tuple(alive - merging for alive, merging in zip(layer.alive, counts, strict=True))
        # With CLS in the first place every second token is at an odd one.
        first = int(layer.prefix > 0)
        valid = None if layer.full else layer.valid
        metric = mean_keys(layer)
        found = matched(metric, valid, counts, first=first, method=self.name, value=value, coefficient=coefficient)
        return found, left

    def _count(self, layer: EncoderLayer, alive: int, budget: int) -> int:
        layers = self.layers or layer.depth
        rates, remaining = self.rates(layers), layers - layer.index
        if rates is not None:
            # Of each crop or frame by itself, so that no budget is in its way.
            return min(rates[layer.index], alive // 2)
        count = count_now(alive, budget, remaining)
        if count > alive // 2:
            raise VTPruneError(
                f"{self.name}: {remaining} encoder layers that halve the tokens at most cannot leave {budget} of "
                f"{alive}; the smallest keep that works for this image is {least(alive, remaining)}"
            )
        return count

    def flops(self, work: Work) -> int:
        """In every layer the similarities between the two halves."""
        total = 0
        for layer in work.encoder_layers:
            tokens = (work.encoder_patches[layer] - work.units * work.has_cls) // self.model.group
            pairs = (tokens // 2) * (tokens - tokens // 2) // work.units
            total += 2 * pairs * work.encoder_width // work.encoder_heads
        return total


def flowing(layer: EncoderLayer, matches: Matches, left: tuple[int, ...]) -> EncoderSelection:
    """Each token that is left as the mean of what flows into it, weighted by the tokens that each stands for; left:
    (B,) how many these are."""
    flows = left != layer.alive
    if layer.full and min(left) == max(left):
        marks = layer.marks()
        landing = matches.land(marks)
        return Means(
            marks[:, 1:], counts=left, flows=flows, sound=True, lossless=True, landing=landing, sizes=layer.sizes
        )
    into = matches.into(layer.valid.shape[1])
    keep = into == torch.arange(into.shape[1], device=into.device)
    found = weighted_mean(keep, into, layer.sizes, None if layer.full else layer.valid)
    return replace(found, counts=left, flows=flows, sound=True)
