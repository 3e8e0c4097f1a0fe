"""What trained routers multiply, redone from their weights: the gates of gamma-MoD and p-MoD."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

import vtprune
from tests.matrix import at_depth
from vtprune.method.pruner import Pruner


class Gates(Protocol):
    """The gates of a model's routed layers."""

    def of(self, index: int, layer: Any, states: Tensor, vision: Tensor) -> Tensor | None:
        """(B, n, 1) of the tokens that enter a layer, vision: (B, n) those of images; None for a layer without."""

    # What a gate multiplies: the MLP's output, all that the layer adds, and tokens that skip the layer.
    mlp: bool
    branch: bool
    skipped: bool


class GammaGates:
    """p of one router, read off the input norm; it multiplies the MLP's output of every token, text too."""

    mlp, branch, skipped = True, False, False

    def __init__(self, weight: Tensor, layers: tuple[int, ...]) -> None:
        self.weight, self.layers = weight.double(), layers

    def of(self, index: int, layer: Any, states: Tensor, vision: Tensor) -> Tensor | None:
        if index not in self.layers:
            return None
        return (layer.input_layernorm(states) @ self.weight.T).softmax(dim=-1)[..., 1:]


class PModGates:
    """1 + 0.2 tanh (or sigmoid) of each layer's own router, for vision tokens alone."""

    def __init__(self, routers: Mapping[str, tuple[Tensor, Tensor]], norm: str, *, paper: bool) -> None:
        self.routers, self.norm = routers, getattr(torch, norm)
        self.mlp, self.branch, self.skipped = not paper, paper, True

    def of(self, index: int, layer: Any, states: Tensor, vision: Tensor) -> Tensor | None:
        if str(index) not in self.routers:
            return None
        weight, bias = (part.double() for part in self.routers[str(index)])
        gates = 1 + 0.2 * self.norm(states @ weight.T + bias)
        return torch.where(vision[..., None], gates, 1.0)


def gates_of(model: Any, pruners: tuple[Pruner, ...], depth: int) -> Gates | None:
    """Those of a wrapped model's last method, None if it has no gates. Weights are copied, so it may be unwrapped."""
    pruner, place = pruners[-1], str(len(pruners) - 1)
    if isinstance(pruner, vtprune.GammaMoD):
        return GammaGates(
            model.vtprune_weights[place].weight.detach().clone(), at_depth(pruner, depth).routed_layers()
        )
    if isinstance(pruner, vtprune.PMoD):
        routers = {
            layer: (router.weight.detach().clone(), router.bias.detach().clone())
            for layer, router in model.vtprune_weights[place].items()
        }
        return PModGates(routers, pruner.norm, paper=pruner.variant == "paper")
    return None


def scatter(model: Any, scale: float, seed: int) -> None:
    """Gives the routers of a wrapped model random weights of this scale; 0 leaves them as they start."""
    weights = getattr(model, "vtprune_weights", None)
    if weights is None or not scale:
        return
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in weights.parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            weight.copy_(scale * weight.shape[-1] ** -0.5 * noise)
