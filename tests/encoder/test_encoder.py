"""Dropping tokens inside the vision encoder equals masking them there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtprune
from tests.matrix import Drops, kept_tokens
from tests.models import MODELS, ROWS, make, prompt, tower_order

ENCODER = (0, 2)


def _alive(total: int) -> list[tuple[int, Tensor]]:
    """(first layer without the others, tokens alive) for the test pruner's drops in an image of this size."""
    kept, stages = torch.arange(total), []
    for stage, layer in enumerate(ENCODER, start=1):
        count = max(1, round(total * 0.75**stage))
        kept = kept[kept_tokens(torch.arange(kept.numel()), total, count, layer)]
        stages.append((layer + 1, kept))
    return stages


def _dropped_at(layer: int, total: int) -> Tensor:
    gone = torch.zeros(total, dtype=torch.bool)
    for first, kept in _alive(total):
        if layer >= first:
            gone[:] = True
            gone[kept] = False
    return gone


def _mask_llava(model: Any, total: int, prefix: int) -> None:
    def hook(layer: int) -> Any:
        gone = torch.cat([torch.zeros(prefix, dtype=torch.bool), _dropped_at(layer, total)])
        mask = torch.zeros(1, 1, 1, gone.numel()).masked_fill(gone, float("-inf"))
        return lambda module, args, kwargs: ((args[0], mask.expand(-1, -1, gone.numel(), -1)), kwargs)

    for index, layer in enumerate(model.model.vision_tower.encoder.layers):
        layer.register_forward_pre_hook(hook(index), with_kwargs=True)


def _mask_qwen(model: Any, gone_at: Any) -> None:
    """Attention of every block, masked: queries see their own segment's patches that are still alive."""
    for index, block in enumerate(model.model.visual.blocks):
        attention = block.attn

        def forward(states: Tensor, cu_seqlens: Tensor, position_embeddings: Any, *, attn: Any = attention,
                    layer: int = index, **kwargs: Any) -> Tensor:  # fmt: skip
            count = states.shape[0]
            query, key, value = attn.qkv(states).reshape(count, 3, attn.num_heads, -1).unbind(1)
            cos, sin = (part[:, None] for part in position_embeddings)
            half = query.shape[-1] // 2
            turn = lambda x: x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin  # noqa: E731
            scores = torch.einsum("qhd,khd->hqk", turn(query), turn(key)) * attn.scaling
            segment = torch.bucketize(torch.arange(count), cu_seqlens[1:], right=True)
            seen = (segment[:, None] == segment[None]) & (~gone_at(layer))[None]
            seen |= torch.eye(count, dtype=torch.bool)
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            return attn.proj(torch.einsum("hqk,khd->qhd", weights, value).reshape(count, -1))

        attention.forward = forward


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", MODELS)
def test_dropping_inside_the_encoder_equals_masking(kind: str, attention: str) -> None:
    inputs = prompt(kind, ROWS[kind])
    grids = {"image_grid_thw": inputs["image_grid_thw"]} if "image_grid_thw" in inputs else {}
    model, reference = make(kind, attention), make(kind, attention)
    vtprune.wrap(model, Drops(encoder=ENCODER))
    if kind.startswith("qwen"):
        _mask_qwen(reference, _qwen_dropped(reference, inputs["image_grid_thw"]))
    else:
        _mask_llava(reference, 36, prefix=1 if kind == "llava-clip" else 0)
    with torch.no_grad():
        actual = model.model.get_image_features(inputs["pixel_values"], **grids).pooler_output
        expected = reference.model.get_image_features(inputs["pixel_values"], **grids).pooler_output
    for ours, theirs in zip(actual, expected, strict=True):
        alive = _alive(ours.shape[0])[-1][1]
        assert float((ours - theirs)[alive].abs().max()) < 2e-5
        assert float(ours.abs().sum(dim=-1).gt(0).sum()) == alive.numel()


def _qwen_dropped(model: Any, grid_thw: Tensor) -> Any:
    """Dropped patches of a layer in the tower's own order."""
    order, totals = tower_order(model, grid_thw), (grid_thw.prod(dim=-1) // 4).tolist()

    def gone(layer: int) -> Tensor:
        return torch.cat([_dropped_at(layer, total) for total in totals])[order].repeat_interleave(4)

    return gone
