"""What stays of an image by two scans, of its windows and of the whole of it, and what the others flow into."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vtprune.method.choosing import top_mask
from vtprune.pruners.parts.cosines import unit_vectors
from vtprune.tensors.compaction import gather_tokens

Grid3 = tuple[int, int, int]


def windows_of(grid: Grid3, side: int) -> Tensor:
    """(t * h * w,) the window of each token of a (t, h, w) grid, counted frame by frame in raster order: squares of
    `side` tokens, of which the last ones of each axis take in the rows and columns that are left over."""
    return torch.from_numpy(_windows(grid, side))


@functools.lru_cache(maxsize=256)
def _windows(grid: Grid3, side: int) -> npt.NDArray[np.int64]:
    frames, height, width = grid
    rows, columns = (max(1, length // side) for length in (height, width))
    row = np.minimum(np.arange(height) // side, rows - 1)
    column = np.minimum(np.arange(width) // side, columns - 1)
    frame = np.arange(frames)[:, None, None]
    return ((frame * rows + row[:, None]) * columns + column).reshape(-1)


def window_count(grid: Grid3, side: int) -> int:
    """How many windows there are."""
    return grid[0] * max(1, grid[1] // side) * max(1, grid[2] // side)


def batch_windows(grids: Sequence[Grid3], side: int) -> Tensor:
    """(B, N) the windows of a batch of images, 0 behind the last token."""
    return pad_sequence([windows_of(grid, side) for grid in grids], batch_first=True)


def rank_in_window(scores: Tensor, windows: Tensor) -> Tensor:
    """(B, N) how many tokens of its own window are ahead of each token: those with a higher score (B, N), and of those
    with as high a one the earlier ones."""
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices
    found = torch.sort(windows.gather(1, order), dim=1, stable=True)
    column = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    starts = torch.ones_like(order, dtype=torch.bool)
    starts[:, 1:] = found.values[:, 1:] != found.values[:, :-1]
    place = column - column.where(starts, 0).cummax(dim=1).values
    return torch.zeros_like(order).scatter_(1, order.gather(1, found.indices), place)


def local_scan(
    scores: Tensor, windows: Tensor, valid: Tensor | None, *, quotas: Sequence[int], counts: Sequence[int]
) -> Tensor:
    """(B, N) bool: the `counts` (B,) tokens of each image with the highest scores (B, N), of which no window (B, N)
    gives more than its image's quota (B,), but where all of them together cannot give as many; ties go to the lowest
    index. valid: (B, N) bool, None for all."""
    device = scores.device
    if valid is not None:
        scores = scores.masked_fill(~valid, float("-inf"))
    within = rank_in_window(scores, windows) < torch.tensor(quotas, device=device)[:, None]
    if valid is not None:
        within &= valid
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices
    beyond = (~within).view(torch.uint8).gather(1, order)
    order = order.gather(1, torch.sort(beyond, dim=1, stable=True).indices)
    column = torch.arange(scores.shape[1], device=device)
    chosen = (column < torch.tensor(counts, device=device)[:, None]).expand_as(order)
    return torch.zeros_like(within).scatter_(1, order, chosen)


def global_scan(scores: Tensor, local: Tensor, valid: Tensor | None, counts: Sequence[int]) -> Tensor:
    """(B, N) bool: beside the `local` (B, N) ones the `counts` (B,) tokens of each image with the highest scores."""
    return local | top_mask(scores.masked_fill(local, float("-inf")), counts, valid)


def flow(
    states: Tensor, keep: Tensor, valid: Tensor | None, *, counts: Sequence[int], method: str
) -> tuple[Tensor, Tensor]:
    """(B, N) int64, the column of the kept token that each token of (B, N, D) states is most like (kept ones: their
    own; padding: -1), and (B, N) its share in the plain mean of all that flows together there; ties go to the first
    column. counts: (B,) how many are kept. Raises ScoreError, in the name of `method`, for states without a length."""
    states = states if valid is None else states.masked_fill(~valid[..., None], 0)
    unit = unit_vectors(states, method)
    columns = torch.sort((~keep).view(torch.uint8), dim=1, stable=True).indices[:, : max(counts)]
    cosines = torch.matmul(unit, gather_tokens(unit, columns).transpose(1, 2))
    if min(counts) != max(counts):
        cosines = cosines.masked_fill(~keep.gather(1, columns)[:, None], float("-inf"))
    own = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
    into = torch.where(keep, own, columns.gather(1, cosines.argmax(dim=-1)))
    members = torch.ones_like(into) if valid is None else valid.long()
    sizes = torch.zeros_like(into).scatter_add_(1, into, members)
    share = sizes.gather(1, into).clamp(min=1).float().reciprocal()
    return (into if valid is None else into.masked_fill(~valid, -1)), share
