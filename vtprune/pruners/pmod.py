"""p-MoD: decoder layers compute fewer and fewer vision tokens, chosen by a router of their own each."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from vtprune.errors import VTPruneError
from vtprune.method import schedules
from vtprune.method.answers import Routes
from vtprune.method.checks import check_scores
from vtprune.method.facts import Work
from vtprune.method.modules import FullLinear, own_randomness
from vtprune.method.pruner import Tunable
from vtprune.method.registry import register
from vtprune.method.stages import InLayers, Trained
from vtprune.method.views import RoutedTokens
from vtprune.pruners.parts.checks import check_choice
from vtprune.pruners.parts.staged import Scheduled

NORMS = ("tanh", "sigmoid", "softmax", "none")
DECAYS = {"cosine": schedules.cosine_ratios, "linear": schedules.line_ratios}


@register(
    "pmod",
    paper="p-MoD: Building Mixture-of-Depths MLLMs via Progressive Ratio Decay",
    arxiv="2412.04449",
    licence="Apache-2.0",
    needs="a router for each routed decoder layer, trained with the model",
    variants=("released", "paper"),
)
@dataclass(frozen=True)
class PMoD(Scheduled, InLayers, Trained):
    """p-MoD: Mixture-of-Depths by Progressive Ratio Decay (ICCV 2025, arXiv 2412.04449).

    Layer l of L processes the share 0.5 cos(pi l / (L - 1)) + `beta` of an image's tokens, at least 0.15; where it is
    above 0.85 all of them, and the layer has no router. At 32 layers the mean is 0.5375. In the others a linear router
    on the layer's input gives each vision token a gate g = `bias` + `scale` * norm(logit); those with the highest are
    computed, at their own positions among all the text. The MLP's output of a computed token is multiplied by g, and
    so is the whole hidden state of one that skips the layer. The router starts at zero: all gates are 1, and the first
    tokens are computed. There is no further loss. Text is computed everywhere, without a gate. (The last router
    learns nothing where labels are on answers alone, since nothing reads what that layer makes of vision tokens: it
    goes on computing the first ones.)

    `keep` counts the mean over decoder layers, and moves the cosine (`schedule`) so that it is met; 1.0 sends every
    token through the gates of the layers that the published schedule routes. Ratios are met image by image, rounded
    down (the reference: over all images of a row). Which layers have a router follows from the fraction, not from the
    count that it makes of one image, so that an image's mean may lie above that count, but never above its share.

    `reads_skipped`, which is no part of the paper, has the tokens of a layer attend to those that skip it all the
    same, by keys and values of their states; its weights are to be trained with it.

    The reference's alternatives: `decay="linear"`, a straight line 0.5 - l / (L - 1) + `beta` under the same limits;
    other `norm`s, with `scale=1`.

    Defaults are those of the released code, since the paper's own text was not at hand. variant="paper" is the formula
    as it is usually quoted, x + g T(x): all that the layer adds is multiplied by g, attention too.
    Reference: MCG-NJU/p-MoD.
    """

    schedule: str = "shifted_cosine"
    beta: float | None = None
    decay: str = "cosine"
    norm: str = "tanh"
    scale: float = 0.2
    bias: float = 1.0
    variant: str = "released"
    reads_skipped: bool = False

    untrained: ClassVar[str] = "its routers are at zero, so each layer computes an image's first tokens"
    schedule_names: ClassVar[tuple[str, ...]] = ("shifted_cosine", "linear", "constant")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.name, "norm", self.norm, NORMS)
        check_choice(self.name, "decay", self.decay, tuple(DECAYS))
        check_choice(self.name, "reads_skipped", self.reads_skipped, (False, True))
        for option in ("scale", "bias", "beta"):
            value = getattr(self, option)
            number = isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value)
            if not number and not (option == "beta" and value is None):
                raise VTPruneError(f"{self.name}: {option} is a finite number, got {value!r}")
        if self.beta is not None and (isinstance(self.keep, int) or self.keep not in (None, 1.0)):
            raise VTPruneError(f"{self.name}: beta shifts the published decay, and keep fits one; give one of them")

    def places(self, share: float | None = None) -> tuple[int, ...]:
        """The first layer that may be routed: layer 1, or the one given."""
        return (1,) if self.layers is None else self.layers

    def own_ratios(self, layers: tuple[int, ...]) -> schedules.Ratios:
        """The published decay."""
        ratios = DECAYS[self.decay](self.model.decoder_depth, 0.5 if self.beta is None else self.beta)
        return (1.0,) * layers[0] + ratios[layers[0] :]

    def routed_layers(self) -> tuple[int, ...]:
        """The layers with a router."""
        if isinstance(self.keep, int):
            return tuple(range(self.places()[0], self.model.decoder_depth))
        ratios = self.ratios(None if self.keep == 1 else self.keep)
        return tuple(layer for layer, ratio in enumerate(ratios) if ratio < 1)

    def routed_budget(self, tokens: int, layer: int, entered: int) -> int:
        """What the schedule says."""
        return self.counts(tokens, entered)[layer]

    def make_module(self) -> nn.Module:
        """A linear router a layer, at zero; torch's random state is left alone."""
        layers = self.routed_layers()
        with own_randomness():
            routers = {str(layer): FullLinear(self.model.decoder_width, 1) for layer in layers}
        for router in routers.values():
            nn.init.zeros_(router.weight)
            nn.init.zeros_(router.bias)
        return nn.ModuleDict(routers)

    def gates(self, logits: Tensor, text: Tensor) -> Tensor:
        """(B, n) gates of the logits (B, n), in fp32; softmax is over a row's tokens that are no text (B, n)."""
        if self.norm == "softmax":
            values = logits.masked_fill(text, float("-inf")).softmax(dim=1).nan_to_num(0.0)
        else:
            values = logits if self.norm == "none" else getattr(torch, self.norm)(logits)
        return self.bias + self.scale * values

    def route(self, tokens: RoutedTokens) -> Routes:
        """The tokens of each image with the highest gates, and all text; raises ScoreError for NaN."""
        text = tokens.text
        logits = tokens.module[str(tokens.index)](tokens.hidden)[..., 0].to(text.device)
        # The order of the gates, without the ties that saturated ones make.
        own = logits.detach() if self.scale >= 0 else -logits.detach()
        routes = replace(tokens.best(check_scores(own, self.name, still=True)), read=self.reads_skipped)
        gates = self.gates(logits, text).masked_fill(text, 1.0)
        if self.variant == "paper":
            return replace(routes, scale=gates, branch=gates)
        return replace(routes, gate=gates, scale=gates)

    def search_space(self, tokens: float) -> dict[str, Tunable]:
        """Nothing: other settings need other weights."""
        return {}

    def flops(self, work: Work) -> int:
        """One product with the router a token of the row and routed layer, shared among the row's images."""
        return len(self.routed_layers()) * 2 * work.prompt * work.decoder_width // work.images
