"""Crops of one large image back into one grid, as FlowCut's authors order LLaVA-NeXT's survivors."""

from __future__ import annotations

import torch
from torch import Tensor


def unpad_mask(rows: int, cols: int, original: tuple[int, int]) -> Tensor:
    """Which cells of a (rows, cols) grid show the image, not its padding: bool.

    original: (width, height) of the image before it was padded to the grid's aspect.
    """
    width, height = original
    mask = torch.zeros(rows, cols, dtype=torch.bool)
    if width / height > cols / rows:
        margin = (rows - int(height * (cols / width))) // 2
        mask[margin : rows - margin] = True
    else:
        margin = (cols - int(width * (rows / height))) // 2
        mask[:, margin : cols - margin] = True
    return mask


def restore_crops(
    keep: Tensor, layout: tuple[int, int], side: int, original: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Survivors of tiled crops in the raster order of the whole image.

    keep: (C, K) places (0 .. side**2 - 1) of the survivors of each crop; layout: (rows, cols) of crops, in
    raster order, rows * cols == C; original: (width, height), to leave out cells of padding.
    Returns the mask of kept cells, (rows * side, cols * side) bool, and the order, indices into the C * K
    survivors.
    """
    height, width = layout[0] * side, layout[1] * side
    crop = torch.arange(keep.shape[0], device=keep.device)[:, None]
    row = crop // layout[1] * side + keep // side
    col = crop % layout[1] * side + keep % side
    source = torch.full((height, width), -1, device=keep.device)
    source[row.flatten(), col.flatten()] = torch.arange(keep.numel(), device=keep.device)
    if original is not None:
        source[~unpad_mask(height, width, original).to(keep.device)] = -1
    return source >= 0, source[source >= 0]


def join_crops(tokens: Tensor, places: Tensor, layout: tuple[int, int], side: int) -> Tensor:
    """Tokens of tiled crops as the authors feed those of LLaVA-NeXT: the dominant ones in the raster order of the
    whole image, then the CLS tokens, then the contextual ones crop after crop.

    tokens: (C, 1 + K + M, D), each crop its CLS token, its dominant ones in raster order, its contextual ones;
    places: (C, K) of the dominant ones, 0 .. side**2 - 1, ascending; layout: (rows, cols) of crops.
    """
    count = places.shape[1]
    _, order = restore_crops(places, layout, side)
    dominant = tokens[:, 1 : 1 + count].flatten(0, 1)[order]
    return torch.cat([dominant, tokens[:, 0], tokens[:, 1 + count :].flatten(0, 1)])
