"""What the tokens of an encoder layer's batch are worth and how alike they are, padding left out."""

from __future__ import annotations

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from vtprune.signals import CHUNK_BYTES
from vtprune.stream import EncoderLayer


def mean_keys(layer: EncoderLayer) -> Tensor:
    """(B, N, d) unit vectors: the keys of each token averaged over heads and merged patches; 0 on padding."""
    keys = layer.key[:, :, layer.prefix :].float()
    mean = reduce(keys, "b h (n g) d -> b n d", "mean", g=layer.group).where(layer.valid[..., None], 0)
    return mean / torch.linalg.vector_norm(mean, dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def saliency(layer: EncoderLayer, *, sized: bool = False) -> Tensor:
    """(B, N) attention that each token gets, fp32, 0 on padding: mean over heads of the CLS row, or without a CLS
    token mean over heads and patch queries; summed over a token's patches.

    sized: whether keys weigh as many tokens as they stand for. Queries are taken in chunks: no map of all patches
    is ever whole.
    """
    patches = repeat(layer.valid, "b n -> b (n g)", g=layer.group)
    alive = torch.nn.functional.pad(patches, (layer.prefix, 0), value=True)
    bias = torch.zeros_like(alive, dtype=torch.float32)
    if sized:
        bias[:, layer.prefix :] = repeat(layer.sizes.clamp(min=1).log(), "b n -> b (n g)", g=layer.group)
    bias = bias.masked_fill(~alive, float("-inf"))[:, None, None]
    query = layer.query[:, :, :1] if layer.prefix else layer.query
    asks = alive[:, : query.shape[2]].float() / alive[:, : query.shape[2]].sum(dim=1, keepdim=True)
    keys = layer.key.float().where(alive[:, None, :, None], 0).transpose(-1, -2)
    batch, heads, _, count = keys.shape
    rows = max(1, CHUNK_BYTES // (4 * batch * heads * count))
    received = torch.zeros(batch, count, device=keys.device)
    for states, weights in zip(query.split(rows, dim=2), asks.split(rows, dim=1), strict=True):
        given = weights[:, None, :, None] > 0
        logits = torch.matmul(states.float().where(given, 0) * layer.scale, keys) + bias
        received += torch.einsum("bhqk,bq->bk", logits.softmax(dim=-1), weights) / heads
    tokens = rearrange(received[:, layer.prefix :], "b (n g) -> b n g", g=layer.group).sum(dim=-1)
    return tokens.where(layer.valid, 0)
