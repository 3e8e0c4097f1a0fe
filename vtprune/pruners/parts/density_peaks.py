"""Density peaks: centres of clusters are points in dense places, far from all that are denser."""

from __future__ import annotations

import torch
from torch import Tensor

# How far random noise moves a density in released code.
NOISE = 1e-6
# Of distances that are held at once.
MOST_BYTES = 2**26


def at_once(points: int) -> int:
    """Of how many sets of so many points each the distances are computed together, at least one."""
    return max(1, MOST_BYTES // (4 * points**2))


def spread(points: Tensor) -> Tensor:
    """(..., M, M) fp32 Euclidean distances among (..., M, D) points, over the root of D."""
    points = points.detach().float()
    # Exact distances, so that a point is at 0 from itself and the matrix is symmetric.
    mode = "donot_use_mm_for_euclid_dist"
    return torch.cdist(points, points, compute_mode=mode) / points.shape[-1] ** 0.5


def peaks(distance: Tensor, neighbours: int, *, valid: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
    """(..., M) fp32 how good a centre each point is, in logarithms, from the distances (..., M, M) among them.

    A point's density falls with the squared distances to its nearest `neighbours` points (itself among them; all,
    where there are fewer); it is multiplied by the distance to the nearest denser point, or for the densest by the
    largest distance of all. Of equal densities the earlier point is the denser one; noise: (..., M) in [0, 1), what
    released code draws at random to tell them apart instead. valid: (..., M) bool, the points that there are; the
    others answer -inf.
    """
    near = distance if valid is None else distance.masked_fill(~valid[..., None, :], torch.inf)
    squares = near.topk(min(neighbours, distance.shape[-1]), largest=False).values.square()
    # In logarithms, since the density of a far-off point is 0 in fp32.
    if valid is None:
        density, most = -squares.mean(dim=-1), distance.amax(dim=(-2, -1), keepdim=True)
    else:
        there = squares.isfinite()
        density = -squares.where(there, 0).sum(dim=-1) / there.sum(dim=-1).clamp(min=1)
        density = density.masked_fill(~valid, -torch.inf)
        most = near.where(valid[..., None, :] & valid[..., None], 0).amax(dim=(-2, -1), keepdim=True)
    if noise is not None:
        density = (density.exp() + NOISE * noise).log()
    denser = density[..., None, :] > density[..., None]
    if noise is None:
        place = torch.arange(distance.shape[-1], device=distance.device)
        denser |= (density[..., None, :] == density[..., None]) & (place < place[:, None])
    gap = torch.where(denser, distance, most).amin(dim=-1)
    found = density + gap.log()
    # A point on top of a denser one is a bad centre, but it is there.
    return found if valid is None else found.clamp(min=torch.finfo(found.dtype).min).masked_fill(~valid, -torch.inf)
