"""VFlowOpt: an importance map of the image, recycling of what is dropped, and drops along the decoder."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vtprune.errors import VTPruneError
from vtprune.pruner import ModelFacts, Pruner, ScoringWork, Tunable
from vtprune.pruners.checks import check_choice, check_factor
from vtprune.pruners.recycling import cells_of, direct_count, recycle
from vtprune.pruners.vflow_budget import (
    PUBLISHED_DEPTH,
    Settings,
    last_ratio,
    released_count,
    released_settings,
    stage_counts,
    stage_layers,
)
from vtprune.pruners.vflow_map import grey_levels, importance_map, level_entropy, patch_levels, released_entropy
from vtprune.registry import register
from vtprune.selection import Selection, top
from vtprune.stream import DecoderLayer, VisionStream

IMPORTANCE = "importance"


@register(
    "vflowopt",
    stage="before decoder, decoder",
    paper="VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided Optimization",
    arxiv="2508.05211",
    licence="CC BY-NC 4.0",
    needs="attention among patches, of the encoder layer that feeds the decoder; the image's pixels",
    variants=("paper", "released"),
)
@dataclass(frozen=True)
class VFlowOpt(Pruner):
    """VFlowOpt: Visual Information Flow-Guided Optimization (ICCV 2025, arXiv 2508.05211).

    A token's importance is the attention that it gets from the global patches (those that receive more than
    `threshold` times the mean) plus `alpha` times the softmax over the image of the entropy of its pixels. The
    most important tokens enter the decoder; the others flow together, one token for every cell of `cell` x `cell`
    (`recycle=False` drops them). Before two decoder `layers` tokens drop out by the same map.

    keep: the mean over decoder layers of the tokens that a layer processes. first: share of the tokens that enters
    the decoder; second: share of these that goes on at the first of `layers`; the share at the other one follows
    from keep. None is what the authors' search found at 0.5, 0.25 and 0.1, linear in keep between; at keeps where
    their `second` cannot reach it, second rises. alpha: None is 1 (released: 0), since the paper's own value is
    not known to us. layers: None is 9 and 18 of 28, in proportion to the depth. `default_keep` 0.25.

    Reference: sihany077/VFlowOpt (CC BY-NC 4.0, not copied). Departures from it, of both variants: attention stays
    causal (the code runs one layer without a mask); without global patches the one that receives most is global
    (the code gives NaN); negative importances, which alpha < 0 brings, weigh 0 in a cell (the code's weights then
    have poles). The
    default entropy is that of real grey levels, 0 log 0 being 0, and what enters the decoder is at most its share,
    recycled tokens included: fewer stay as they are, and where the cells alone are more, the least important ones
    are dropped. The softmax of entropies is over the tokens left by earlier stages.

    variant="released" is the authors' code: entropy of normalised pixels that wrapped around in a byte, their
    rounding, and renumbered positions (at each stage; the code does so only before the decoder). Recycled tokens
    then come on top, but for the int(N / cell ** 2) that the code sets aside, so more may be kept than was asked.

    With CLS (the paper's SigLIP has none), CLS takes part in the softmax but is no query and gets no importance.
    With merged patches (Qwen) importance is the mean over a token's patches, which share the token's entropy.
    """

    first: float | None = None
    second: float | None = None
    threshold: float | None = None
    cell: float | None = None
    alpha: float | None = None
    layers: tuple[int, int] | None = None
    recycle: bool = True
    variant: str = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.name, "variant", self.variant, self.info.variants)
        check_choice(self.name, "recycle", self.recycle, (True, False))
        for option in ("first", "second"):
            self._check_number(option, 0, 1, "a number above 0, at most 1")
        self._check_number("cell", 0, math.inf, "a finite number above 0")
        self._check_number("alpha", -math.inf, math.inf, "a finite number")
        if self.threshold is not None:
            check_factor(self.name, "threshold", self.threshold)
        if self.layers is not None:
            whole = isinstance(self.layers, tuple) and all(type(layer) is int for layer in self.layers)
            if not whole or len(self.layers) != 2 or not 1 <= self.layers[0] < self.layers[1]:
                raise VTPruneError(f"{self.name}: layers are two rising ints of at least 1, got {self.layers!r}")

    def _check_number(self, option: str, above: float, most: float, hint: str) -> None:
        value: Any = getattr(self, option)
        number = value is None or (isinstance(value, int | float) and not isinstance(value, bool))
        if not number or (value is not None and not (math.isfinite(value) and above < value <= most)):
            raise VTPruneError(f"{self.name}: {option} is {hint}, got {value!r}")

    @property
    def reads_encoder(self) -> bool:
        """True."""
        return True

    @property
    def reads_picture(self) -> bool:
        """Where the entropy of real colours counts."""
        return self.variant == "paper" and self.entropy_weight != 0

    @property
    def compact_positions(self) -> bool:
        """True for variant="released"."""
        return self.variant == "released"

    @property
    def adaptive(self) -> bool:
        """True for variant="released", whose recycled tokens come on top of its share."""
        return self.variant == "released"

    @property
    def entropy_weight(self) -> float:
        """`alpha`, or where it is None 1 by the paper and 0 as released."""
        return self.alpha if self.alpha is not None else float(self.variant == "paper")

    @property
    def decoder_depth(self) -> int:
        """Layers of the decoder that the budget is for: the authors', until `for_model` says which."""
        return PUBLISHED_DEPTH

    def search_space(self) -> dict[str, Tunable]:
        """The authors' boxes; an int keep is no share, so `first` has none then."""
        space = {
            "second": Tunable(0.2 / 0.375, 1),
            "threshold": Tunable(0, 50),
            "cell": Tunable(3, 24),
            "alpha": Tunable(-1, 1),
        }
        keep = self.asked_keep
        return {"first": Tunable(keep, min(1, 1.5 * keep)), **space} if isinstance(keep, float) else space

    def for_model(self, facts: ModelFacts) -> VFlowOpt:
        """With the decoder's depth; raises VTPruneError for layers beyond it and for shares that cannot meet keep."""
        depth = facts.decoder_depth
        layers = self.stages(depth)
        if layers[-1] >= depth:
            raise VTPruneError(
                f"{self.name} drops tokens before the decoder layers {layers[0]} and {layers[1]} (counted from 0), "
                f"so it needs at least {layers[1] + 1} decoder layers, got {depth}"
            )
        options = {one.name: getattr(self, one.name) for one in dataclasses.fields(VFlowOpt)}
        fitted = _Fitted(**options, depth=depth)
        if isinstance(self.asked_keep, float) and self.asked_keep < 1:
            fitted.last(self.asked_keep)
        return fitted

    def stages(self, depth: int) -> tuple[int, int]:
        """The decoder layers before which tokens drop out."""
        return self.layers or stage_layers(depth)

    def target(self, tokens: int) -> float:
        """The share to keep of an image of `tokens`."""
        keep = self.asked_keep
        return keep if isinstance(keep, float) else min(1.0, keep / tokens)

    def settings(self, target: float) -> Settings:
        """What holds at a mean share of `target`; first is a share of all tokens here."""
        known = released_settings(target)
        own = {
            "first": min(1.0, known.first * target) if self.first is None else self.first,
            **{
                name: getattr(self, name)
                for name in ("second", "threshold", "cell")
                if getattr(self, name) is not None
            },
        }
        return dataclasses.replace(known, **own)

    def last(self, target: float) -> float:
        """The share that goes on at the second of `layers`; raises VTPruneError where none meets `target`."""
        at, depth = self.settings(target), self.decoder_depth
        ratio = last_ratio(target, at.first, at.second, self.stages(depth), depth)
        if ratio <= 0:
            raise VTPruneError(
                f"{self.name}: first={at.first:.4g} and second={at.second:.4g} use up a mean of {target:.4g} over "
                f"{depth} layers before layer {self.stages(depth)[1]}; lower first or second, or raise keep"
            )
        return min(1.0, ratio)

    def counts(self, tokens: int) -> tuple[int, int, int]:
        """Tokens of an image of `tokens` that enter the decoder, and that either of its stages leaves."""
        budget, target = self.budget(tokens), self.target(tokens)
        if budget >= tokens:
            return tokens, tokens, tokens
        at, depth, last = self.settings(target), self.decoder_depth, self.last(target)
        if self.variant == "released":
            entering = max(1, released_count(tokens, at.first))
            middle = max(1, released_count(entering, at.second))
            return entering, middle, max(1, released_count(middle, last))
        layers = self.stages(depth)
        return stage_counts(tokens, budget, at.first, at.second, layers, depth, fill=self.second is None)

    def achieved(self, counts: list[int]) -> float:
        """The mean over decoder layers."""
        return sum(counts) / len(counts)

    def input_budget(self, tokens: int) -> int:
        """The first of `counts`."""
        return self.counts(tokens)[0]

    def decoder_layers(self, depth: int) -> tuple[int, ...]:
        """The layers just before those of `stages`."""
        return tuple(layer - 1 for layer in self.stages(depth))

    def decoder_budget(self, tokens: int, layer: int) -> int:
        """The second or third of `counts`."""
        return self.counts(tokens)[1 + self.decoder_layers(self.decoder_depth).index(layer)]

    def remember(self, stream: VisionStream) -> dict[str, Tensor]:
        """The importance of each token: (N,) fp32; raises ScoreError for NaN."""
        assert stream.signals is not None
        alpha, entropy = self.entropy_weight, None
        if alpha and self.variant == "released":
            entropy = released_entropy(stream.pixels, stream.grid)
        elif alpha:
            assert stream.picture is not None
            entropy = level_entropy(patch_levels(grey_levels(stream.picture), stream.grid))
        if entropy is not None:
            entropy = entropy[stream.indices.to(entropy.device)]
        threshold = self.settings(self.target(stream.total)).threshold
        return {IMPORTANCE: importance_map(stream.signals, entropy, threshold, alpha)}

    def select(self, stream: VisionStream) -> Selection:
        """Keeps the most important tokens and one for every cell of the others; raises ScoreError for NaN."""
        memory = stream.memory or self.remember(stream)
        importance = memory[IMPORTANCE].to(stream.features.device)
        tokens, budget = importance.numel(), stream.budget
        if not self.recycle or budget >= tokens:
            return Selection(top(importance, budget))
        size = self.settings(self.target(stream.total)).cell
        frames, *frame = stream.grid
        cells = cells_of([(frame[0], frame[1])] * frames, size).to(stream.indices.device)[stream.indices]
        cells = cells.to(importance.device)
        if self.variant == "released":
            return recycle(stream.features, importance, cells, max(0, budget - int(tokens / size**2)))
        return recycle(stream.features, importance, cells, direct_count(importance, cells, budget), budget)

    def prune_decoder(self, layer: DecoderLayer) -> Selection | None:
        """Keeps the most important of the tokens that are left."""
        count = layer.budget
        if self.variant == "released" and self.budget(layer.total) < layer.total:
            target = self.target(layer.total)
            early = layer.index == self.decoder_layers(layer.depth)[0]
            ratio = self.settings(target).second if early else self.last(target)
            count = max(1, released_count(layer.vision.numel(), ratio))
        if count >= layer.vision.numel():
            return None
        return Selection(top(layer.memory[IMPORTANCE], count))

    def scoring_flops(self, work: ScoringWork) -> int:
        """The logits of one layer's map for the received attention, again for the global rows (at most all of
        them), and the vectors that flow together."""
        attention = 2 * work.patches * (work.patches + work.has_cls) * work.encoder_width
        return 2 * attention + self.recycle * 2 * work.tokens * work.decoder_width


@dataclass(frozen=True)
class _Fitted(VFlowOpt):
    """A VFlowOpt for a decoder of `depth` layers."""

    depth: int = PUBLISHED_DEPTH

    @property
    def decoder_depth(self) -> int:
        """The model's own."""
        return self.depth
