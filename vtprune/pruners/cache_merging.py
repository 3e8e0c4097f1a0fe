"""Budgets of cache layers by how dense their attention is, and what evicted entries leave behind in similar ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vtprune.pruners.cosines import unit_vectors
from vtprune.selection import check_scores
from vtprune.signals import at_least_single

# What floats may fall short of a whole number.
ROUNDING = 1e-6


def spread_of_columns(sums: Tensor) -> float:
    """The variance of the attention that tokens get, as a share of the largest that there could be, which is N where
    all N tokens attend to one alone; the mean over key-value heads of that of their mean map.

    sums: (Hkv, G, N) column sums of the attention maps of the G query heads that share each of them; each sums to N.
    """
    heads = sums.mean(dim=1)
    tokens = heads.shape[1]
    return float(heads.var(dim=1).mean()) / tokens if tokens > 1 else 0.0


def skew_of_heads(sums: Tensor) -> float:
    """The released code's number: the variances of (Hkv, G, N) column sums by query head, scaled to 0 .. 1 among the
    heads of the layer, and their mean."""
    if sums.shape[2] < 2:
        return 0.0
    variance = sums.var(dim=2)
    low, high = variance.min(), variance.max()
    return float(((variance - low) / (high - low + 1e-6)).mean())


def flatness(densities: Sequence[float]) -> list[float]:
    """softmax(-f): the flatter a layer's attention, the more it may keep."""
    powers = [math.exp(min(densities) - density) for density in densities]
    return [power / sum(powers) for power in powers]


def shares_out(weights: Sequence[float], most: Sequence[int], total: int) -> list[int]:
    """Whole numbers in proportion to the weights, from 1 to `most` each, whose sum is `total` (or that of `most`).

    What a limit takes from one or gives to it comes from the others, in proportion; what rounding down leaves goes to
    the largest remainders, ties to the first. total: at least the count of the weights.
    """
    if total >= sum(most):
        return list(most)

    def limited(scale: float) -> list[float]:
        return [min(float(cap), max(1.0, scale * weight)) for weight, cap in zip(weights, most, strict=True)]

    low, high = 0.0, max(most) / min(weights)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(limited(middle)) <= total else (low, middle)
    ideal = limited(low)
    found = [math.floor(value + ROUNDING) for value in ideal]
    order = sorted(range(len(found)), key=lambda place: (round(found[place] - ideal[place], 6), place))
    while sum(found) < total:
        for place in order:
            if sum(found) < total and found[place] < most[place]:
                found[place] += 1
    return found


def best_of(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The columns of the highest `count` of `scores` (H, n) in each head, and those of the others, both ascending;
    ties go to the lowest column."""
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices
    return order[:, :count].sort(dim=1).values, order[:, count:].sort(dim=1).values


def merge_evicted(
    key: Tensor,
    value: Tensor,
    kept: Tensor,
    evicted: Tensor,
    threshold: float | None,
    *,
    by_order: bool = False,
    method: str = "",
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Keys and values (H, n, d) in which evicted entries flow into the kept ones that they are most alike.

    kept: (H, m) and evicted: (H, e) columns. m_e is the cosine of an evicted key to the nearest kept key of its head
    (ties: the first). Those with an m_e of at least tau add m_e * k_e and m_e * v_e to a mean with the kept entry's
    own; the others are lost. tau is the mean of all m_e, averaged with the `threshold` before it if there is one.
    by_order: the mean over heads of the j-th evicted entries' m_e decides for all of them.
    Returns keys, values, how many entries flowed into each column (H, n), and tau.
    """
    wide = (-1, -1, key.shape[-1])
    unit = unit_vectors(key, method)
    cosines = unit.gather(1, evicted[..., None].expand(wide)) @ unit.gather(1, kept[..., None].expand(wide)).mT
    nearest = cosines.argmax(dim=2)
    alike = check_scores(cosines.gather(2, nearest[..., None])[..., 0], method)
    average = float(alike.detach().mean())
    tau = average if threshold is None else (threshold + average) / 2
    decisive = alike.mean(dim=0, keepdim=True).expand_as(alike) if by_order else alike
    passed = decisive >= tau
    # (H, m, e): a product rather than an indexed sum, whose order of additions would not be fixed on a GPU.
    weights = torch.zeros_like(cosines.mT).scatter(1, nearest[:, None], (alike * passed)[:, None])
    arrived = torch.zeros_like(weights).scatter(1, nearest[:, None], passed[:, None].to(weights)).sum(dim=2)
    merged = arrived.new_zeros(key.shape[:2]).scatter(1, kept, arrived)
    states = []
    for state in (at_least_single(key), at_least_single(value)):
        own = state.gather(1, kept[..., None].expand(wide))
        flow = weights.to(state) @ state.gather(1, evicted[..., None].expand(wide))
        mean = torch.where(arrived[..., None] > 0, (own + flow) / (1 + arrived[..., None]), own)
        states.append(state.scatter(1, kept[..., None].expand(wide), mean))
    return states[0], states[1], merged, tau
