"""The parts of CDPruner: relevance to a text, and greedy choice from a determinantal point process."""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune.method.choosing import check_scores
from vtprune.pruners.parts.cosines import (
    cosine_matrix,
    cosine_row,
    fits,
    unit_vectors,
)

EPS = 1e-6
METHOD = "cdpruner"  # who errors name


def mean_cosine(tokens: Tensor, texts: Tensor) -> Tensor:
    """(..., N) fp32: the mean cosine of tokens (..., N, E) to M text vectors (M, E); raises ScoreError for NaN."""
    return unit_vectors(tokens, METHOD) @ unit_vectors(texts, METHOD).mean(dim=0)


def min_max(scores: Tensor, shared: bool = False) -> Tensor:
    """(B, N) scores to [0, 1] (plus `EPS` over the range, so that none is 0), each row by its own range or all
    by one (`shared`); 1 everywhere where the scores are constant."""
    dims = (0, 1) if shared else (1,)
    low, high = scores.amin(dim=dims, keepdim=True), scores.amax(dim=dims, keepdim=True)
    return torch.where(high > low, (scores - low + EPS) / (high - low).clamp(min=torch.finfo().tiny), 1.0)


def sharpen(relevance: Tensor, theta: float) -> Tensor:
    """exp(a * relevance), a = theta / (2 - 2 theta), at most 1: a common factor does not change the choice."""
    return (theta / (2 - 2 * theta) * (relevance - relevance.max())).exp()


def takes_matrix(tokens: int, width: int, count: int) -> bool:
    """Whether all cosines at once are faster than those of `count` tokens one by one.

    One product of matrices runs at the speed of arithmetic, a product with a vector at that of memory: about a
    twelfth of it on CPUs, less on GPUs.
    """
    return fits(tokens, width) and 12 * count >= tokens


def greedy_dpp(features: Tensor, relevance: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`count` of N tokens in the order of choice, (count,) int64 and distinct, and what each of the others would
    add to the determinant then, (N,), -inf for the chosen.

    features: (N, D); relevance: (N,). Greedy MAP of the determinantal point process with the kernel
    diag(r) L diag(r), L the cosines, by an incremental Cholesky factor of L: r scales a token's gain by r^2 and
    nothing else. A choice costs one row of L and one of the factor. A token that those chosen span (up to `EPS`)
    explains nothing more; it stays a candidate and loses. Ties go to the lowest index; raises ScoreError for NaN.
    """
    vectors = unit_vectors(features, METHOD)
    weight = check_scores(relevance, METHOD).square()
    tokens, width = vectors.shape
    matrix = cosine_matrix(vectors)[0] if takes_matrix(tokens, width, count) else None
    left = vectors.any(dim=1).float()
    gains = weight * left
    taken = torch.zeros_like(left)
    chosen = torch.empty(count, dtype=torch.long, device=features.device)
    factor = vectors.new_zeros(count, tokens)
    for turn in range(count):
        index = gains.argmax(dim=0, keepdim=True)
        chosen[turn : turn + 1] = index
        taken.index_fill_(0, index, torch.inf)
        row = cosine_row(vectors, matrix, index)
        row = row - factor[:turn].index_select(1, index)[:, 0] @ factor[:turn]
        pivot = left.index_select(0, index)
        factor[turn] = row * torch.where(pivot > EPS, pivot.clamp(min=EPS).rsqrt(), 0.0)
        left = (left - factor[turn].square()).clamp(min=0)
        gains = weight * left - taken
    return chosen, gains
