"""The parts of CDPruner: relevance to a text, and greedy choice from a determinantal point process."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vtprune.method.asking import Asking, asking
from vtprune.method.checks import check_scores, listed
from vtprune.pruners.parts.cosines import (
    cosine_matrix,
    cosine_row,
    fits,
    unit_vectors,
)

EPS = 1e-6
Floats = npt.NDArray[np.float32]
# Multiplications of a choice that is made on the host: some tens of milliseconds.
HOST_WORK = 2**28
METHOD = "cdpruner"  # who errors name


def mean_cosine(tokens: Tensor, texts: Tensor) -> Tensor:
    """(..., N) fp32: the mean cosine of tokens (..., N, E) to M text vectors (M, E); NaN where there is none."""
    return unit_vectors(tokens, None) @ unit_vectors(texts, None).mean(dim=0)


def min_max(scores: Tensor, shared: bool = False) -> Tensor:
    """(B, N) scores to [0, 1] (plus `EPS` over the range, so that none is 0), each row by its own range or all
    by one (`shared`); 1 everywhere where the scores are constant, NaN where one is NaN."""
    dims = (0, 1) if shared else (1,)
    low, high = scores.amin(dim=dims, keepdim=True), scores.amax(dim=dims, keepdim=True)
    return torch.where(high == low, 1.0, (scores - low + EPS) / (high - low).clamp(min=torch.finfo().tiny))


def sharpen(relevance: Tensor, theta: float) -> Tensor:
    """exp(a * relevance), a = theta / (2 - 2 theta), at most 1: a common factor does not change the choice."""
    return (theta / (2 - 2 * theta) * (relevance - relevance.max())).exp()


def takes_matrix(tokens: int, count: int) -> bool:
    """Whether all cosines at once are faster than those of `count` tokens one by one.

    One product of matrices runs at the speed of arithmetic, a product with a vector at that of memory: about a
    twelfth of it on CPUs, less on GPUs.
    """
    return fits(tokens) and 12 * count >= tokens


def on_host(tokens: int, count: int) -> bool:
    """Whether choosing `count` of so many tokens from all their cosines is little enough work for the host, which a
    device needs longer to be told of than the host to do it."""
    return takes_matrix(tokens, count) and tokens * count**2 <= HOST_WORK


@asking
def greedy_dpp(features: Tensor, relevance: Tensor, count: int) -> Asking[tuple[Tensor, Tensor]]:
    """`count` of N tokens in the order of choice, (count,) int64 and distinct, and what each of the others would
    add to the determinant then, (N,), -inf for the chosen.

    features: (N, D); relevance: (N,). Greedy MAP of the determinantal point process with the kernel
    diag(r) L diag(r), L the cosines, by an incremental Cholesky factor of L: r scales a token's gain by r^2 and
    nothing else. A choice costs one row of L and one of the factor. A token that those chosen span (up to `EPS`)
    explains nothing more; it stays a candidate and loses. Ties go to the lowest index; raises ScoreError for NaN.
    """
    tokens = len(features)
    if on_host(tokens, count):
        vectors = unit_vectors(features, None)
        left = vectors.any(dim=1).float()
        matrix = cosine_matrix(vectors)[0]
        assert matrix is not None
        whole = torch.cat([matrix, torch.stack([relevance.float(), left])])
        # Other images may go as far as this before the device is asked.
        del vectors, matrix
        known = yield whole
        # A token without a finite length is alike to none, not even to itself.
        for scores in (known[:-2].diagonal(), known[-2]):
            listed(scores, METHOD)
        known[-2] **= 2
        found, factors = _greedy(known[:-2], known[-2:], count)
        return torch.from_numpy(found).to(features.device), torch.from_numpy(factors).to(features.device)
    vectors = unit_vectors(features, METHOD)
    weight = check_scores(relevance, METHOD).square()
    matrix = cosine_matrix(vectors)[0] if takes_matrix(tokens, count) else None
    left = vectors.any(dim=1).float()
    gains = weight * left
    taken = torch.zeros_like(left)
    chosen = torch.empty(count, dtype=torch.long, device=features.device)
    factor = vectors.new_zeros(count, tokens)
    for turn in range(count):
        index = gains.argmax(dim=0, keepdim=True)
        chosen[turn : turn + 1] = index
        taken.index_fill_(0, index, torch.inf)
        row = cosine_row(vectors, index) if matrix is None else matrix.index_select(0, index)[0]
        row = row - factor[:turn].index_select(1, index)[:, 0] @ factor[:turn]
        pivot = left.index_select(0, index)
        factor[turn] = row * torch.where(pivot > EPS, pivot.clamp(min=EPS).rsqrt(), 0.0)
        left = (left - factor[turn].square()).clamp(min=0)
        gains = weight * left - taken
    return chosen, gains


def _greedy(matrix: Floats, scales: Floats, count: int) -> tuple[npt.NDArray[np.int64], Floats]:
    """The same on the host, from all cosines (N, N), and what scales each token's gain and what its vector adds as yet
    (2, N)."""
    weight, left = scales
    chosen = np.empty(count, dtype=np.int64)
    factor = np.zeros((count, len(left)), dtype=np.float32)
    taken = np.zeros_like(left)
    gains = weight * left
    for turn in range(count):
        index = chosen[turn] = gains.argmax()
        taken[index] = np.inf
        pivot = left[index]
        if pivot > EPS:
            row = matrix[index] - factor[:turn, index] @ factor[:turn]
            factor[turn] = row / np.sqrt(pivot)
            left = np.maximum(left - factor[turn] ** 2, 0)
        gains = weight * left - taken
    return chosen, gains
