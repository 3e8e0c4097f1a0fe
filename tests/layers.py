"""Random encoder layers for the tests of methods that act there."""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune.method.views import EncoderLayer


def image_states(tokens: int, *, prefix: int, group: int, seed: int) -> Tensor:
    """(3, H, prefix + tokens * group, d) random queries, keys and values of one image."""
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(3, 2, prefix + tokens * group, 4, generator=generator)


def batch_layer(
    images: list[Tensor],
    budgets: list[int],
    *,
    prefix: int,
    group: int,
    index: int = 0,
    depth: int = 1,
    sizes: list[Tensor] | None = None,
) -> EncoderLayer:
    """A layer of these images, shorter ones padded with garbage; sizes: (N,) of each image, ones by default."""
    tokens = [(image.shape[2] - prefix) // group for image in images]
    longest = max(tokens)
    states = torch.full((len(images), *images[0].shape[:2], prefix + longest * group, images[0].shape[-1]), 7.0)
    stands_for = torch.ones(len(images), longest)
    for row, image in enumerate(images):
        states[row, :, :, : image.shape[2]] = image
        if sizes is not None:
            stands_for[row, : tokens[row]] = sizes[row]
    query, key, value = states.unbind(1)
    return EncoderLayer(
        query, key, value, torch.arange(longest)[None] < torch.tensor(tokens)[:, None], torch.tensor(tokens),
        torch.tensor(budgets), index, depth, 0.5, prefix, group, {}, stands_for, tuple((1, 1, n) for n in tokens),
    )  # fmt: skip


def naive_saliency(
    image: Tensor, *, prefix: int, group: int, scale: float = 0.5, sizes: Tensor | None = None
) -> Tensor:
    """(N,) CLS attention, or the mean attention received, from a whole (H, n, n) map, summed over each group."""
    query, key, _ = image
    logits = query @ key.transpose(-1, -2) * scale
    if sizes is not None:
        logits = logits + torch.cat([torch.zeros(prefix), sizes.log().repeat_interleave(group)])
    attention = logits.softmax(dim=-1).mean(dim=0)
    row = attention[0] if prefix else attention.mean(dim=0)
    return row[prefix:].reshape(-1, group).sum(dim=1)


def naive_metric(image: Tensor, *, prefix: int, group: int) -> Tensor:
    """(N, d) keys averaged over heads and each group, at length 1."""
    keys = image[1].mean(dim=0)[prefix:].reshape(-1, group, image.shape[-1]).mean(dim=1)
    return keys / keys.norm(dim=1, keepdim=True)
