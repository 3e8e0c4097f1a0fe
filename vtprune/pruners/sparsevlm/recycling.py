"""The tokens that SparseVLM recycles, by density-peak clustering."""

from __future__ import annotations

import bisect
import functools

import torch
from torch import Tensor

from vtprune.method.answers import Merge, Selection
from vtprune.pruners.parts.density_peaks import peaks, spread
from vtprune.tensors.attention import at_least_single

# The share of the dropped tokens that is recycled, and how many of these flow into one.
RECYCLED, CLUSTER_SIZE = 0.3, 10


def pool_size(dropped: int) -> int:
    """How many of `dropped` tokens are recycled."""
    return int(RECYCLED * dropped) + 1 if dropped else 0


def cluster_count(dropped: int) -> int:
    """How many tokens the recycled ones of `dropped` tokens become."""
    return pool_size(dropped) // CLUSTER_SIZE + 1 if dropped else 0


def direct_count(alive: int, budget: int) -> int:
    """How many of `alive` tokens may stay as they are so that with the clusters of the others at most `budget` are
    left: as many as possible. Clusters get at most half of the budget."""
    most = budget // 2
    return bisect.bisect_right(
        range(min(alive, budget) + 1), budget, key=lambda direct: direct + min(most, cluster_count(alive - direct))
    ) - 1  # fmt: skip


def density_peaks(points: Tensor, count: int, noise: Tensor | None = None) -> Tensor:
    """The cluster, 0 .. count - 1, of each of (M, D) points, count <= M: (M,) int64.

    The centres are the best `peaks` by as many neighbours as there are clusters; every other point joins the nearest
    centre. noise: (M,) in [0, 1), what the released code draws at random to tell equal densities apart.
    """
    distance = spread(points)
    centres = peaks(distance, count, noise=noise).sort(descending=True, stable=True).indices[:count]
    number = torch.arange(count, device=points.device)
    return distance.index_select(0, centres).argmin(dim=0).index_copy(0, centres, number)


def cluster_shares(cluster: Tensor, count: int) -> Tensor:
    """(count, M) fp32 the share of each of M points in the mean of its cluster, from `cluster` (M,)."""
    members = (cluster == torch.arange(count, device=cluster.device)[:, None]).float()
    return members / members.sum(dim=1, keepdim=True)


def recycle(features: Tensor, scores: Tensor, direct: int, limit: int) -> Selection:
    """The `direct` best tokens as they are, and the best of the others as the means of their clusters.

    features: (N, D); scores: (N,); limit: tokens in all, clusters are at most what it leaves. A cluster takes the
    place of its first member.
    """
    order = scores.sort(descending=True, stable=True).indices
    stay, rest = order[:direct], order[direct:]
    count = min(cluster_count(rest.numel()), limit - direct)
    if count < 1:
        return Selection(stay.sort().values, sound=True)
    pool = rest[: pool_size(rest.numel())].to(features.device)
    cluster = density_peaks(features.index_select(0, pool), count)
    shares = cluster_shares(cluster, count)
    into = torch.full((count,), scores.numel(), device=pool.device).scatter_reduce(0, cluster, pool, "amin")
    kept = torch.cat([stay.to(pool.device), into]).sort().values
    places = torch.searchsorted(kept, into)

    def mix(values: Tensor) -> Tensor:
        """(N, D) values of the tokens to (K, D) of those that go on."""
        members = at_least_single(values.index_select(0, pool.to(values.device)))
        vectors = torch.matmul(shares.to(members), members).to(values.dtype)
        return values.index_select(0, kept).index_copy(0, places, vectors)

    flowed = functools.partial(_merges, pool, cluster, shares=shares, into=into)
    return Selection(kept, mix(features), flowed, sound=True, mix=mix)


def _merges(pool: Tensor, cluster: Tensor, shares: Tensor, into: Tensor) -> tuple[Merge, ...]:
    """What flowed where, of clusters of more than one token, in raster order."""
    weights = shares.gather(0, cluster[None])[0]
    members: dict[int, list[tuple[int, float]]] = {}
    for token, own, weight in zip(pool.tolist(), cluster.tolist(), weights.tolist(), strict=True):
        members.setdefault(own, []).append((token, weight))
    places = into.tolist()
    return tuple(
        Merge(places[own], *zip(*sorted(members[own]), strict=True))
        for own in sorted(members, key=lambda one: places[one])
        if len(members[own]) > 1
    )
