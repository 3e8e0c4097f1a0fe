"""How LLaVA-OneVision lays out the tiles of one image, and the frames of a video, as VFlowOpt's authors prune them."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import interpolate

from tests.golden.anyres import unpad_mask

MAX_TILES = 9
LARGER = 1.1
# A newline is no part of the image: it outweighs every share of attention, so it stays.
NEWLINE_IMPORTANCE = 1.0


def resized(image: Tensor, height: int, width: int) -> Tensor:
    """(h, w, D) resized bilinearly to (height, width, D)."""
    planes = rearrange(image, "h w d -> 1 d h w")
    return rearrange(interpolate(planes, size=(height, width), mode="bilinear"), "1 d h w -> h w d")


def joined_tiles(
    tiles: Tensor, layout: tuple[int, int], original: tuple[int, int], newline: Tensor, max_tiles: int = MAX_TILES
) -> Tensor:
    """The tiles of an image as one grid without padding, a newline after each row: (h, w + 1, D).

    tiles: (rows * cols, side ** 2, D); layout: (rows, cols) of tiles; original: (width, height) of the image;
    newline: (D,). A grid larger than `max_tiles` tiles is resized to about as many.
    """
    side = math.isqrt(tiles.shape[1])
    whole = rearrange(tiles, "(r c) (h w) d -> (r h) (c w) d", r=layout[0], h=side)
    shown = unpad_mask(whole.shape[0], whole.shape[1], original).to(tiles.device)
    whole = whole[shown.any(dim=1)][:, shown.any(dim=0)]
    height, width = whole.shape[:2]
    times = math.sqrt(height * width / (max_tiles * side**2))
    if times > LARGER:
        whole = resized(whole, int(height // times), int(width // times))
    return torch.cat([whole, newline.expand(whole.shape[0], 1, -1)], dim=1)


def pooled_frames(frames: Tensor) -> Tensor:
    """Each (side ** 2, D) frame at half its side, rounded up: (F, side ** 2, D) to (F, h * w, D)."""
    side = math.isqrt(frames.shape[1])
    half = math.ceil(side / 2)
    images = rearrange(frames, "f (h w) d -> f h w d", h=side)
    return torch.stack([resized(image, half, half).flatten(0, 1) for image in images])
