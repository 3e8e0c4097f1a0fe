"""The rotary embedding of keys and queries."""

from __future__ import annotations

import torch
from torch import Tensor


def turned(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same as `rotate` in the operations, and with the rounding, of transformers' models."""
    turning = cos.shape[-1]
    if turning < states.shape[-1]:
        return torch.cat([turned(states[..., :turning], cos, sin), states[..., turning:]], dim=-1)
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout; states (..., n, d), cos and sin (..., n, r) broadcast to the first r
    columns of them, and those after r stay as they are."""
    turning = cos.shape[-1]
    if turning < states.shape[-1]:
        return torch.cat([rotate(states[..., :turning], cos, sin), states[..., turning:]], dim=-1)
    half, turned = turning // 2, states * cos
    # Half by half, so that no half is copied to its other place first.
    turned[..., :half].addcmul_(states[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(states[..., :half], sin[..., half:])
    return turned
