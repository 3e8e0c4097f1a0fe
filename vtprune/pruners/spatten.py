"""SpAtten: attention that tokens receive is summed up over layers, and the lowest sums leave from layer to layer; what
heads put out is, too, if asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtprune.errors import VTPruneError
from vtprune.method import schedules
from vtprune.method.answers import Selection, VisionPlan
from vtprune.method.checks import check_scores
from vtprune.method.facts import Work
from vtprune.method.registry import register
from vtprune.method.stages import NOTHING, InAttention, Read
from vtprune.method.views import DecoderLayer, VisionStream
from vtprune.pruners.parts.attending import snapped
from vtprune.pruners.parts.checks import check_choice, check_share, is_number
from vtprune.pruners.parts.staged import Staged
from vtprune.tensors.attention import CausalSight, attention_sums

# The share of the layers that the paper leaves whole, and the fewest of them by its re-implementation in LTP.
WHOLE, FEWEST = 0.15, 3
# What the last layer processes where nothing is said: that of the released table for GPT-2-medium.
LAST = 0.3
# The shares of the window that each layer reads in a decoding step, as the released workloads have them.
TABLES: dict[str, schedules.Ratios] = {
    "gpt2_small": (0.9, 0.7, *(0.2,) * 4, *(0.1,) * 6),
    "gpt2_medium": (1.0, 1.0, 0.9, *(0.8,) * 2, *(0.6,) * 6, *(0.3,) * 13),
}
# The share of the layers in which the paper leaves all heads, and the share of the heads that each layer of a released
# workload has; the other one cuts none.
WHOLE_HEADS = 0.3
HEADS: dict[str, schedules.Ratios] = {"gpt2_medium": (*(1.0,) * 16, *(13 / 16,) * 6, *(10 / 16,) * 2)}
# The name of the running sum that lies with an image.
RECEIVED = "received"


def whole_layers(depth: int) -> int:
    """How many of the first layers process every token: 15% of them, rounded up, and at least three."""
    return max(FEWEST, math.ceil(WHOLE * depth))


def ramp(depth: int, whole: int, last: float) -> schedules.Ratios:
    """Everything in the first `whole` layers, then a straight fall to the share `last` in the last layer."""
    steps = depth - whole
    return tuple(1 - (1 - last) * max(0, layer - whole + 1) / steps for layer in range(depth))


def stages(table: schedules.Ratios, depth: int) -> tuple[tuple[int, ...], schedules.Ratios]:
    """The layers of another depth before which tokens drop by a table, and the share that each of them leaves: a layer
    has the share of the one at the same fraction of the depth, and layer 0 all."""
    shares = (1.0, *(table[layer * len(table) // depth] for layer in range(1, depth)))
    layers = tuple(layer for layer in range(1, depth) if shares[layer] < shares[layer - 1])
    return layers, tuple(shares[layer] for layer in layers)


def received(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """(n,) fp32 attention that each token gets from all tokens that see it, summed over rows and heads; query, key:
    (H, n, d) of one sequence under a causal mask."""
    return attention_sums(query, key, CausalSight(key.device), scale).sum(dim=0)


@register(
    "spatten",
    paper="SpAtten: Efficient Sparse Attention Architecture with Cascade Token and Head Pruning",
    arxiv="2012.09852",
    licence="MIT",
    needs="q and k of every decoder layer up to the last one after which tokens drop",
)
@dataclass(frozen=True)
class SpAtten(InAttention, Staged):
    """SpAtten: Cascade Token and Head Pruning (HPCA 2021, arXiv 2012.09852), both cascades, for vision tokens.

    While the prompt is read, each decoder layer adds to a token's score the attention that the token gets there from
    all tokens of the prompt, summed over rows and heads; the tokens with the lowest sums leave before the next layer,
    and are gone from all later ones. `accumulate=False` ranks by the layer that ran alone. The first 15% of the
    layers (at least three, as LTP reads the paper) process all tokens, then the share falls in a straight line to
    `last` (0.3) in the last layer. `schedule="gpt2_small"` or "gpt2_medium" takes the shares of the released workloads
    instead, at the same fractions of the depth. `keep` counts the mean over decoder layers and contradicts `last`: the
    straight fall then ends where the mean is met, and begins earlier where the whole layers would take more than half
    of it; a table's shares move together.

    heads: the cascade of heads. What each head puts out, before the output projection, is summed up over layers, the
    prompt's rows and channels, in magnitude; the heads with the lowest sums stop reading vision before the next layer,
    and in all later ones: vision tokens have no queries and no values there, and what attention text gives them is
    lost. All heads are left in the first 30% of the layers (rounded up), then their share falls in a straight line to
    `heads` in the last one; "gpt2_medium" takes the shares of that released workload (13 of 16, then 10) at the same
    fractions of the depth. Query heads that share a key-value head go together, and one key-value head stays. Each row
    has heads of its own. `keep` does not count them, and keep=1.0 beside them cuts heads alone. None (default) cuts
    none: the paper has heads cut, but states no share for every model, the released workload of GPT-2-small cuts none,
    and layers that are narrowed ask more of a model (torch.nn.Linear, no flash attention) and launch about three times
    what its own do, so that it pays in FLOPs before it does in seconds.

    Early tokens are seen by more rows, and so collect more; the paper's sum has that as well. Departures: text is
    never ranked (the paper ranks every token); what the prompt's reading has dropped stays dropped while the answer
    is made (the released tables rank anew in each step); a head that is cut goes on with text (the paper cuts it for
    all), and keeps its keys of vision, so that it saves FLOPs and no bytes. Left out: the values that each head
    leaves unread, and quantisation. The paper's own code of the cascades was never released, and states no share for
    the last layer. A layer 0 that a table cuts processes everything, since nothing ranks tokens before it.
    Reference: mit-han-lab/spatten, its tables; kssteven418/LTP for the rule of layers.
    """

    last: float | None = None
    accumulate: bool = True
    schedule: str = "linear"
    heads: float | str | None = None

    schedule_names: ClassVar[tuple[str, ...]] = (*schedules.SCHEDULES, *TABLES)
    # It has a rule in their place.
    published_layers: ClassVar[tuple[int, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.name, "accumulate", self.accumulate, (True, False))
        check_share(self.name, "last", self.last, self.keep)
        if self.last is not None and self._table is not None:
            raise VTPruneError(
                f"{self.name}: schedule {self.schedule!r} says what the last layer keeps, so last={self.last} "
                "contradicts it"
            )
        if self.heads is not None and self.heads not in HEADS:
            share = self.heads
            if not is_number(share) or not 0 < share <= 1:  # type: ignore[operator]
                raise VTPruneError(
                    f"{self.name}: heads is the share of them that read vision in the last layer, above 0 and at most "
                    f"1, or one of {', '.join(HEADS)}, got {share!r}"
                )

    @property
    def _table(self) -> schedules.Ratios | None:
        return TABLES.get(self.schedule)

    @property
    def layer_reads(self) -> frozenset[Read]:
        """Every layer, where sums go on from one to the next."""
        return frozenset({Read.EVERY_LAYER}) if self.accumulate else NOTHING

    @property
    def movable(self) -> bool:
        """Where `layers` are not given."""
        return self.layers is None

    def places(self, share: float | None = None) -> tuple[int, ...]:
        """`layers`, those of the table, or the first one that need not be whole."""
        depth = self.model.decoder_depth
        if self.layers is not None:
            return self.layers
        if self._table is not None:
            return snapped(stages(self._table, depth)[0], self.rankable)
        first = whole_layers(depth) if share is None else min(whole_layers(depth), int(share * depth / 2))
        return snapped((max(1, min(first, depth - 1)),), self.rankable)

    def ratios(self, share: float | None = None) -> schedules.Ratios:
        """As the schedule says; a table's between everything and nothing, for a mean of `share`."""
        if self._table is None or share is None:
            return super().ratios(share)
        depth = self.model.decoder_depth
        return schedules.between(depth, self.places(share), share, [stages(self._table, depth)[1]])

    def own_ratios(self, layers: tuple[int, ...]) -> schedules.Ratios:
        """The straight fall, another schedule with its mean, or the table's."""
        depth = self.model.decoder_depth
        if self._table is not None:
            return schedules.stage_ratios(depth, layers, stages(self._table, depth)[1])
        own = ramp(depth, layers[0], LAST if self.last is None else self.last)
        return (
            own if self.schedule == "linear" else schedules.fitted(self.schedule, depth, layers, schedules.mean(own))
        )

    def drop_layers(self) -> tuple[int, ...]:
        """Where sums go on, all layers with attention up to the last one after which tokens may drop."""
        found = super().drop_layers()
        if not self.accumulate or not found:
            return found
        return tuple(layer for layer in self.model.readable if layer <= found[-1])

    def remember(self, stream: VisionStream) -> dict[str, Any]:
        """The sum so far: (N,), nothing yet."""
        return {RECEIVED: torch.zeros(stream.features.shape[0], device=stream.features.device)}

    def scores(self, layer: DecoderLayer) -> Tensor:
        """The attention that each token got in all layers so far, or in this one: (N,)."""
        first, end = layer.first, layer.last + 1
        vision = layer.vision.to(layer.key.device)
        vision = vision - first if first else vision
        found = received(layer.query[:, first:end], layer.key[:, first:end], layer.scale).index_select(0, vision)
        if not self.accumulate:
            return found
        layer.memory[RECEIVED] = layer.memory[RECEIVED].to(found.device) + found
        noted: Tensor = layer.memory[RECEIVED]
        return noted

    def prune_decoder(self, layer: DecoderLayer) -> Selection | None:
        """Keeps the best; adds to the sums where nothing drops. Raises ScoreError for NaN."""
        if layer.budget < layer.vision.numel():
            return super().prune_decoder(layer)
        if self.accumulate:
            self.scores(layer)
        return None

    @property
    def _head_counts(self) -> tuple[int, ...]:
        """How many key-value heads read vision in each decoder layer."""
        depth, heads = self.model.decoder_depth, self.model.decoder_kv_heads
        if self.heads is None:
            return (heads,) * depth
        if isinstance(self.heads, str):
            table = HEADS[self.heads]
            shares = tuple(table[layer * len(table) // depth] for layer in range(depth))
        else:
            shares = ramp(depth, max(1, math.ceil(WHOLE_HEADS * depth)), self.heads)
        return tuple(max(1, math.floor(share * heads + schedules.ROUNDING)) for share in shares)

    def planned_layers(self) -> tuple[int, ...]:
        """Those in which fewer heads than all read vision."""
        return tuple(layer for layer, count in enumerate(self._head_counts) if count < self.model.decoder_kv_heads)

    def watched_layers(self) -> tuple[int, ...]:
        """All layers before the last one that cuts heads."""
        found, counts = self.planned_layers(), self._head_counts
        return tuple(range(max(layer for layer in found if counts[layer] < counts[layer - 1]))) if found else ()

    def vision_plan(self, layer: int) -> VisionPlan:
        """So many heads."""
        return VisionPlan(count=self._head_counts[layer])

    def rank_heads(self, given: Tensor) -> Tensor:
        """What each head put out in all layers so far; raises ScoreError for NaN."""
        return check_scores(super().rank_heads(given), self.name)

    def flops(self, work: Work) -> int:
        """The products of queries and keys in each layer that was looked at, of the heads that read vision there."""
        counts, heads = self._head_counts, self.model.decoder_kv_heads
        pairs = zip(work.decoder_layers, work.decoder_tokens, strict=True)
        return sum(2 * tokens * tokens * work.attention_width * counts[layer] // heads for layer, tokens in pairs)
