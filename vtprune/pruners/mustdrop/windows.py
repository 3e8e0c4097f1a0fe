"""Windows of a token grid whose members look alike merge into one token each."""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from vtprune.errors import VTPruneError
from vtprune.method.answers import EncoderSelection
from vtprune.method.checks import check_scores
from vtprune.method.views import EncoderLayer

Grid3 = tuple[int, int, int]
WINDOW = (3, 3)


def window_members(grid: Grid3, size: tuple[int, int]) -> Tensor:
    """(W, rows * cols) int64: the tokens in each window of a (t, h, w) grid, frame by frame in raster order.

    Windows of `size` (rows, cols) do not overlap; those at the bottom and on the right that reach past the grid
    have -1 self. The first member is the one at the top left.
    """
    return torch.from_numpy(_members(grid, size))


@functools.lru_cache(maxsize=256)
def _members(grid: Grid3, size: tuple[int, int]) -> npt.NDArray[np.int64]:
    (_, height, width), (rows, cols) = grid, size
    places = np.arange(math.prod(grid)).reshape(grid)
    places = np.pad(places, ((0, 0), (0, -height % rows), (0, -width % cols)), constant_values=-1)
    return rearrange(places, "t (a r) (b c) -> (t a b) (r c)", r=rows, c=cols)


def batch_windows(grids: tuple[Grid3, ...], size: tuple[int, int] = WINDOW, *, ragged: bool = True) -> Tensor:
    """(B, W, S) windows of a batch of images, -1 where there is no token.

    ragged: whether windows that reach past the grid count, with the tokens that they have.
    """
    windows = pad_sequence([window_members(grid, size) for grid in grids], batch_first=True, padding_value=-1)
    return windows if ragged else windows.masked_fill((windows < 0).any(dim=-1, keepdim=True), -1)


def token_means(layer: EncoderLayer) -> Tensor:
    """(B, N, D) fp32 hidden states of the tokens, each the mean of its patches'."""
    assert layer.hidden is not None
    states = layer.hidden[:, layer.prefix :].float()
    return states if layer.group == 1 else reduce(states, "b (n g) d -> b n d", "mean", g=layer.group)


def window_similarity(tokens: Tensor, windows: Tensor) -> Tensor:
    """(B, W) fp32 mean cosine over all pairs of different members; 0 for a window of fewer than two.

    tokens: (B, N, D); windows: (B, W, S). The cosines of all pairs sum to the square of the summed unit
    vectors, less the squares of each.
    """
    inside = windows >= 0
    units = normalize(tokens.float(), dim=-1)
    if len(windows) == 1:
        units = units[0].index_select(0, windows.clamp(min=0).flatten()).view(*windows.shape, -1)
    else:
        row = torch.arange(windows.shape[0], device=windows.device)[:, None, None]
        units = units[row, windows.clamp(min=0)]
    units = units.where(inside[..., None], 0)
    count = inside.sum(dim=-1)
    both = units.sum(dim=2).square().sum(dim=-1) - units.square().sum(dim=(2, 3))
    return both / (count * (count - 1)).clamp(min=1)


def alike_windows(
    similarity: Tensor, windows: Tensor, threshold: float, spare: Tensor, *, shared: bool = False
) -> Tensor:
    """(B, W) bool: the windows that merge, the most similar ones first (ties: the first in raster order).

    A window merges if its (B, W) similarity is at least `threshold`, as long as an image loses no more than
    `spare` (B,) tokens. shared: every image that may lose any merges as many windows as the one that merges the
    fewest.
    """
    members = (windows >= 0).sum(dim=-1)
    alike = (similarity >= threshold) & (members > 1)
    order = similarity.masked_fill(~alike, float("-inf")).argsort(dim=1, descending=True, stable=True)
    ranked = alike.gather(1, order)
    lost = ((members - 1).gather(1, order) * ranked).cumsum(dim=1)
    count = (ranked & (lost <= spare[:, None])).sum(dim=1)
    if shared:
        count = count.minimum(count.masked_fill(spare <= 0, similarity.shape[1]).min())
    return alike & (order.argsort(dim=1) < count[:, None])


def merge_windows(windows: Tensor, chosen: Tensor, valid: Tensor) -> EncoderSelection:
    """The plain mean of each chosen window's members in the place of its first one; all other tokens go on.

    windows: (B, W, S); chosen: (B, W) bool; valid: (B, N) bool.
    """
    batch, tokens = valid.shape
    # A last column takes what belongs to no chosen window.
    places = windows.where(chosen[..., None] & (windows >= 0), tokens).flatten(1)
    share = 1 / (windows >= 0).sum(dim=-1).clamp(min=1).float()
    column = torch.arange(tokens + 1, device=valid.device).expand(batch, -1)
    into = column.scatter(1, places, windows[..., :1].expand_as(windows).flatten(1))[:, :tokens]
    weights = torch.ones(batch, tokens + 1, device=valid.device)
    weights = weights.scatter(1, places, share[..., None].expand(windows.shape).flatten(1))[:, :tokens]
    keep = valid & (into == column[:, :tokens])
    return EncoderSelection(keep, into.masked_fill(~valid, -1), weights, sound=True)


def merge_alike(layer: EncoderLayer, threshold: float, method: str, *, released: bool) -> EncoderSelection:
    """What MustDrop merges after an encoder layer; released: ragged windows stay, all images merge as many.

    Raises ScoreError for NaN, and VTPruneError where a token is missing.
    """
    unseen = layer.unseen or (0,) * len(layer.grids)
    if layer.alive != tuple(math.prod(grid) - hidden for grid, hidden in zip(layer.grids, unseen, strict=True)):
        raise VTPruneError(f"{method} merges windows of whole images: no stage may drop tokens before it")
    windows = batch_windows(layer.grids, ragged=not released).to(layer.valid.device)
    if any(unseen):
        # Nothing flows together with what the decoder never sees.
        rows = torch.arange(len(windows), device=windows.device)[:, None, None]
        hidden = (windows >= 0) & ~layer.valid[rows, windows.clamp(min=0)]
        windows = windows.masked_fill(hidden.any(dim=-1, keepdim=True), -1)
    similarity = check_scores(window_similarity(token_means(layer), windows), method)
    chosen = alike_windows(similarity, windows, threshold, layer.total - layer.budget, shared=released)
    return merge_windows(windows, chosen, layer.valid)
