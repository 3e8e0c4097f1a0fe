"""Layers of the weights that methods bring: computed in fp32 whatever they are held in, and always made the same.

They are called, never read: a module's weights may be on another device, or nowhere, until its forward runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear

# What untrained weights are drawn from.
SEED = 0


@contextmanager
def own_randomness() -> Iterator[None]:
    """Makes modules on the CPU from random numbers of their own; torch's random state stays as it is on any device."""
    # torch.manual_seed would seed every device, too.
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(SEED)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_rng_state(state)


class FullLinear(nn.Linear):
    """A linear layer that computes in fp32, where its input is."""

    def forward(self, states: Tensor) -> Tensor:
        """(..., out) fp32 of (..., in)."""
        return linear(states.float(), self.weight.to(states.device).float(), _beside(self.bias, states))


class FullLayerNorm(nn.LayerNorm):
    """A LayerNorm that computes in fp32, where its input is."""

    def forward(self, states: Tensor) -> Tensor:
        """(..., D) fp32 of (..., D)."""
        weight, bias = (_beside(part, states) for part in (self.weight, self.bias))
        return layer_norm(states.float(), self.normalized_shape, weight=weight, bias=bias, eps=self.eps)


def _beside(weight: Tensor | None, states: Tensor) -> Tensor | None:
    return None if weight is None else weight.to(states.device).float()
