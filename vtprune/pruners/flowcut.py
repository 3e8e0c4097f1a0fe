"""FlowCut: information flow through the vision encoder decides which tokens leave, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import reduce, repeat
from torch import Tensor

from vtprune.errors import VTPruneError
from vtprune.method.answers import EncoderSelection, Selection
from vtprune.method.checks import check_scores
from vtprune.method.choosing import top_mask
from vtprune.method.facts import Work
from vtprune.method.pruner import Counted, Tunable
from vtprune.method.registry import register
from vtprune.method.stages import BetweenLayers, InEncoder
from vtprune.method.views import DecoderLayer, EncoderLayer
from vtprune.pruners.parts.checks import check_choice
from vtprune.tensors.attention import attention_rows


def flow_score(attention: Tensor, semantic: Tensor | None, density: Tensor) -> Tensor:
    """Score of each token from (B, N) attention strength, semantic relevance and information density.

    With semantic relevance both relevances are rescaled to sum to 1; without it attention is taken as it is.
    """
    if semantic is None:
        return attention * density
    return (shares(attention) + shares(semantic)) * density


def shares(attention: Tensor) -> Tensor:
    """(B, N) attention rescaled to sum to 1."""
    return attention / attention.sum(dim=-1, keepdim=True)


def entropies(shares: Tensor) -> list[float]:
    """(B,) the entropy, in nats, of shares (B, N) that sum to 1 (0 on padding), on the host."""
    found: list[float] = torch.xlogy(shares, shares).sum(dim=-1).neg().tolist()
    return found


def prune_count(entropy: float, alive: int, budget: int, remaining: int) -> int:
    """How many tokens an image loses now, by the entropy of the attention to those that are `alive`.

    (alive - budget) / sqrt(remaining) * (1 - e**2), e the entropy over ln(alive), in fp32 as released; budget: tokens
    left in the end; remaining: layers that may still prune, at least 1. Nothing where the entropy is no number.
    """
    focused = np.float32(1) - (np.float32(entropy) / np.log(np.float32(max(2, alive)))) ** 2
    count = np.float32(max(0, alive - budget)) / np.float32(remaining**0.5) * focused
    return max(0, int(count.round())) if np.isfinite(count) else 0


def encoder_signals(layer: EncoderLayer) -> tuple[Tensor, Tensor]:
    """Attention strength and score of each token at one encoder layer, both (B, N) fp32, 0 on padding; with a CLS
    token the former sums to 1."""
    alive, value = None, layer.value.float()
    if not layer.full:
        patches = repeat(layer.valid, "b n -> b (n g)", g=layer.group)
        alive = torch.nn.functional.pad(patches, (layer.prefix, 0), value=True)
        value = value.where(alive[:, None, :, None], 0)
    density = torch.linalg.vector_norm(value.mean(dim=1), ord=1, dim=-1)[:, layer.prefix :]
    semantic = None
    if layer.prefix:
        query = layer.query[:, :, :1]
        rows = attention_rows(value[:, :, :1], value, 1.0, alive)
        semantic = rows[:, :, 0, layer.prefix :].mean(dim=1)
    else:
        states = layer.query.float()
        count: Tensor | int = states.shape[2]
        if alive is not None:
            states = states.where(alive[:, None, :, None], 0)
            count = alive.sum(dim=-1)[:, None, None, None]
        query = states.sum(dim=2, keepdim=True) / count
    rows = attention_rows(query, layer.key, layer.scale, alive)
    attention = rows[:, :, 0, layer.prefix :].mean(dim=1)
    if semantic is None:
        score = attention * density
    else:
        attention = shares(attention)
        score = (attention + shares(semantic)) * density

    def pool(scores: Tensor) -> Tensor:
        tokens = scores if layer.group == 1 else reduce(scores, "b (n g) -> b n", "mean", g=layer.group)
        return tokens if layer.full else tokens.where(layer.valid, 0)

    return pool(attention), pool(score)


def decoder_score(layer: DecoderLayer) -> Tensor:
    """Score of one image's tokens at a decoder layer, by the last prompt token: (N,) fp32."""
    query, value = layer.query[:, layer.last, None], layer.value.float()
    vision = layer.vision.to(value.device)
    key, span = layer.key.index_select(1, vision), value.index_select(1, vision)
    attention = attention_rows(query, key, layer.scale).mean(dim=0)
    semantic = attention_rows(value[:, layer.last, None], span, span.shape[-1] ** -0.5).mean(dim=0)
    return flow_score(attention, semantic, span.mean(dim=0).abs().sum(dim=-1))[0]


DECODER_LAYER = 1
MEMORY = "flowcut.score"


@register(
    "flowcut",
    paper="FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models",
    arxiv="2505.19536",
    licence="Apache-2.0",
    needs="q, k and v of every encoder layer; without a CLS token also of decoder layer 1",
    variants=("paper", "released"),
)
@dataclass(frozen=True)
class FlowCut(InEncoder, BetweenLayers):
    """FlowCut: Rethinking Redundancy via Information Flow (NeurIPS 2025, arXiv 2505.19536).

    stages: 1 drops tokens in the vision encoder only, 2 leaves twice the budget there and the budget after
    decoder layer 1; None is the authors' choice: 1 for an encoder with CLS, 2 without. `default_keep` is
    their 64 of 576. Every encoder layer scores; every second one drops a share that grows as attention gets
    more focused; the last leaves exactly the stage's budget.

    Reference: TungChintao/FlowCut (Apache-2.0). The paper's own text was not at hand, so the default follows
    the released code where notes on the paper differ: semantic relevance is an unscaled softmax of value
    products with CLS (notes say cosine), the ratio divides by the root of the remaining layers (notes say
    all layers). Departures: the prune count is per image (`variant="released"` takes the largest of the
    batch, and renumbers positions); entropy takes 0 log 0 as 0; Qwen keeps whole merge groups, their four
    patches' scores averaged and the counts in groups, where the authors pruned single patches and gave the
    survivors the positions of the first ones; every crop of an anyres image gets its share of the budget.

    Encoders without CLS (SigLIP, Qwen): the mean query of all alive patches stands in for the CLS query, and
    there is no semantic term.
    """

    stages: int | None = None
    variant: str = "paper"

    default_keep = 64 / 576
    counted = Counted.LEFT

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.name, "stages", self.stages, (None, 1, 2))

    @property
    def renumbers(self) -> bool:
        """True for variant="released"."""
        return self.variant == "released"

    def search_space(self, tokens: float) -> dict[str, Tunable]:
        """The number of stages; two cost a little more than one at the same keep."""
        return {"stages": Tunable(choices=(1, 2))}

    def resolve(self) -> dict[str, Any]:
        """`stages` resolved; raises VTPruneError where the encoder or the decoder is too shallow."""
        stages = self.stages or (1 if self.model.has_cls or not self.model.decoder_depth else 2)
        if self.model.has_cls and self.model.encoder_depth < 2:
            raise VTPruneError(f"flowcut needs at least 2 encoder layers with CLS, got {self.model.encoder_depth}")
        if stages == 2 and not self._second_stage:
            raise VTPruneError(
                f"flowcut's second stage drops tokens after decoder layer {DECODER_LAYER}, by its attention, so it "
                f"needs at least {DECODER_LAYER + 2} decoder layers, got {self.model.decoder_depth}; stages=1 works"
            )
        return {"stages": stages}

    @property
    def _second_stage(self) -> tuple[int, ...]:
        readable = self.model.readable
        return tuple(layer for layer in readable if DECODER_LAYER <= layer < self.model.decoder_depth - 1)[:1]

    def encoder_budget(self, tokens: int) -> int:
        """The budget, twice that where a second stage follows."""
        return min(tokens, self.budget(tokens) * (self.stages or 1))

    def encoder_layers(self) -> tuple[int, ...]:
        """All of them (with CLS the last one leaves everything as it is)."""
        return tuple(range(self.model.encoder_depth))

    def prune_encoder(self, layer: EncoderLayer) -> EncoderSelection | None:
        """Accumulates the score; every second layer says which tokens go on. Raises ScoreError for NaN."""
        remaining = layer.depth - 1 - layer.index - (layer.prefix > 0)
        if remaining < 0 or all(n <= budget for n, budget in zip(layer.alive, layer.budgets, strict=True)):
            return None
        attention, score = encoder_signals(layer)
        past = layer.memory.get(MEMORY)
        # Each layer's mean of the past and its own score, times a power of two, which orders tokens the same.
        score = score if past is None else torch.add(past, score, alpha=2.0 ** (layer.index - 1))
        score = score if layer.full else score.where(layer.valid, 0)
        layer.memory[MEMORY] = score
        if remaining % 2:
            return None
        # What is no number in the attention, or in an earlier layer's score, is none here.
        score = check_scores(score, self.name, still=True)
        left = tuple(map(min, layer.alive, layer.budgets))
        if remaining:
            share = attention if layer.prefix else shares(attention)
            ends = zip(entropies(share), layer.alive, layer.budgets, strict=True)
            counts = [prune_count(*own, remaining) for own in ends]
            if self.variant == "released":
                counts = [max(counts)] * len(counts)
            left = tuple(max(n - lost, end) for n, lost, end in zip(layer.alive, counts, left, strict=True))
        return EncoderSelection.drop(top_mask(score, left, None if layer.full else layer.valid), left)

    def drop_layers(self) -> tuple[int, ...]:
        """Decoder layer 1, or the first one after it with attention, where there is a second stage."""
        return self._second_stage if self.stages == 2 else ()

    def prune_decoder(self, layer: DecoderLayer) -> Selection | None:
        """Keeps the budget's best by the last prompt token; raises ScoreError for NaN."""
        if layer.vision.numel() <= layer.budget:
            return None
        return Selection.best(check_scores(decoder_score(layer), self.name), layer.budget)

    def flops(self, work: Work) -> int:
        """A row of attention a layer and, with CLS and in the decoder, a row of value products."""
        rows = 2 if work.has_cls else 1
        encoder = sum(work.encoder_patches[i] for i in work.encoder_layers) * rows * 2 * work.encoder_width
        return encoder + len(work.decoder_layers) * work.kept * 2 * 2 * work.attention_width
