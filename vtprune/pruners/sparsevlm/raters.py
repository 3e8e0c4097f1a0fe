"""SparseVLM's text raters: which words look at an image, and what they give to each of its tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune.method.asking import Asking, asking
from vtprune.method.choosing import top
from vtprune.method.views import DecoderLayer
from vtprune.pruners.parts.prompt_attention import attention_of_heads

# SparseVLM+ keeps this many heads, whatever the decoder has.
HEADS = 14
# The positional kernel is at least this far from 0, so that scores stay finite.
LEAST_KERNEL = 1e-6


def relevance(vision: Tensor, text: Tensor) -> Tensor:
    """(T,) fp32 how much of each image token's softmax over the words goes to each word, averaged over the image.

    vision: (N, D), text: (T, D) decoder input embeddings; products are not scaled.
    """
    return torch.matmul(vision.float(), text.float().T).softmax(dim=-1).mean(dim=0)


@asking
def choose_raters(scores: Tensor) -> Asking[tuple[int, ...]]:
    """The words above the mean of `scores` (T,), ascending; all of them where none is."""
    above = yield scores > scores.mean()
    return tuple(above.nonzero()[0].tolist()) or tuple(range(scores.numel()))


def positional_kernel(layer: DecoderLayer, rows: Tensor) -> Tensor:
    """(T, N) the logits that the rotary embedding alone would give: those of vectors of ones at the places `rows` (T,)
    and at the image's tokens."""
    assert layer.rotary is not None
    cos, sin = (part.float() for part in layer.rotary)
    half = cos.shape[-1] // 2
    ones = torch.cat([(cos - sin)[:, :half], (cos + sin)[:, half:]], dim=-1)
    # Columns that are not turned are ones on both sides.
    still = layer.key.shape[-1] - cos.shape[-1]
    asked, image = (ones.index_select(0, places.to(ones.device)) for places in (rows, layer.vision))
    return (torch.matmul(asked, image.T) + still) * layer.scale


def debiased_scores(layer: DecoderLayer, rows: Tensor) -> Tensor:
    """(N,) fp32 the mean over the words at `rows` (T,) of their attention divided by the positional kernel, over the
    `HEADS` heads in which it sums up to most (ties: the first ones)."""
    sums = torch.zeros(layer.key.shape[0], layer.vision.numel(), device=layer.key.device)
    for some, attention in attention_of_heads(layer, rows):
        kernel = positional_kernel(layer, some)
        sums += (attention / kernel.abs().clamp(min=LEAST_KERNEL).copysign(kernel)).sum(dim=1)
    heads = top(sums.sum(dim=1), HEADS)
    return sums.index_select(0, heads).mean(dim=0) / rows.numel()
