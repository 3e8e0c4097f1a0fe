"""What the tokens of an encoder layer's batch are worth and how alike they are, padding left out."""

from __future__ import annotations

import functools

import torch
from einops import reduce, repeat
from torch import Tensor

from vtprune.method.views import EncoderLayer
from vtprune.tensors.attention import rows_at_once


def mean_keys(layer: EncoderLayer) -> Tensor:
    """(B, N, d) unit vectors: the keys of each token averaged over heads and merged patches; 0 on padding, and NaN
    for a mean of no length in a batch without padding."""
    keys = layer.key[:, :, layer.prefix :].float()
    mean = keys.mean(dim=1) if layer.group == 1 else reduce(keys, "b h (n g) d -> b n d", "mean", g=layer.group)
    if layer.full:
        return mean / torch.linalg.vector_norm(mean, dim=-1, keepdim=True)
    mean = mean.where(layer.valid[..., None], 0)
    return mean / torch.linalg.vector_norm(mean, dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def saliency(layer: EncoderLayer, *, sized: bool = False) -> Tensor:
    """(B, N) attention that each token gets, fp32, 0 on padding: mean over heads of the CLS row, or without a CLS
    token mean over heads and patch queries; summed over a token's patches. Tokens that the decoder never sees get and
    give attention as the others do, and count 0.

    sized: whether keys weigh as many tokens as they stand for. Images of one length are taken together, without
    their padding, and queries in chunks: no map of all patches is ever whole.
    """
    if layer.full:
        return _saliency(layer, slice(None), layer.alive[0], sized=sized)
    found = layer.key.new_zeros(layer.valid.shape).float()
    for tokens in sorted(set(layer.columns)):
        rows = [row for row, held in enumerate(layer.columns) if held == tokens]
        found[rows, :tokens] = _saliency(layer, rows, tokens, sized=sized)
    return found.where(layer.valid, 0)


def _saliency(layer: EncoderLayer, rows: slice | list[int], tokens: int, *, sized: bool) -> Tensor:
    """(b, tokens) of the images `rows`, which have as many tokens."""
    patches = layer.prefix + tokens * layer.group
    asks = layer.query[rows, :, : 1 if layer.prefix else patches].float()
    key = layer.key[rows, :, :patches].float()
    bias = None
    if sized and layer.bias is not None:
        bias = layer.bias[rows, :patches]
    elif sized and layer.merged:
        log = repeat(layer.sizes[rows, :tokens].clamp(min=1).log(), "b n -> b (n g)", g=layer.group)
        bias = torch.nn.functional.pad(log, (layer.prefix, 0))
    received = mean_attention(asks, key, layer.scale, bias)[:, layer.prefix :]
    return received if layer.group == 1 else reduce(received, "b (n g) -> b n", "sum", g=layer.group)


def mean_attention(query: Tensor, key: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """(B, n) mean over heads and queries of the attention that each key gets, accumulated in chunks of queries.

    query: (B, H, q, d), key: (B, H, n, d), bias: (B, n) added to the logits of each key.
    """
    batch, heads, count, _ = key.shape
    chunks = query.split(rows_at_once(query.device, batch * heads * count), dim=2)
    turned = key.flatten(0, 1).transpose(-1, -2)
    # Without a bias nothing is added.
    added = (
        key.new_empty(1, 1, 1) if bias is None else bias.to(key)[:, None].expand(-1, heads, -1).flatten(0, 1)[:, None]
    )
    parts = []
    for chunk in chunks:
        logits = torch.baddbmm(added, chunk.flatten(0, 1), turned, beta=0 if bias is None else 1, alpha=scale)
        weights = logits.softmax(dim=-1).unflatten(0, (batch, heads))
        parts.append(weights.sum(dim=(1, 2)) if len(chunks) > 1 else weights.mean(dim=(1, 2)))
    return parts[0] if len(parts) == 1 else functools.reduce(Tensor.add, parts) / (heads * query.shape[2])
