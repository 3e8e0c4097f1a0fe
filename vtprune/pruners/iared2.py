"""IA-RED^2: before each group of encoder layers a small trained agent drops the patches that say nothing new."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from vtprune.errors import VTPruneError
from vtprune.method.answers import EncoderSelection
from vtprune.method.checks import check_scores
from vtprune.method.choosing import top_mask
from vtprune.method.facts import Work
from vtprune.method.modules import FullLinear, own_randomness
from vtprune.method.registry import register
from vtprune.method.stages import InEncoder, Read, Trained
from vtprune.method.views import EncoderLayer
from vtprune.pruners.parts.checks import check_count, is_number
from vtprune.pruners.parts.patches import saliency

# Groups of layers, and the size of a head, of the authors' DeiT-S: 12 blocks, 6 heads of width 384.
GROUPS, HEAD = 3, 64
THRESHOLD = 0.5
# What probabilities are kept off 0 and 1 by where their logarithm is taken.
LEAST = 1e-6


class Agent(nn.Module):
    """How likely each patch is to be of use, by its product with the CLS token."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key = FullLinear(width, width), FullLinear(width, width)

    def forward(self, asking: Tensor, patches: Tensor) -> Tensor:
        """(B, n) the mean over heads of sigmoid(q k / sqrt(d)), of (B, n, D) patches to (B, D) who asks."""
        query = rearrange(self.query(asking), "b (h d) -> b h 1 d", h=self.heads)
        key = rearrange(self.key(patches), "b n (h d) -> b h d n", h=self.heads)
        return (query @ key / math.sqrt(query.shape[-1])).sigmoid().mean(dim=1)[:, 0]


def chances(agent: nn.Module, states: Tensor, valid: Tensor, prefix: int, group: int) -> Tensor:
    """(B, N) fp32 what an agent says of the `valid` (B, N) tokens of (B, P + N * group, D) hidden states, the mean
    over the patches of each, 0 of others; the CLS token asks, and where there is none the mean of all."""
    normed = layer_norm(states.float(), states.shape[-1:])
    patches = normed[:, prefix:]
    if prefix:
        asking = normed[:, 0]
    else:
        own = valid.repeat_interleave(group, dim=1)[..., None]
        asking = patches.where(own, 0).sum(dim=1) / own.sum(dim=1).clamp(min=1)
    found: Tensor = agent(asking, patches)
    found = found if group == 1 else reduce(found, "b (n g) -> b n", "mean", g=group)
    return found.where(valid, 0)


def likely(chance: Tensor, valid: Tensor) -> Tensor:
    """(B, N) which tokens have a chance above one half, the likeliest one of an image at least; ties: the lowest."""
    chance = chance.masked_fill(~valid, -1.0)
    best = torch.arange(chance.shape[1], device=chance.device) == chance.argmax(dim=1, keepdim=True)
    return (chance > THRESHOLD) | (best & valid)


def entropy(chance: Tensor, wanted: Tensor, valid: Tensor) -> Tensor:
    """The binary cross-entropy, a scalar, of the chances (B, N) of `valid` tokens with which are `wanted`."""
    chance = chance.clamp(LEAST, 1 - LEAST)
    found = torch.where(wanted, chance, 1 - chance).log()
    return -(found * valid).sum() / valid.sum().clamp(min=1)


@register(
    "iared2",
    paper="IA-RED^2: Interpretability-Aware Redundancy Reduction for Vision Transformers",
    arxiv="2106.12620",
    licence="unknown (no official release)",
    needs="agents in the vision encoder, trained with the model frozen",
)
@dataclass(frozen=True)
class IARED2(InEncoder, Trained):
    """IA-RED^2: Interpretability-Aware Redundancy Reduction for Vision Transformers (NeurIPS 2021, arXiv 2106.12620).

    groups: how many groups of layers the encoder is taken in, each behind an agent (None: the paper's 3, or as many
    as there are layers); heads: of an agent (None: of 64, as on DeiT-S); taught: the share of patches that agents are
    taught to leave in the end where `keep` does not say.

    Before each group (the first one before the first layer) an agent sees hidden states, normed without weights: p of
    a patch is the mean over heads of sigmoid(q . k / sqrt(d)), q of the CLS token and k of the patch by two linear
    maps. Patches with p > 0.5 go on, so that an easy image keeps fewer (`keep` None, as published); what was dropped
    never returns. With `keep` the likeliest patches go on instead, N (keep / N) ** (g / groups) of them behind the
    g-th agent.

    Choices of this project: at least one patch of an image goes on (the reference may leave CLS alone). The paper
    teaches its agents by REINFORCE, by what the classifier's answer gains; that is not built. Here they learn what the
    encoder itself looks at: while they are trained nothing is dropped, and each p learns by cross-entropy whether its
    patch is among those that CLS attends to most in the layer that feeds the decoder, as many as that agent is to
    leave. On encoders without CLS (SigLIP, Qwen; not in the paper) the mean of all patches asks, the attention that a
    token receives teaches, and on Qwen p is the mean over a merge group. Images that were encoded ahead of the forward
    teach nothing.
    """

    groups: int | None = None
    heads: int | None = None
    taught: float = 0.5

    default_keep = None
    encoder_reads = frozenset({Read.HIDDEN})
    untrained = (
        "its agents rank patches by random weights, at the full cost of their scoring, so it is of no use; random and "
        "grid do as well for nothing"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("groups", "heads"):
            if getattr(self, option) is not None:
                check_count(self.name, option, getattr(self, option))
        if not is_number(self.taught) or not 0 < self.taught <= 1:
            raise VTPruneError(f"{self.name}: taught is a share in (0, 1], got {self.taught!r}")

    def resolve(self) -> dict[str, Any]:
        """`groups` and `heads` resolved; raises VTPruneError for more groups than layers, or heads that do not divide
        the encoder's width."""
        depth, width = self.model.encoder_depth, self.model.encoder_width
        groups = min(GROUPS, depth) if self.groups is None else self.groups
        if groups > depth:
            raise VTPruneError(f"{self.name}: groups={groups}, but only {depth} encoder layers feed the decoder")
        heads = self.heads or next(count for count in range(max(1, width // HEAD), 0, -1) if width % count == 0)
        if width % heads:
            raise VTPruneError(f"{self.name}: heads={heads} does not divide the encoder's width, {width}")
        return {"groups": groups, "heads": heads}

    @property
    def agents(self) -> tuple[int, ...]:
        """The layers after which each agent acts, -1 before the first one."""
        groups = self.groups or GROUPS
        return tuple(place * self.model.encoder_depth // groups - 1 for place in range(groups))

    def encoder_layers(self) -> tuple[int, ...]:
        """Those of the agents, and the one that teaches them."""
        return (*self.agents, self.model.encoder_depth - 1)

    def encoder_budget(self, tokens: int) -> int:
        """`keep`; without it at least one."""
        return 1 if self.keep is None else self.budget(tokens)

    def make_module(self) -> nn.Module:
        """The agents, untrained."""
        assert self.groups is not None
        assert self.heads is not None
        with own_randomness():
            return nn.ModuleList(Agent(self.model.encoder_width, self.heads) for _ in range(self.groups))

    def prune_encoder(self, layer: EncoderLayer) -> EncoderSelection | None:
        """What an agent lets go on; in training what it is to learn. Raises ScoreError for NaN."""
        if layer.index not in self.agents:
            if layer.teach is not None:
                layer.teach(self._lesson(layer))
            return None
        assert layer.hidden is not None
        place = self.agents.index(layer.index)
        found = chances(layer.module[place], layer.hidden, layer.valid, layer.prefix, group=layer.group)
        if layer.teach is not None:
            # Nothing is dropped, so that the layer that teaches sees every token.
            layer.memory[self._note(place)] = found
            return None
        found = check_scores(found, self.name, still=True)
        if self.keep is None:
            return EncoderSelection.drop(likely(found, layer.valid))
        counts = self._counts(layer, place, layer.budgets)
        return EncoderSelection.drop(top_mask(found, counts, None if layer.full else layer.valid), counts)

    def _note(self, place: int) -> str:
        return f"{self.name} {place}"

    def _counts(self, layer: EncoderLayer, place: int, budgets: Sequence[int]) -> tuple[int, ...]:
        """(B,) tokens of each image that go on behind an agent, `budgets` (B,) behind the last one."""
        totals = [t * h * w for t, h, w in layer.grids]
        unseen = layer.unseen or (0,) * len(totals)
        share = (place + 1) / len(self.agents)
        found = []
        for total, lost, budget, alive in zip(totals, unseen, budgets, layer.alive, strict=True):
            shown = max(total - lost, 1)
            found.append(min(alive, max(budget, round(shown * (min(budget, shown) / shown) ** share))))
        return tuple(found)

    def _lesson(self, layer: EncoderLayer) -> Tensor:
        """The mean over agents of how far they are from what the encoder looks at."""
        with torch.no_grad():
            looked = saliency(layer)
        budgets = layer.budgets
        if self.keep is None:
            budgets = tuple(max(1, round(self.taught * alive)) for alive in layer.alive)
        valid = None if layer.full else layer.valid
        losses = []
        for place in range(len(self.agents)):
            wanted = top_mask(looked, self._counts(layer, place, budgets), valid)
            losses.append(entropy(layer.memory[self._note(place)], wanted, layer.valid))
        return torch.stack(losses).mean()

    def flops(self, work: Work) -> int:
        """Each agent's keys and products with its query, of the patches that it sees."""
        total, width = 0, work.encoder_width
        for layer in work.encoder_layers:
            if layer in self.agents:
                patches = work.patches if layer < 0 else work.encoder_patches[layer] - work.units * work.has_cls
                total += 2 * patches * width * (width + 1) + 2 * work.units * width**2
        return total
