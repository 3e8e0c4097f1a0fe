"""Crops of one large image back into one grid, as FlowCut's authors order LLaVA-NeXT's survivors."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

from vtprune.adapters import adapter_for
from vtprune.encoder.arrangement import Arrangement


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


@functools.cache
def arrangement(layout: tuple[int, int], side: int, original: tuple[int, int] | None) -> Arrangement:
    """How LLaVA-NeXT's adapter lays out a picture (width, height) in (rows, cols) crops of side x side patches; None:
    one that fills them."""
    pixels, (rows, cols) = 14 * side, layout
    config = LlavaNextConfig(
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 1, "image_size": pixels, "patch_size": 14,
        },
        text_config={
            "model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 1, "vocab_size": 8,
        },
        image_grid_pinpoints=[[rows * pixels, cols * pixels]],
        image_token_id=7,
        vision_feature_layer=-1,
    )  # fmt: skip
    adapter: Any = adapter_for(LlavaNextForConditionalGeneration(config))
    width, height = original or (cols * pixels, rows * pixels)
    (source,) = adapter.sources()
    (found,) = adapter._arrangements(source, {"image_sizes": torch.tensor([[height, width]])})
    return found


def restore_crops(
    keep: Tensor, layout: tuple[int, int], side: int, original: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Survivors of tiled crops in the raster order of the whole image.

    keep: (C, K) places (0 .. side**2 - 1) of the survivors of each crop; layout: (rows, cols) of crops, in
    raster order, rows * cols == C; original: (width, height), to leave out cells of padding.
    Returns the mask of kept cells, (rows * side, cols * side) bool, and the order, indices into the C * K
    survivors.
    """
    crop = torch.arange(keep.shape[0])[:, None]
    found = arrangement(layout, side, original)
    token = torch.full((found.patches,), -1)
    token[found.sources[:, 0]] = torch.arange(found.tokens)
    # The picture itself comes before its crops.
    own = token[((1 + crop) * side**2 + keep.cpu()).flatten()]
    order = own.argsort()[int((own < 0).sum()) :]
    mask = torch.zeros(layout[0] * side, layout[1] * side, dtype=torch.bool)
    row, col = crop // layout[1] * side + keep.cpu() // side, crop % layout[1] * side + keep.cpu() % side
    mask[row.flatten()[order], col.flatten()[order]] = True
    return mask, order


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
