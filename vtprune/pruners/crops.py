"""The parts of crop-wise selection: the score inside a crop, quotas, and where the crops lie."""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune.pruners.cells import Grid3

EPS = 1e-6


def diversity(features: Tensor) -> Tensor:
    """Variance of each token's cosine similarities to the other tokens of its crop: (m, D) to (m,) fp32.

    As in the released code, the token itself counts as a similarity of 0 and the divisor is m - 1.
    """
    others = features.shape[0] - 1
    if others < 1:
        return torch.zeros(features.shape[0], device=features.device)
    features = features.float()
    unit = features / (features.norm(dim=-1, keepdim=True) + EPS)
    similarity = (unit @ unit.T).fill_diagonal_(0)
    mean = similarity.sum(dim=-1, keepdim=True) / others
    return (similarity - mean).square().sum(dim=-1) / others


def holistic_score(features: Tensor, attention: Tensor, alpha: float) -> Tensor:
    """A + alpha * gamma * V of one crop's tokens, V their diversity, gamma = mean|A| / mean|V|: (m,) fp32."""
    variance = diversity(features)
    gamma = attention.abs().mean() / (variance.abs().mean() + EPS)
    return attention + alpha * gamma * variance


def capped_quotas(weights: list[float], sizes: list[int], budget: int) -> list[int]:
    """Tokens of each crop: in proportion to the weights, never more than the crop holds, `budget` in all.

    Shares are rounded down and the remainder goes to the heaviest crops, one each. What exceeds a crop is
    handed on in proportion to weight times room, again and again; what rounding leaves of that goes to the
    heaviest crop with room. Crops of weight 0 get only what no other can hold.
    """
    budget = min(budget, sum(sizes))
    heaviest = sorted(range(len(sizes)), key=weights.__getitem__, reverse=True)
    total = sum(weights) or 1.0
    quotas = [int(budget * weight / total) for weight in weights]
    for crop in heaviest[: budget - sum(quotas)]:
        quotas[crop] += 1
    quotas = [min(quota, size) for quota, size in zip(quotas, sizes, strict=True)]
    while left := budget - sum(quotas):
        room = [size - quota for quota, size in zip(quotas, sizes, strict=True)]
        shares = [weight * free for weight, free in zip(weights, room, strict=True)]
        shares = shares if sum(shares) > 0 else [float(free) for free in room]
        added = [min(free, int(left * share / sum(shares))) for free, share in zip(room, shares, strict=True)]
        if not any(added):
            first = next(crop for crop in heaviest if room[crop])
            added[first] = min(left, room[first])
        quotas = [quota + more for quota, more in zip(quotas, added, strict=True)]
    return quotas


def crops_of(grid: Grid3, side: int) -> Tensor:
    """The crop of each place of a (t, h, w) grid: (t * h * w,) int64; side x side crops a frame, fewer where
    the frame is smaller; the first ones are larger where the sizes do not divide."""
    frames, height, width = grid

    def part(length: int) -> Tensor:
        sizes = [chunk.numel() for chunk in torch.arange(length).tensor_split(min(side, length))]
        return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))

    frame = torch.arange(frames)[:, None, None] * side
    return ((frame + part(height)[:, None]) * side + part(width)).flatten()
