"""The rotary embedding of keys and queries."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout; states (..., n, d), cos and sin (..., n, r) broadcast to the first r
    columns of them, and those after r stay as they are."""
    turning = cos.shape[-1]
    if turning < states.shape[-1]:
        return torch.cat([rotate(states[..., :turning], cos, sin), states[..., turning:]], dim=-1)
    half = turning // 2
    turned = torch.cat([-states[..., half:], states[..., :half]], dim=-1)
    return torch.addcmul(states * cos, turned, sin)
