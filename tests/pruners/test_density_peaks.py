"""Density-peak clusters against a slow reference; what SparseVLM recycles with them, and how many tokens are left."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.streams import few
from vtprune.pruners.sparsevlm.recycling import (
    cluster_count,
    density_peaks,
    direct_count,
    pool_size,
    recycle,
)


def slow_clusters(points: Tensor, count: int, noise: Tensor | None) -> list[int]:
    """Density-peak clustering, a point at a time, in fp64."""
    size, width = points.shape
    far = [[float((a - b).double().norm()) / math.sqrt(width) for b in points] for a in points]
    rho = [math.exp(-sum(d * d for d in sorted(row)[:count]) / count) for row in far]
    if noise is not None:
        rho = [value + 1e-6 * float(one) for value, one in zip(rho, noise, strict=True)]
    most = max(map(max, far))

    def denser(j: int, i: int) -> bool:
        return rho[j] > rho[i] or (noise is None and rho[j] == rho[i] and j < i)

    delta = [min([far[i][j] for j in range(size) if denser(j, i)], default=most) for i in range(size)]
    centres = sorted(range(size), key=lambda i: -rho[i] * delta[i])[:count]
    nearest = [min(range(count), key=lambda c: far[centres[c]][i]) for i in range(size)]
    return [centres.index(i) if i in centres else nearest[i] for i in range(size)]


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize(("size", "count"), [(1, 1), (7, 1), (12, 3), (40, 5)])
def test_clusters_are_density_peaks(size: int, count: int, noisy: bool) -> None:
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        points = torch.randn(size, 6, generator=generator)
        noise = torch.rand(size, generator=generator) if noisy else None
        assert density_peaks(points, count, noise).tolist() == slow_clusters(points, count, noise)


def test_equal_points_and_far_points_cluster_without_chance() -> None:
    assert density_peaks(torch.ones(5, 3), 2).tolist() == [0, 1, 0, 0, 0]
    # Densities of 0 in fp32 still tell which points are lonelier.
    far = 50 * torch.randn(9, 1, generator=torch.Generator().manual_seed(2))
    assert torch.exp(-torch.cdist(far, far).sort().values[:, :2].square().mean(dim=1)).min() == 0
    assert density_peaks(far, 2).tolist() == slow_clusters(far, 2, None)


@few
@given(tokens=st.integers(2, 60), data=st.data(), seed=st.integers(0, 99))
def test_recycled_tokens_are_the_means_of_their_clusters(tokens: int, data: Any, seed: int) -> None:
    room = data.draw(st.integers(1, tokens - 1))
    generator = torch.Generator().manual_seed(seed)
    features, scores = torch.randn(tokens, 5, generator=generator), torch.rand(tokens, generator=generator)
    direct = direct_count(tokens, room)
    found = recycle(features, scores, direct, room)
    found.check(tokens)
    ranked = scores.argsort(descending=True).tolist()
    pool = set(ranked[direct:][: pool_size(tokens - direct)])
    assert set(ranked[:direct]) <= set(found.kept.tolist()) <= set(ranked[:direct]) | pool
    assert found.kept.numel() <= room
    if found.vectors is None:
        assert room == 1
        return
    expected, members = features[found.kept].clone(), []
    for merge in found.merged():
        assert merge.into == min(merge.members)
        assert merge.weights == pytest.approx([1 / len(merge.members)] * len(merge.members))
        expected[found.kept.tolist().index(merge.into)] = features[list(merge.members)].mean(dim=0)
        members += merge.members
    assert torch.allclose(found.vectors, expected, atol=1e-6)
    # Every recycled token is in one cluster; those of one token are not called merged.
    alone = set(found.kept.tolist()) - set(ranked[:direct]) - set(members)
    assert len(members) == len(set(members))
    assert set(members) | alone == pool


@pytest.mark.parametrize(("alive", "room"), [(5, 1), (5, 2), (5, 5), (300, 7), (1, 1)])
def test_clusters_take_half_of_the_places_at_most(alive: int, room: int) -> None:
    direct = direct_count(alive, room)
    assert direct >= (room + 1) // 2
    assert direct + min(room // 2, cluster_count(alive - direct)) <= room
    if room == alive:
        assert direct == alive
