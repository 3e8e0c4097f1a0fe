"""VFlowOpt: an importance map of the image, recycling of what is dropped, and drops along the decoder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from vtprune.errors import CannotCut, VTPruneError
from vtprune.method.answers import Selection
from vtprune.method.asking import Asking, asking, started
from vtprune.method.facts import Work
from vtprune.method.pruner import Counted, Tunable
from vtprune.method.registry import register
from vtprune.method.stages import BeforeDecoder, BetweenLayers, Query, Read
from vtprune.method.views import DecoderLayer, VisionStream
from vtprune.pruners.parts.checks import check_choice, check_factor, is_number
from vtprune.pruners.vflowopt.budget import Schedule, stage_layers
from vtprune.pruners.vflowopt.importance import importance_map, token_entropy
from vtprune.pruners.vflowopt.recycling import cells_of, direct_count, filled_cells, recycle

IMPORTANCE = "importance"


@register(
    "vflowopt",
    paper="VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided Optimization",
    arxiv="2508.05211",
    licence="CC BY-NC 4.0",
    needs="attention among patches, of the encoder layer that feeds the decoder; the image's pixels",
    variants=("paper", "released"),
)
@dataclass(frozen=True)
class VFlowOpt(BeforeDecoder, BetweenLayers):
    """VFlowOpt: Visual Information Flow-Guided Optimization (ICCV 2025, arXiv 2508.05211).

    A token's importance is the attention that it gets from the global patches (those that receive more than
    `threshold` times the mean) plus `alpha` times the softmax over the image of the entropy of its pixels. The
    most important tokens enter the decoder; the others flow together, one token for every cell of `cell` x `cell`
    (`recycle=False` drops them). Before some decoder `layers` (the authors' two, or any
    number of them) tokens drop out by the same map.

    keep: the mean over decoder layers of the tokens that a layer processes. first: the share that enters the decoder,
    over that mean share; second: the share of what is there that goes on at each of `layers` but the last, one number
    for all of them or a tuple with one each; the share at the last one follows from keep. None is what the authors'
    search found at 0.5, 0.25 and 0.1, linear in keep between; at keeps where their `second` cannot reach it, second
    rises. alpha: None is 1 (released: 0), since the paper's own value is not known to us. layers: None is 9 and 18 of
    28, in proportion to the depth. `default_keep` 0.25.

    Reference: sihany077/VFlowOpt (CC BY-NC 4.0, not copied). Departures from it, of both variants: attention stays
    causal (the code runs one layer without a mask); without global patches the one that receives most is global
    (the code gives NaN); negative importances, which alpha < 0 brings, weigh 0 in a cell (the code's weights then
    have poles). The
    default entropy is that of real grey levels, 0 log 0 being 0, and what enters the decoder is at most its share,
    recycled tokens included: fewer stay as they are, and where the cells alone are more, the least important ones
    are dropped. Every image of a prompt is recycled (the code: single ones alone). The softmax of entropies is over
    the tokens left by earlier stages.

    variant="released" is the authors' code: entropy of normalised pixels that wrapped around in a byte, their
    rounding, and renumbered positions (at each stage; the code does so only before the decoder). Recycled tokens
    then come on top, but for the int(N / cell ** 2) that the code sets aside, so more may be kept than was asked.

    With CLS (the paper's SigLIP has none), CLS takes part in the softmax but is no query and gets no importance.
    With merged patches (Qwen) importance is the mean over a token's patches, which share the token's entropy.
    """

    first: float | None = None
    second: float | tuple[float, ...] | None = None
    threshold: float | None = None
    cell: float | None = None
    alpha: float | None = None
    layers: tuple[int, ...] | None = None
    recycle: bool = True
    variant: str = "paper"

    counted = Counted.MEAN_OF_LAYERS
    # The importance was remembered.
    query = Query.NOBODY

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.name, "recycle", self.recycle, (True, False))
        self._check_layers()
        self._check_second()
        for option in ("first", "cell"):
            self._check_number(option, 0, math.inf, "a finite number above 0")
        self._check_number("alpha", -math.inf, math.inf, "a finite number")
        if self.threshold is not None:
            check_factor(self.name, "threshold", self.threshold)

    def _check_layers(self) -> None:
        if self.layers is None:
            return
        whole = isinstance(self.layers, tuple) and all(type(layer) is int for layer in self.layers)
        if not whole or not self.layers or self.layers[0] < 1 or list(self.layers) != sorted(set(self.layers)):
            raise VTPruneError(f"{self.name}: layers are rising ints of at least 1 in a tuple, got {self.layers!r}")

    def _check_second(self) -> None:
        stages = (2 if self.layers is None else len(self.layers)) - 1
        if self.second is not None and (not stages or (isinstance(self.second, tuple) and len(self.second) != stages)):
            raise VTPruneError(
                f"{self.name}: second is the share at each of the {stages} layers before the last one of `layers`, "
                f"whose own follows from keep, got {self.second!r}"
            )
        for share in self.second if isinstance(self.second, tuple) else (self.second,):
            if share is not None and not (is_number(share) and 0 < share <= 1):
                raise VTPruneError(f"{self.name}: second is a number above 0, at most 1, got {share!r}")

    def _check_number(self, option: str, above: float, most: float, hint: str) -> None:
        value: Any = getattr(self, option)
        if value is not None and not (is_number(value) and above < value <= most):
            raise VTPruneError(f"{self.name}: {option} is {hint}, got {value!r}")

    @property
    def input_reads(self) -> frozenset[Read]:
        """Attention, which weighs tokens where they flow together; the picture, or its pixels, where their entropy
        counts."""
        found = {Read.GRID, Read.ENCODER_FLOWS if self.recycle else Read.ENCODER}
        if self.entropy_weight != 0:
            found.add(Read.PICTURE if self.variant == "paper" else Read.PIXELS)
        return frozenset(found)

    @property
    def renumbers(self) -> bool:
        """True for variant="released"."""
        return self.variant == "released"

    @property
    def entropy_weight(self) -> float:
        """`alpha`, or where it is None 1 by the paper and 0 as released."""
        return self.alpha if self.alpha is not None else float(self.variant == "paper")

    def schedule(self) -> Schedule:
        """How many tokens stay where, in the model's decoder."""
        depth = self.model.decoder_depth
        layers, released = self.layers or stage_layers(depth), self.variant == "released"
        return Schedule(
            keep=0.25 if self.keep is None else self.keep,
            first=self.first,
            second=self.second,
            threshold=self.threshold,
            cell=self.cell,
            layers=layers,
            depth=depth,
            released=released,
        )

    def search_space(self, tokens: float) -> dict[str, Tunable]:
        """The authors' boxes, from the authors' settings at this keep."""
        schedule = self.schedule()
        target = schedule.keep if isinstance(schedule.keep, float) else min(1.0, schedule.keep / tokens)
        start = schedule.settings(target)
        several = self.layers is None or len(self.layers) > 1
        return {
            "first": Tunable(1, 1.5, start=start.first),
            **({"second": Tunable(0.2 / 0.375, 1, start=start.second)} if several else {}),
            "threshold": Tunable(0, 50, start=start.threshold),
            "cell": Tunable(3, 24, start=start.cell),
            "alpha": Tunable(-1, 1, start=self.entropy_weight),
        }

    def resolve(self) -> dict[str, Any]:
        """Nothing; raises VTPruneError for layers beyond the decoder and for shares that cannot meet keep."""
        depth, schedule = self.model.decoder_depth, self.schedule()
        if schedule.layers[-1] >= depth:
            places = " and ".join(map(str, schedule.layers))
            raise VTPruneError(
                f"{self.name} drops tokens before the decoder layers {places} (counted from 0), so it needs at "
                f"least {schedule.layers[-1] + 1} decoder layers, got {depth}"
            )
        if isinstance(schedule.keep, float) and schedule.keep < 1:
            schedule.last(schedule.keep)
        return {}

    def input_budget(self, tokens: int) -> int | None:
        """The share `first`, at most; None as released, whose recycled tokens come on top."""
        counts = self.counts(tokens)
        return None if self.variant == "released" and counts[-1] < tokens else counts[0]

    def counts(self, tokens: int) -> tuple[int, ...]:
        """Tokens that enter the decoder, and that each stage leaves; raises CannotCut where `first` and `second` leave
        nothing for the last layers."""
        schedule = self.schedule()
        try:
            return schedule.counts(tokens)
        except VTPruneError as error:
            raise CannotCut(str(error)) from error

    def drop_layers(self) -> tuple[int, ...]:
        """The layers just before `layers`."""
        return tuple(layer - 1 for layer in self.schedule().layers)

    def drop_budget(self, tokens: int, layer: int, entered: int) -> int | None:
        """What the stage after decoder layer `layer` leaves; None as released, which counts what is self."""
        counts = self.counts(tokens)
        if self.variant == "released" and counts[-1] < tokens:
            return None
        return counts[1 + self.schedule().layers.index(layer + 1)]

    @asking
    def remember(self, stream: VisionStream) -> Asking[dict[str, Any]]:
        """The importance of each token: (N,) fp32; raises ScoreError for NaN."""
        assert stream.signals is not None
        alpha, schedule = self.entropy_weight, self.schedule()
        entropy = token_entropy(stream, released=schedule.released) if alpha else None
        threshold = schedule.settings(schedule.target(stream.total)).threshold
        importance = yield from started(importance_map, stream.signals, entropy, threshold=threshold, alpha=alpha)
        return {IMPORTANCE: importance}

    @asking
    def select(self, stream: VisionStream) -> Asking[Selection]:
        """Keeps the most important tokens and one for every cell of the others; raises ScoreError for NaN."""
        features, schedule = stream.features, self.schedule()
        memory = stream.memory or (yield from started(self.remember, stream))
        importance = memory[IMPORTANCE].to(features.device)
        tokens = importance.numel()
        budget = self.counts(stream.total)[0] if schedule.released else stream.budget
        if not self.recycle or budget >= tokens:
            return Selection.best(importance, budget)
        size = schedule.settings(schedule.target(stream.total)).cell
        frames, height, width = stream.grid
        whole, count = cells_of([(height, width)] * frames, size)
        cells = whole.to(features.device).index_select(0, stream.indices)
        if schedule.released:
            direct = max(0, budget - int(tokens / size**2))
            filled = yield from started(filled_cells, importance, cells, count=count, direct=direct)
        else:
            direct, filled = yield from started(direct_count, importance, cells, count=count, budget=budget)
            filled = min(filled, budget - direct)
        return recycle(features, importance, cells, count=count, direct=direct, filled=filled)

    def prune_decoder(self, layer: DecoderLayer) -> Selection | None:
        """Keeps the most important of the tokens that are left."""
        schedule, alive, count = self.schedule(), layer.vision.numel(), layer.budget
        if schedule.released:
            count = schedule.left(alive, layer.total, schedule.layers.index(layer.index + 1))
        return Selection.best(layer.memory[IMPORTANCE], count) if count < alive else None

    def flops(self, work: Work) -> int:
        """The logits of one layer's map for the received attention, again for the rows of the global patches (fewer
        than 1 / threshold of all can receive more than threshold times the mean), and what flows together."""
        schedule = self.schedule()
        threshold = max(1.0, schedule.settings(schedule.target(work.tokens)).threshold)
        rows = work.patches + max(work.units, int(work.patches / threshold))
        attention = 2 * rows * (work.patches // work.units + work.has_cls) * work.encoder_width
        return attention + self.recycle * 2 * work.tokens * work.decoder_width
