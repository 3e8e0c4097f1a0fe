"""What stands still in a window of frames, averaged over it, and gathered around the peaks of its density."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vtprune.method.answers import Merge
from vtprune.pruners.parts.density_peaks import at_once, peaks, spread
from vtprune.tensors.attention import at_least_single

NEIGHBOURS = 7


@dataclass(frozen=True)
class Clusters:
    """The still places of W windows of several frames each, gathered in at most K clusters a window.

    windows: the frames of each; places: n of a frame; centres: (W, K) int64 the place of each cluster's centre,
    ascending, which stands in the window's first frame; shares: (W, K, n) fp32 the share of each place in the vector
    of a cluster; counts: how many of the K each window has, the first ones.
    """

    windows: list[range]
    places: int
    centres: Tensor
    shares: Tensor
    counts: Sequence[int]

    @property
    def tokens(self) -> Tensor:
        """The tokens, of all T * n, where the clusters go on: of one window after the other."""
        first = torch.tensor([window.start for window in self.windows], device=self.centres.device)[:, None]
        return self._real(first * self.places + self.centres)

    def mixed(self, values: Tensor) -> Tensor:
        """The vectors of the clusters, in the order of `tokens`, of (T * n, D) values; summed in fp32 at the least."""
        means = window_means(at_least_single(values).unflatten(0, (-1, self.places)), self.windows)
        return self._real(self.shares.to(means) @ means).to(values.dtype)

    def _real(self, rows: Tensor) -> Tensor:
        """Of (W, K, ...) those of clusters that there are."""
        most = self.centres.shape[1]
        found = [window * most + rank for window, count in enumerate(self.counts) for rank in range(count)]
        return rows.flatten(0, 1)[torch.tensor(found, device=rows.device)]

    def merges(self) -> tuple[Merge, ...]:
        """What flowed where, in raster order."""
        found = []
        for window, centres, shares, count in zip(
            self.windows, self.centres.tolist(), self.shares.cpu(), self.counts, strict=True
        ):
            for centre, own in zip(centres[:count], shares, strict=False):
                members = own.nonzero().flatten().tolist()
                weights = (own[members] / len(window)).tolist()
                found.append(
                    Merge(
                        window.start * self.places + centre,
                        tuple(frame * self.places + member for frame in window for member in members),
                        tuple(weights * len(window)),
                    )
                )
        return tuple(found)


def window_means(frames: Tensor, windows: Sequence[range]) -> Tensor:
    """(W, n, D) the mean of (T, n, D) values over the frames of each window."""
    share = torch.zeros(len(windows), frames.shape[0], dtype=frames.dtype)
    for row, window in enumerate(windows):
        share[row, window.start : window.stop] = 1 / len(window)
    return (share.to(frames.device) @ frames.flatten(1)).unflatten(1, frames.shape[1:])


def gather_still(
    frames: Tensor, windows: list[range], still: Tensor, counts: Sequence[int], *, beta: float
) -> Clusters:
    """Gathers the still places of windows, (W, n) bool, in `counts` (W,) clusters each, at least one.

    frames: (T, n, D). Places are averaged over their window; the best `peaks` are centres, every other place joins the
    nearest one. A cluster's vector is `beta` times the centre's and the rest the mean of what joined it.
    """
    means = window_means(frames.detach().float(), windows)
    most = max(counts)
    size = at_once(means.shape[1])
    parts = [
        _around_peaks(some, valid, counts[row * size : (row + 1) * size], most)
        for row, (some, valid) in enumerate(zip(means.split(size), still.split(size), strict=True))
    ]
    centres, joined = (torch.cat(part) for part in zip(*parts, strict=True))
    number = joined.sum(dim=-1, keepdim=True)
    shares = (1 - beta) * joined / number.clamp(min=1)
    shares.scatter_add_(2, centres[..., None], torch.where(number > 0, beta, 1.0))
    return Clusters(windows, frames.shape[1], centres=centres, shares=shares, counts=counts)


def _around_peaks(points: Tensor, valid: Tensor, counts: Sequence[int], most: int) -> tuple[Tensor, Tensor]:
    """The centres (w, K) ascending, and (w, K, n) which others join them, 0 or 1, of the valid ones of (w, n, D)
    points; the first `counts` (w,) of the K are real."""
    distance, places = spread(points), points.shape[1]
    order = peaks(distance, NEIGHBOURS, valid=valid).sort(dim=1, descending=True, stable=True).indices
    rank = torch.arange(most, device=points.device)
    real = rank < torch.tensor(counts, device=points.device)[:, None]
    best = order[:, :most].where(real, places).sort(dim=1).values
    centres = best.clamp(max=places - 1)
    away = distance.gather(1, centres[..., None].expand(-1, -1, places))
    nearest = away.masked_fill(~real[..., None], torch.inf).argmin(dim=1)
    chosen = torch.zeros(len(valid), places + 1, dtype=torch.bool, device=valid.device).scatter_(1, best, True)
    joins = valid & ~chosen[:, :places]
    return centres, (nearest.where(joins, -1)[:, None] == rank[:, None]).float()
