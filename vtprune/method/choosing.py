"""Choosing the best by scores, ties to the lowest index."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def best_of_each(scores: Tensor, image: Tensor, budgets: Tensor) -> Tensor:
    """(B, n) which tokens are among the best `budgets` (B, I) of their image (B, n) (-1: none, never among them) by
    their scores (B, n); ties go to the lowest index."""
    count = budgets.shape[1]
    if count == 1:
        mine = scores.masked_fill(image < 0, float("-inf"))
        order = torch.sort(mine, dim=1, descending=True, stable=True).indices
        column = torch.arange(order.shape[1], device=order.device)
        first = torch.empty_like(image, dtype=torch.bool).scatter_(1, order, column < budgets)
        return first & (image >= 0)
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices
    owner = image.gather(1, order)
    mine = owner[..., None] == torch.arange(count, device=image.device)
    rank = torch.zeros_like(order).scatter(1, order, (mine.cumsum(dim=1) * mine).sum(dim=-1))
    return (image >= 0) & (rank <= budgets.gather(1, image.clamp(min=0)))


def best_columns(scores: Tensor, text: Tensor, count: int) -> Tensor:
    """(B, count) ascending: the columns of all text (B, n), and of the best of the others by their scores (B, n), ties
    to the lowest index; `count` of them in each row."""
    order = torch.sort(scores.masked_fill(text, float("inf")), dim=1, descending=True, stable=True).indices
    return order[:, :count].sort(dim=1).values


def top(scores: Tensor, count: int) -> Tensor:
    """Indices (count,) of the highest of `scores` (N,), ascending; ties go to the lowest index."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:count].sort().values


def top_mask(scores: Tensor, counts: Sequence[int], valid: Tensor | None) -> Tensor:
    """The `counts` (B,) best valid tokens of each row of (B, N) scores, `valid` (B, N) or None for all: (B, N) bool;
    ties: the lowest."""
    scores = scores if valid is None else scores.masked_fill(~valid, float("-inf"))
    order = scores.argsort(dim=-1, descending=True, stable=True)
    best = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    if min(counts) == max(counts):
        best.scatter_(1, order[:, : counts[0]], True)
    else:
        column = torch.arange(order.shape[1], device=order.device)
        best.scatter_(1, order, column < torch.tensor(counts, device=order.device)[:, None])
    return best if valid is None else best & valid
