"""Windows of a token grid whose members look alike merge into one token each."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn.functional import normalize

from vtprune.errors import VTPruneError
from vtprune.method.answers import EncoderSelection
from vtprune.method.checks import answered, check_scores
from vtprune.method.views import EncoderLayer

Grid3 = tuple[int, int, int]
Ints = npt.NDArray[np.int64]
WINDOW = (3, 3)


@functools.lru_cache(maxsize=256)
def window_members(grid: Grid3, size: tuple[int, int]) -> Ints:
    """(W, rows * cols) the tokens in each window of a (t, h, w) grid, frame by frame in raster order.

    Windows of `size` (rows, cols) do not overlap; those at the bottom and on the right that reach past the grid
    have -1 there. The first member is the one at the top left.
    """
    (_, height, width), (rows, cols) = grid, size
    places = np.arange(math.prod(grid)).reshape(grid)
    places = np.pad(places, ((0, 0), (0, -height % rows), (0, -width % cols)), constant_values=-1)
    return rearrange(places, "t (a r) (b c) -> (t a b) (r c)", r=rows, c=cols)


@dataclass(frozen=True)
class Windows:
    """The windows of a batch of images, and what is known of them before anything is looked at.

    members: (B, W, S) the tokens in each, some of the image where there are fewer than S; inside: (B, W, S) bool which
    of these are there, None for all. pairs: (B, W) how many pairs of different tokens a window has, at least 1;
    several: (B, W) bool whether it has two tokens; lost: (B, W) how many an image loses that merges it.
    window: (B, N) the window that a token is in; first: (B, N) that one's first token; share: (B, N) fp32 the share of
    each token in its mean. A token that is in none has any window, comes first, and has all. column: (B, N) each
    token's own column; follows: (B, N) bool whether another one is the first.
    """

    members: Tensor
    inside: Tensor | None
    pairs: Tensor
    several: Tensor
    lost: Tensor
    window: Tensor
    first: Tensor
    share: Tensor
    column: Tensor
    follows: Tensor

    @classmethod
    def of(cls, members: Ints, tokens: int, device: torch.device) -> Windows:
        """members: (B, W, S) as above, but -1 where there is none; tokens: N, those of the largest image."""
        inside, (batch, count) = members >= 0, members.shape[:2]
        held = inside.sum(axis=-1)
        rows, windows = np.arange(batch)[:, None, None], np.arange(count)[:, None]
        rows, windows = (np.broadcast_to(part, members.shape)[inside] for part in (rows, windows))
        at, column = (rows, members[inside]), np.tile(np.arange(tokens), (batch, 1))
        window, first, share = np.zeros_like(column), column.copy(), np.ones(column.shape, dtype=np.float32)
        window[at], first[at] = windows, members[rows, windows, 0]
        share[at] = np.float32(1) / held[rows, windows].astype(np.float32)
        found = {
            "members": members.clip(min=0),
            "pairs": (held * (held - 1)).clip(min=1),
            "several": held > 1,
            "lost": held - 1,
            "window": window,
            "first": first,
            "share": share,
            "column": column,
            "follows": first != column,
        }
        moved = {name: torch.from_numpy(values).to(device) for name, values in found.items()}
        return cls(inside=None if inside.all() else torch.from_numpy(inside).to(device), **moved)


def batch_windows(
    grids: tuple[Grid3, ...],
    size: tuple[int, int] = WINDOW,
    *,
    ragged: bool = True,
    device: torch.device = torch.device("cpu"),
) -> Windows:
    """The windows of a batch of images; ragged: whether windows that reach past the grid count, with the tokens that
    they have."""
    return _windows(tuple(grids), size, ragged, device)


@functools.lru_cache(maxsize=16)
def _windows(grids: tuple[Grid3, ...], size: tuple[int, int], ragged: bool, device: torch.device) -> Windows:
    found = [window_members(grid, size) for grid in grids]
    members = np.full((len(grids), max(map(len, found)), math.prod(size)), -1)
    for row, own in zip(members, found, strict=True):
        row[: len(own)] = own
    if not ragged:
        members[(members < 0).any(axis=-1)] = -1
    # They outlive the block that asks for them first.
    with torch.inference_mode(False):
        return Windows.of(members, max(math.prod(grid) for grid in grids), device)


def token_means(layer: EncoderLayer) -> Tensor:
    """(B, N, D) fp32 hidden states of the tokens, each the mean of its patches'."""
    assert layer.hidden is not None
    states = layer.hidden[:, layer.prefix :].float()
    return states if layer.group == 1 else reduce(states, "b (n g) d -> b n d", "mean", g=layer.group)


def window_similarity(tokens: Tensor, windows: Windows) -> Tensor:
    """(B, W) fp32 mean cosine over all pairs of different members; 0 for a window of fewer than two.

    tokens: (B, N, D). The cosines of all pairs sum to the square of the summed unit vectors, less the squares of
    each.
    """
    units, members = normalize(tokens.float(), dim=-1), windows.members
    if len(members) == 1:
        units = units[0].index_select(0, members.flatten()).view(*members.shape, -1)
    else:
        units = units[torch.arange(len(members), device=members.device)[:, None, None], members]
    if windows.inside is not None:
        units = units.where(windows.inside[..., None], 0)
    both = units.sum(dim=2).square().sum(dim=-1) - units.square().sum(dim=(2, 3))
    return both / windows.pairs


def alike_windows(
    similarity: Tensor, windows: Windows, threshold: float, spare: Tensor, *, shared: bool = False
) -> Tensor:
    """(B, W) bool: the windows that merge, the most similar ones first (ties: the first in raster order).

    A window merges if its (B, W) similarity is at least `threshold`, as long as an image loses no more than
    `spare` (B,) tokens. shared: every image that may lose any merges as many windows as the one that merges the
    fewest.
    """
    alike = (similarity >= threshold) & windows.several
    order = similarity.masked_fill(~alike, float("-inf")).argsort(dim=1, descending=True, stable=True)
    ranked = alike.gather(1, order)
    fits = ranked & ((windows.lost.gather(1, order) * ranked).cumsum(dim=1) <= spare[:, None])
    if shared:
        count = fits.sum(dim=1)
        count = count.minimum(count.masked_fill(spare <= 0, similarity.shape[1]).min())
        fits = ranked & (torch.arange(order.shape[1], device=order.device) < count[:, None])
    return torch.zeros_like(alike).scatter_(1, order, fits)


def merge_windows(windows: Windows, chosen: Tensor, valid: Tensor | None) -> EncoderSelection:
    """The plain mean of each chosen window's members in the place of its first one; all other tokens go on.

    chosen: (B, W) bool; valid: (B, N) bool, None where no image is padded. Looks at what is kept (`answered`).
    """
    merged = chosen.gather(1, windows.window)
    into = torch.where(merged, windows.first, windows.column)
    weights = windows.share.where(merged, 1.0)
    keep = ~(merged & windows.follows)
    if valid is not None:
        keep = keep & valid
        return EncoderSelection(keep, into.masked_fill(~valid, -1), weights, sound=True)
    counts = tuple(answered(keep.sum(dim=1)))
    flows = min(counts) < keep.shape[1]
    return EncoderSelection(keep, into, weights, counts=counts, flows=flows, sound=True, lossless=True)


def merge_alike(layer: EncoderLayer, threshold: float, method: str, *, released: bool) -> EncoderSelection:
    """What MustDrop merges after an encoder layer; released: ragged windows stay, all images merge as many.

    Raises ScoreError for NaN, and VTPruneError where a token is missing.
    """
    unseen = layer.unseen or (0,) * len(layer.grids)
    if layer.alive != tuple(math.prod(grid) - hidden for grid, hidden in zip(layer.grids, unseen, strict=True)):
        raise VTPruneError(f"{method} merges windows of whole images: no stage may drop tokens before it")
    windows = batch_windows(layer.grids, ragged=not released, device=layer.valid.device)
    similarity = check_scores(window_similarity(token_means(layer), windows), method)
    if any(unseen):
        # Nothing flows together with what the decoder never sees.
        rows = torch.arange(len(windows.members), device=windows.members.device)[:, None, None]
        hidden = ~layer.valid[rows, windows.members]
        hidden = hidden if windows.inside is None else hidden & windows.inside
        similarity = similarity.masked_fill(hidden.any(dim=-1), float("-inf"))
    chosen = alike_windows(similarity, windows, threshold, layer.total - layer.budget, shared=released)
    return merge_windows(windows, chosen, None if layer.full else layer.valid)
