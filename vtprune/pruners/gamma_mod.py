"""gamma-MoD: one router for many decoder layers, which skips tokens and weighs the MLP's output of the others."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vtprune.errors import VTPruneError
from vtprune.method.answers import Routes
from vtprune.method.checks import check_scores
from vtprune.method.choosing import best_of_each
from vtprune.method.modules import FullLinear, own_randomness
from vtprune.method.pruner import Counted
from vtprune.method.registry import register
from vtprune.method.stages import InLayers, Trained
from vtprune.method.views import RoutedTokens
from vtprune.pruners.parts.checks import check_factor, check_share
from vtprune.pruners.parts.skipping import check_even, even_budget, even_mean
from vtprune.pruners.parts.staged import scaled_layers

# The first layer that the authors route, of 32; the last one is not.
FIRST = 3
# What the released code computes of a prompt, and of a token that follows it.
PROMPT_THRESHOLD, STEP_THRESHOLD = 0.005, 0.5


@register(
    "gamma_mod",
    paper="gamma-MoD: Exploring Mixture-of-Depth Adaptation for Multimodal Large Language Models",
    arxiv="2410.13859",
    licence="none found in its repository",
    needs="one router for all routed decoder layers, trained with the model",
    variants=("paper", "released"),
)
@dataclass(frozen=True)
class GammaMoD(InLayers, Trained):
    """gamma-MoD: Mixture-of-Depth adaptation by the rank of attention maps (arXiv 2410.13859).

    One linear router reads the input norm of each routed layer: p = softmax(logits)[1]. A token that is computed gets
    its MLP output multiplied by p, text and every decode step too; one that skips the layer stays as it is. Training
    adds `loss_weight` times the cross-entropy of the router against what it chose, a layer. Routed are all layers but
    0, 1, 2 and the last of 32 (at other depths as fractions, the first and the last never), or `layers`: those with
    the lowest rank of attention, which `vtprune arank` finds. An untrained router is drawn as PyTorch draws a linear
    layer, from a seed of its own, so it is always the same and torch's random state is left alone.

    Own decisions, since the released rules hold for training only or leave the count open: in each routed layer an
    image's tokens with the highest p are computed, in training as in use, and text always is, at its own position.
    `skip` is the share that skips a layer (None: the published half); `keep` sets it so that the mean over decoder
    layers is met. The loss is over vision tokens. keep=1.0 still multiplies by p.

    variant="released" is the authors' code. Training: of the c tokens up to the end of a row's last image, the system
    prompt among them, ceil(n - skip * c) - (n - c) with the highest p, and all after them; the loss is over all
    tokens. Otherwise: every token of the prompt with p above `threshold` (None: 0.005), text too, so text may be
    skipped, and a later token where p is at least 0.5; what is kept has no set count. With a `keep` the prompt is
    routed as in the default. Positions are renumbered in each layer (the reference; not on M-RoPE models). Departures:
    rows are routed apart, padding counts for nothing, the number of tokens before the question is each row's own, and
    a prompt of which a layer computes nothing passes it by. Reference: Yaxin9Luo/Gamma-MOD.
    """

    layers: tuple[int, ...] | None = None
    variant: str = "paper"
    skip: float | None = None
    threshold: float | None = None
    loss_weight: float = 0.01

    untrained: ClassVar[str] = (
        "its router is random and weighs all that the routed layers add, so answers are of no use"
    )

    counted = Counted.MEAN_OF_LAYERS
    routes_text = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.name, "skip", self.skip, self.keep)
        check_share(self.name, "threshold", self.threshold, self.keep)
        check_factor(self.name, "loss_weight", self.loss_weight)
        if self.threshold is not None and self.variant != "released":
            raise VTPruneError(f"{self.name}: threshold belongs to variant='released'; the default keeps a set count")
        if self.layers is not None:
            rising = isinstance(self.layers, tuple) and all(type(layer) is int for layer in self.layers)
            if not rising or not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 1:
                raise VTPruneError(
                    f"{self.name}: layers are rising ints of at least 1 in a tuple (layer 0 computes everything), got "
                    f"{self.layers!r}"
                )

    @property
    def released(self) -> bool:
        """Whether the authors' code is followed."""
        return self.variant == "released"

    @property
    def renumbers(self) -> bool:
        """The released code numbers the tokens of each layer anew."""
        return self.released

    @property
    def thresholds_decide(self) -> bool:
        """Whether a threshold decides how many stay."""
        return self.released and self.keep is None

    @property
    def skips_text(self) -> bool:
        """The released code routes text as it routes the image."""
        return self.released

    @property
    def skipped_share(self) -> float:
        """The share that skips a routed layer where no `keep` is given."""
        return 0.5 if self.skip is None else self.skip

    @property
    def default_keep(self) -> float | None:
        """The mean over layers of which the routed ones skip a share; None where a threshold decides."""
        return None if self.thresholds_decide else even_mean(self, self.skipped_share)

    def resolve(self) -> dict[str, Any]:
        """Nothing; raises VTPruneError for layers that the decoder does not have, and for a share that skipping in
        the routed layers cannot meet."""
        check_even(self)
        return {}

    def routed_layers(self) -> tuple[int, ...]:
        """`layers`, or all but the first ones and the last."""
        if self.layers is not None:
            return self.layers
        depth = self.model.decoder_depth
        first = scaled_layers((FIRST,), depth)
        return tuple(range(first[0], depth - 1)) if first else ()

    def routed_budget(self, tokens: int, layer: int, entered: int) -> int:
        """The same in every routed layer; raises CannotCut where the layers that compute everything, and one token in
        each other, exceed the budget."""
        return even_budget(self, self.skipped_share, tokens=tokens, entered=entered)

    def make_module(self) -> nn.Module:
        """One linear layer for all routed layers, as PyTorch initialises it, from a seed of its own."""
        with own_randomness():
            return FullLinear(self.model.decoder_width, 2, bias=False)

    def logits(self, tokens: RoutedTokens) -> Tensor:
        """(B, n, 2) of skipping a layer and of computing it, in fp32."""
        found: Tensor = tokens.module(tokens.norm(tokens.hidden))
        return found.to(tokens.hidden.device)

    def route(self, tokens: RoutedTokens) -> Routes:
        """The tokens with the highest p, or those above a threshold, each with its gate; raises ScoreError for NaN
        where there is something to choose."""
        logits = self.logits(tokens)
        gate = logits.softmax(dim=-1)[..., 1]
        if tokens.complete and not self.released:
            loss = self._loss(logits, torch.ones_like(tokens.real), tokens) if tokens.training else None
            return Routes(gate=gate, loss=loss)
        scores = gate.detach() if tokens.whole else gate.detach().masked_fill(~tokens.real, 0.0)
        scores = check_scores(scores, self.name, still=True)
        decided = self._decided(scores, tokens)
        routes = tokens.best(scores) if decided is None else Routes(decided | ~tokens.real)
        loss = None
        if tokens.training:
            loss = self._loss(logits, routes.computed(scores).mask, tokens)
        return replace(routes, gate=gate, loss=loss)

    def _decided(self, scores: Tensor, tokens: RoutedTokens) -> Tensor | None:
        """(B, n) which tokens the layer computes, where scores decide how many; None for a budget's best."""
        if self.released and tokens.training:
            return released_training(self, scores, tokens)
        if self.released and tokens.continues:
            return scores >= STEP_THRESHOLD
        if self.thresholds_decide:
            return scores > (PROMPT_THRESHOLD if self.threshold is None else self.threshold)
        return None

    def _loss(self, logits: Tensor, kept: Tensor, tokens: RoutedTokens) -> Tensor | None:
        """The mean over the tokens that could be routed, weighed; None where there are none."""
        routable = tokens.real if self.released else tokens.vision
        if not bool(routable.any()):
            return None
        return self.loss_weight * cross_entropy(logits[routable], kept[routable].long())

    def row_flops(self, tokens: int) -> int:
        """Two products with the router a token and routed layer."""
        return len(self.routed_layers()) * 4 * tokens * self.model.decoder_width


def released_training(pruner: GammaMoD, scores: Tensor, tokens: RoutedTokens) -> Tensor:
    """(B, n) what the authors compute in training, by scores (B, n): everything after a row's last image, and of the
    tokens up to its end those with the highest scores, so that `skip` of them skip the layer (or as many as `keep`
    says)."""
    column = torch.arange(scores.shape[1], device=scores.device)
    end = torch.where(tokens.vision, column, -1).max(dim=1, keepdim=True).values
    front = tokens.real & (column <= end)
    whole, lengths = tokens.real.sum(dim=1).tolist(), front.sum(dim=1).tolist()
    # Tokens of each image that are to skip the layer, where a count is set.
    counts = (tokens.image[..., None] == torch.arange(tokens.budgets.shape[1], device=scores.device)).sum(dim=1)
    fewer = (counts - tokens.budgets).clamp(min=0).sum(dim=1).tolist()
    budgets = []
    for n, c, less in zip(whole, lengths, fewer, strict=True):
        if pruner.keep is not None:
            budgets.append(c - less)
        else:
            # With nothing after the image nothing is skipped. The rounding is that of the reference's formula: where
            # skip * c is whole, it may leave one token more.
            budgets.append(math.ceil(n * (1 - pruner.skipped_share * c / n)) - (n - c) if n > c else c)
    best = best_of_each(scores, front.long() - 1, torch.tensor(budgets, device=scores.device)[:, None])
    return best | ~front
