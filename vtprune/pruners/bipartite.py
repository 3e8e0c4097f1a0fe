"""The parts of Turbo: how many tokens merge in a layer, which ones, and into which."""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune.pruners.flow import top_mask
from vtprune.selection import EncoderSelection


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
    metric: Tensor, value: Tensor, valid: Tensor, count: Tensor, *, first: int, coefficient: float
) -> tuple[Tensor, Tensor]:
    """Sources (B, N) bool, `count` (B,) of them in each image, and into (B, N) int64: where they flow to.

    metric: (B, N, d) unit vectors; value: (B, N) semantic value; valid: (B, N) bool, padding on the right. Every
    second token from the column `first` on may flow into the one of the others whose cosine is highest; those
    do where that cosine minus `coefficient` times their own value is highest. Ties go to the lowest index.
    """
    column = torch.arange(valid.shape[1], device=valid.device)
    a, b = column[first::2], column[1 - first :: 2]
    cosines = torch.matmul(metric[:, a], metric[:, b].transpose(1, 2))
    best, partner = cosines.masked_fill(~valid[:, None, b], float("-inf")).max(dim=-1)
    score = best - coefficient * value[:, a]
    sources = torch.zeros_like(valid)
    sources[:, a] = top_mask(score, count, valid[:, a])
    into = column.repeat(valid.shape[0], 1)
    into[:, a] = b[partner]
    return sources, torch.where(sources, into, column)


def weighted_mean(sources: Tensor, into: Tensor, sizes: Tensor, valid: Tensor) -> EncoderSelection:
    """Sources flow into their partners in proportion to the tokens that each one stands for; all (B, N)."""
    sums = torch.zeros_like(sizes).scatter_add_(1, into, sizes.where(valid, 0))
    return EncoderSelection(valid & ~sources, into.masked_fill(~valid, -1), sizes / sums.gather(1, into).clamp(min=1))
