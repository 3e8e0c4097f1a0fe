"""Cosines among the tokens of an image, without computing or reading more of them than a greedy choice needs."""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune.method.checks import check_scores

CHUNK = 256
# Of cosines that are held at once: those of 4,096 tokens.
MOST_BYTES = 2**26


def unit_vectors(features: Tensor, method: str | None) -> Tensor:
    """(N, D) in fp32 at length 1; zero vectors stay zero. Raises ScoreError, in the name of `method`, for NaN; None
    leaves it to whoever looks at what is made of them: vectors without a finite length are then NaN."""
    features = features.float()
    lengths = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
    lengths = (
        lengths.masked_fill(lengths.isinf(), torch.nan)
        if method is None
        else check_scores(lengths, method, still=True)
    )
    return features / lengths.clamp(min=torch.finfo(torch.float32).tiny)


def fits(tokens: int) -> bool:
    """Whether all N x N cosines may be held at once."""
    return 4 * tokens**2 <= MOST_BYTES


def cosine_matrix(vectors: Tensor, keep: bool = True) -> tuple[Tensor | None, Tensor]:
    """All cosines of (N, D) unit vectors, (N, N), or None unless `keep`; and each one's highest to another, (N,).

    The matrix is symmetric, so only the part on and above its diagonal is computed, `CHUNK` rows at a time.
    """
    tokens = vectors.shape[0]
    matrix = vectors.new_empty(tokens, tokens) if keep else None
    nearest = vectors.new_full((tokens,), -torch.inf)
    for start in range(0, tokens, CHUNK):
        stop = min(start + CHUNK, tokens)
        rows = vectors[start:stop] @ vectors[start:].T
        # A product need not round alike on both sides of the diagonal.
        block = rows[:, : stop - start]
        block.copy_(block.triu() + block.triu(1).T)
        if matrix is not None:
            matrix[start:stop, start:], matrix[start:, start:stop] = rows, rows.T
        rows.fill_diagonal_(-torch.inf)
        nearest[start:stop] = torch.maximum(nearest[start:stop], rows.amax(dim=1))
        nearest[start:] = torch.maximum(nearest[start:], rows.amax(dim=0))
    return matrix, nearest


def cosine_row(vectors: Tensor, index: Tensor) -> Tensor:
    """(N,) cosines to the token at `index`, a tensor of one element (so that nothing waits for a device)."""
    return vectors @ vectors.index_select(0, index)[0]


def matrix_flops(tokens: int, width: int) -> int:
    """FLOPs of `cosine_matrix`."""
    pairs = sum(min(CHUNK, tokens - start) * (tokens - start) for start in range(0, tokens, CHUNK))
    return 2 * pairs * width
