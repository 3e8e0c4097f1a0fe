"""The parts of FlowCut: a token's score in one layer, and how many tokens leave after it."""

from __future__ import annotations

import torch
from einops import reduce, repeat
from torch import Tensor

from vtprune.selection import check_scores
from vtprune.signals import attention_rows
from vtprune.stream import DecoderLayer, EncoderLayer


def flow_score(attention: Tensor, semantic: Tensor | None, density: Tensor) -> Tensor:
    """Score of each token from (B, N) attention strength, semantic relevance and information density.

    With semantic relevance both relevances are rescaled to sum to 1; without it attention is taken as it is.
    """
    if semantic is None:
        return attention * density
    attention, semantic = (part / part.sum(dim=-1, keepdim=True) for part in (attention, semantic))
    return (attention + semantic) * density


def prune_count(attention: Tensor, alive: Tensor, budget: Tensor, remaining: int) -> Tensor:
    """How many tokens each image loses now: (B,) int64, from the entropy of (B, N) attention (0 on padding).

    (alive - budget) / sqrt(remaining) * (1 - e**2), e the entropy over ln(alive); budget: tokens left in the
    end; remaining: layers that may still prune, at least 1.
    """
    share = attention / attention.sum(dim=-1, keepdim=True)
    entropy = -torch.xlogy(share, share).sum(dim=-1) / alive.clamp(min=2).float().log()
    excess = (alive - budget).clamp(min=0)
    return (excess / remaining**0.5 * (1 - entropy**2)).round().long().clamp(min=0)


def top_mask(scores: Tensor, count: Tensor, valid: Tensor) -> Tensor:
    """The `count` (B,) best valid tokens of each row of (B, N) scores: (B, N) bool; ties: the lowest."""
    order = scores.masked_fill(~valid, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(dim=-1)
    return (rank < count[:, None]) & valid


def encoder_signals(layer: EncoderLayer) -> tuple[Tensor, Tensor]:
    """Attention strength and score of each token at one encoder layer, both (B, N) fp32, 0 on padding."""
    patches = repeat(layer.valid, "b n -> b (n g)", g=layer.group)
    alive = torch.nn.functional.pad(patches, (layer.prefix, 0), value=True)
    value = layer.value.float().where(alive[:, None, :, None], 0)
    density = value.mean(dim=1).abs().sum(dim=-1)[:, layer.prefix :]
    semantic = None
    if layer.prefix:
        query = layer.query[:, :, :1]
        rows = attention_rows(value[:, :, :1], value, 1.0, alive)
        semantic = rows[:, :, 0, layer.prefix :].mean(dim=1)
    else:
        states = layer.query.float().where(alive[:, None, :, None], 0)
        query = states.sum(dim=2, keepdim=True) / alive.sum(dim=-1)[:, None, None, None]
    rows = attention_rows(query, layer.key, layer.scale, alive)
    attention = rows[:, :, 0, layer.prefix :].mean(dim=1)
    score = flow_score(attention, semantic, density)

    def pool(scores: Tensor) -> Tensor:
        tokens = reduce(scores, "b (n g) -> b n", "mean", g=layer.group)
        return check_scores(tokens.where(layer.valid, 0), "flowcut")

    return pool(attention), pool(score)


def decoder_score(layer: DecoderLayer) -> Tensor:
    """Score of one image's tokens at a decoder layer, by the last prompt token: (N,) fp32."""
    query, value = layer.query[:, layer.last, None], layer.value.float()
    key, span = layer.key[:, layer.vision], value[:, layer.vision]
    attention = attention_rows(query, key, layer.scale).mean(dim=0)
    semantic = attention_rows(value[:, layer.last, None], span, span.shape[-1] ** -0.5).mean(dim=0)
    return flow_score(attention, semantic, span.mean(dim=0).abs().sum(dim=-1))[0]
