"""Cosine similarities among the tokens of an image, without re-reading them more often than a greedy choice needs."""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune.selection import check_scores

CHUNK = 512


def unit_vectors(features: Tensor, method: str) -> Tensor:
    """(N, D) in fp32 at length 1; zero vectors stay zero. Raises ScoreError, in the name of `method`, for NaN."""
    features = features.float()
    lengths = check_scores(torch.linalg.vector_norm(features, dim=-1, keepdim=True), method)
    return features / lengths.clamp(min=torch.finfo(torch.float32).tiny)


def keeps_matrix(tokens: int, width: int) -> bool:
    """Whether all N x N similarities take no more memory than the N x D vectors, so that they are kept."""
    return tokens <= width


class Cosines:
    """Cosines of (N, D) unit vectors, with `nearest`, (N,): the highest cosine of each to another token.

    All N x N are computed once, `CHUNK` rows at a time, since `nearest` needs them; they are kept for `row` only
    where they are no larger than the vectors, and computed again, a row at a time, where they would be.
    """

    def __init__(self, vectors: Tensor) -> None:
        tokens, width = vectors.shape
        self.vectors = vectors
        self.matrix = vectors.new_empty(tokens, tokens) if keeps_matrix(tokens, width) else None
        nearest = []
        for start in range(0, tokens, CHUNK):
            rows = vectors[start : start + CHUNK] @ vectors.T
            if self.matrix is not None:
                self.matrix[start : start + CHUNK] = rows
            rows.diagonal(offset=start).fill_(-torch.inf)
            nearest.append(rows.amax(dim=1))
        self.nearest = torch.cat(nearest)

    def row(self, index: Tensor) -> Tensor:
        """(N,) cosines to the token at `index`, a tensor of one element (nothing waits for a device)."""
        if self.matrix is not None:
            return self.matrix.index_select(0, index)[0]
        return self.vectors @ self.vectors.index_select(0, index)[0]
