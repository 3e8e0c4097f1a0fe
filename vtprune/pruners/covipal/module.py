"""A small transformer that scores vision tokens by each other and by the text, and a top-k that it learns through."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, scaled_dot_product_attention

from vtprune.method.modules import FullLayerNorm, FullLinear, own_randomness
from vtprune.tensors.attention import split_heads

MLP_RATIO = 2
# Enough halvings for any range of fp32 scores.
HALVINGS = 60
LEAST_LOG = -1e4


class Attention(nn.Module):
    """Multi-head attention of (N, D) tokens to (M, D) others."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (FullLinear(width, width) for _ in range(4))

    def forward(self, states: Tensor, others: Tensor) -> Tensor:
        """(N, D); zeros where there is nothing to attend to."""
        if not len(others):
            return torch.zeros_like(states)
        parts = self.query(states), self.key(others), self.value(others)
        query, key, value = (split_heads(part, self.heads)[None] for part in parts)
        mixed = scaled_dot_product_attention(query, key, value)[0]
        merged: Tensor = self.out(mixed.transpose(0, 1).flatten(1))
        return merged


class Block(nn.Module):
    """Attention among vision tokens, attention to the text, and an MLP, each on a normed residual stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(FullLayerNorm(width) for _ in range(3))
        self.own, self.text = Attention(width, heads), Attention(width, heads)
        self.mlp = nn.Sequential(FullLinear(width, MLP_RATIO * width), nn.GELU(), FullLinear(MLP_RATIO * width, width))

    def forward(self, vision: Tensor, text: Tensor) -> Tensor:
        """(N, width) of (N, width) vision and (T, width) text tokens."""
        normed = self.norms[0](vision)
        vision = vision + self.own(normed, normed)
        vision = vision + self.text(self.norms[1](vision), text)
        mixed: Tensor = vision + self.mlp(self.norms[2](vision))
        return mixed


class PruningModule(nn.Module):
    """Scores of vision tokens: projections to `width`, `blocks` of attention, one number a token."""

    def __init__(self, decoder_width: int, width: int, heads: int, blocks: int) -> None:
        super().__init__()
        self.vision, self.text = (
            nn.Sequential(FullLayerNorm(decoder_width), FullLinear(decoder_width, width)) for _ in range(2)
        )
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.head = nn.Sequential(FullLayerNorm(width), FullLinear(width, 1))

    def forward(self, vision: Tensor, text: Tensor) -> Tensor:
        """(N,) scores of (N, D) vision tokens, given (T, D) text tokens."""
        states, words = self.vision(vision), self.text(text)
        for block in self.blocks:
            states = block(states, words)
        scores: Tensor = self.head(states)[:, 0]
        return scores


def new_module(decoder_width: int, width: int, heads: int, blocks: int) -> PruningModule:
    """An untrained module, always with the same weights; torch's random state is left alone."""
    with own_randomness():
        return PruningModule(decoder_width, width, heads, blocks)


def scores_of(module: nn.Module, vision: Tensor, text: Tensor) -> Tensor:
    """(N,) fp32 scores, computed in fp32 whatever the module's weights are held in."""
    scores: Tensor = module(vision, text)
    return scores.to(vision.device)


def module_flops(tokens: int, text: int, decoder_width: int, width: int, blocks: int) -> int:
    """FLOPs of the matrix products of one pass over `tokens` vision and `text` text tokens."""
    projections = 2 * (tokens + text) * decoder_width * width
    own = 8 * tokens * width**2 + 4 * tokens**2 * width
    cross = 4 * (tokens + text) * width**2 + 4 * tokens * text * width if text else 0
    mlp = 4 * MLP_RATIO * tokens * width**2
    return projections + blocks * (own + cross + mlp) + 2 * tokens * width


def log_soft_top(scores: Tensor, count: int, temperature: float) -> Tensor:
    """(N,) log of p = sigmoid((s - t) / temperature), with the t at which the p of all tokens sum to `count` < N.

    Differentiable, t included: no score can rise without the p of the others falling.
    """
    scaled = scores.float() / temperature
    with torch.no_grad():
        logit = math.log(count / (scaled.numel() - count))
        low, high = scaled.min() - logit, scaled.max() - logit
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            above = torch.sigmoid(scaled - middle).sum() > count
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        threshold = (low + high) / 2
    shares = torch.sigmoid(scaled - threshold)
    total, slope = shares.sum(), (shares * (1 - shares)).sum().detach().clamp(min=1e-12)
    # One step of Newton's method on a solved equation: it moves nothing and has the derivative of its solution.
    threshold = threshold + (total - total.detach()) / slope
    return logsigmoid(scaled - threshold).clamp(min=LEAST_LOG)
