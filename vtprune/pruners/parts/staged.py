"""What methods that drop tokens between decoder layers share: a budget over the layers, met by a schedule."""

from __future__ import annotations

import functools
import itertools
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from vtprune.errors import CannotCut, UnsupportedModelError, VTPruneError
from vtprune.method import schedules
from vtprune.method.answers import Selection
from vtprune.method.checks import check_scores
from vtprune.method.pruner import Counted, Pruner, Tunable, budget_of
from vtprune.method.stages import BetweenLayers, Query
from vtprune.method.views import DecoderLayer
from vtprune.pruners.parts.attending import check_attending, snapped
from vtprune.pruners.parts.checks import check_choice
from vtprune.pruners.parts.prompt_attention import last_attention

R = TypeVar("R")

# Where a budget is too low for the published layers, they move towards the first ones in steps of this size, until
# no stage leaves less than LEAST of what it sees.
STEPS, LEAST = 16, 0.5
# The decoder of the papers, whose layers are scaled to the model's depth.
PUBLISHED_DEPTH = 32


@dataclass(frozen=True)
class Scheduled(Pruner):
    """A method whose budget is spread over decoder layers by a schedule, image by image.

    layers: decoder layers (counted from 0) before which tokens drop; None is the published ones as fractions of the
    depth. schedule: how the budget is spread over them (`method/schedules.py`); those that drop once or at every layer
    start at the first of the published layers, or at the one given. `keep` counts the mean over decoder layers of the
    tokens that the layer processes.
    """

    layers: tuple[int, ...] | None = None
    schedule: str = "constant"

    # Of PUBLISHED_DEPTH layers.
    published_layers: ClassVar[tuple[int, ...]]
    # What `schedule` may be.
    schedule_names: ClassVar[tuple[str, ...]] = schedules.NAMES
    counted = Counted.MEAN_OF_LAYERS

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.name, "schedule", self.schedule, self.schedule_names)
        if self.layers is not None:
            if not isinstance(self.layers, tuple):
                raise VTPruneError(f"{self.name}: layers are ints in a tuple, got {self.layers!r}")
            deep_enough = max([1, *(layer for layer in self.layers if type(layer) is int)]) + 1
            self._named(schedules.check_layers, self.layers, deep_enough)
            if len(self.layers) > 1 and self.schedule in schedules.FROM_ONE_LAYER:
                raise VTPruneError(
                    f"{self.name}: schedule {self.schedule!r} takes one layer, at which it starts, got layers "
                    f"{self.layers!r}; schedules that drop before each of them are 'steps' and {schedules.ENTROPY!r}"
                )

    def _named(self, function: Callable[..., R], *args: Any, error: type[VTPruneError] = VTPruneError) -> R:
        """What `function` answers; its VTPruneError gets the method's name."""
        try:
            return function(*args)
        except VTPruneError as found:
            raise error(f"{self.name}: {found}") from found

    @abstractmethod
    def own_ratios(self, layers: tuple[int, ...]) -> schedules.Ratios:
        """The share of the tokens that each layer processes where no `keep` is given, tokens dropping before `layers`:
        the method's own, or `schedules.fitted` to its mean for another `schedule`."""

    def dropped_once(self, layers: tuple[int, ...], left: float) -> schedules.Ratios:
        """All before the first of `layers`, the share `left` from it on; or its mean spread by another schedule than
        "constant"."""
        depth = self.model.decoder_depth
        own = schedules.factor_steps(depth, layers[:1], left)
        if self.schedule == "constant":
            return own
        return schedules.fitted(self.schedule, depth, layers, schedules.mean(own))

    def places(self, share: float | None = None) -> tuple[int, ...]:
        """The layers before which tokens drop, so that a mean of `share` (None: the method's own) can be kept."""
        return (
            self.layers if self.layers is not None else scaled_layers(self.published_layers, self.model.decoder_depth)
        )

    def ratios(self, share: float | None = None) -> schedules.Ratios:
        """The share of the tokens that each layer processes, for a mean of `share` (None: the method's own)."""
        layers = self.places(share)
        if share is None:
            return self.own_ratios(layers)
        return schedules.fitted(self.schedule, self.model.decoder_depth, layers, share)

    @property
    def default_keep(self) -> int | float | None:
        """The mean of the method's own schedule."""
        return schedules.mean(self.ratios())

    @property
    def meets_whole(self) -> bool:
        """Whether images come whole to the decoder, so that a share out of its reach can be refused at once."""
        return self.model.first

    def resolve(self) -> dict[str, Any]:
        """Nothing; raises VTPruneError for layers that the decoder does not have, and for a share that its layers
        cannot meet (behind another method, whose share of the tokens is not known yet, only when an image comes that
        cannot be cut to its budget)."""
        share = self.keep if isinstance(self.keep, float) and self.meets_whole else None
        self._named(schedules.check_layers, self.places(share), self.model.decoder_depth)
        schedules.check_ratios(self._named(self.ratios, share))
        return {}

    def counts(self, tokens: int, entered: int) -> tuple[int, ...]:
        """Tokens of an image of `tokens`, of which `entered` entered the decoder, that each layer processes; raises
        CannotCut where the layers before the first drop, or one token in each of the others, exceed the budget."""
        return self._named(_counts, self, tokens, entered, error=CannotCut)

    def search_space(self, tokens: float) -> dict[str, Tunable]:
        """How the budget is spread over the layers."""
        if self.keep is None:
            return {}
        several = self.layers is not None and len(self.layers) > 1
        out = schedules.FROM_ONE_LAYER if several else ()
        if self.model.attention_layers is not None:
            out = (*out, *schedules.EVERY_LAYER)
        names = (name for name in self.schedule_names if name not in out)
        return {"schedule": Tunable(choices=tuple(names))}


@dataclass(frozen=True)
class Dropping(Scheduled, BetweenLayers):
    """A method that drops tokens of an image between decoder layers, as many as its schedule says.

    A method of this kind writes `prune_decoder` and `own_ratios`, `flops`, and the constants `published_layers` and,
    unless it looks at all queries, `query`. `layers`, `places` and `stages` are layers *before* which tokens drop;
    `drop_layers` and `drop_budget` speak, as every stage between layers does, of the layer *after* which they do, one
    less.
    """

    @property
    def rankable(self) -> tuple[int, ...] | None:
        """The layers before which tokens may drop, None for all: on a decoder with linear attention those just behind
        a layer with attention, or with it themselves, as it is the one or the other that ranks."""
        layers, behind = self.model.attention_layers, int(self.query is not Query.NEXT_LAYER)
        if layers is None:
            return None
        return tuple(layer + behind for layer in layers if 0 < layer + behind < self.model.decoder_depth)

    def places(self, share: float | None = None) -> tuple[int, ...]:
        """The layers before which tokens drop: `layers`, or the published ones, moved on to the next `rankable`."""
        return super().places(share) if self.layers is not None else snapped(super().places(share), self.rankable)

    def resolve(self) -> dict[str, Any]:
        """Raises VTPruneError, besides, for a decoder without attention where the layers or the schedule need it."""
        check_attending(self.name, "layers", self.layers or (), self.rankable)
        if self.rankable is not None and self.schedule in schedules.EVERY_LAYER:
            raise UnsupportedModelError(
                f"{self.name}: schedule {self.schedule!r} ranks tokens before every decoder layer, and most layers of "
                "this decoder have no attention to rank them by (linear attention); 'constant' and 'steps' drop at "
                "few layers"
            )
        return super().resolve()

    @property
    def movable(self) -> bool:
        """Whether `places` moves with the share to keep (where `layers` are not given)."""
        return False

    def stages(self, tokens: int, entered: int) -> tuple[int, ...]:
        """The layers before which tokens of such an image drop; none where its budget is met already. Raises CannotCut
        where it cannot be met."""
        budget = self._budget(tokens, entered)
        if budget >= entered:
            return ()
        self.counts(tokens, entered)
        return self.places(budget / entered)

    def _budget(self, tokens: int, entered: int) -> int:
        # The method's own setting is a share of what enters; a keep that was given counts the whole image.
        if self.keep is None:
            return budget_of(schedules.mean(self.ratios()), entered)
        return budget_of(self.keep, tokens)

    def drop_layers(self) -> tuple[int, ...]:
        """The layers just before those before which tokens may drop."""
        layers = self.places()
        if self.schedule == "constant":
            layers = layers[:1]
        elif self.schedule in schedules.FROM_ONE_LAYER:
            layers = tuple(range(layers[0], self.model.decoder_depth))
        if self.movable and self.keep is not None:
            # The share of what enters, and with it the layers, depends on the image; these are the latest.
            found = range(1, layers[-1] + 1) if self.rankable is None else self.rankable
            layers = tuple(layer for layer in found if layer <= layers[-1])
        return tuple(layer - 1 for layer in layers)

    def drop_budget(self, tokens: int, layer: int, entered: int) -> int | None:
        """What the schedule says."""
        return self.counts(tokens, entered)[layer + 1]


@dataclass(frozen=True)
class Staged(Dropping):
    """A method that ranks the tokens of an image between decoder layers, by its schedule, and drops the lowest.

    A method of this kind writes `scores` in place of `prune_decoder`.
    """

    @abstractmethod
    def scores(self, layer: DecoderLayer) -> Tensor:
        """(N,) how much each token of the image matters to the prompt: what the layer just before computed, read
        where the image's tokens stand, as in `layer.key[:, layer.vision]`. Nobody writes into the answer: it is
        looked at once more when the forward ends."""

    @property
    def decides(self) -> bool:
        """Whether the entropy decides how many stay (within the budget)."""
        whole = isinstance(self.keep, float) and self.keep == 1
        return self.schedule == schedules.ENTROPY and not whole

    def drop_budget(self, tokens: int, layer: int, entered: int) -> int | None:
        """What the schedule says; None at the layers where the method decides."""
        if self.decides:
            return None if layer + 1 in self.stages(tokens, entered) else entered
        return super().drop_budget(tokens, layer, entered)

    def prune_decoder(self, layer: DecoderLayer) -> Selection | None:
        """Keeps the best; raises ScoreError for NaN."""
        count = layer.budget
        if count >= layer.vision.numel() and not self.decides:
            return None
        scores = check_scores(self.scores(layer), self.name, still=True)
        if self.decides:
            count = self.entropy_count(layer, scores)
        return None if count >= scores.numel() else Selection.best(scores, count)

    def entropy_count(self, layer: DecoderLayer, scores: Tensor) -> int:
        """How many tokens stay by the entropy of their scores, the mean over the layers staying in the budget."""
        alive, depth = layer.vision.numel(), self.model.decoder_depth
        starts = [start for start in self.stages(layer.total, layer.entered) if start > layer.index]
        if not starts:
            return alive
        left = self._budget(layer.total, layer.entered) * depth - layer.processed
        lengths = [end - start for start, end in itertools.pairwise([*starts, depth])]
        cap = schedules.even_count(alive, lengths, left)
        most = (left - schedules.reserve(alive, cap, lengths)) // lengths[0]
        return min(alive, max(1, most), schedules.entropy_count(scores.tolist(), cap))


@dataclass(frozen=True)
class Stepped(Staged):
    """A method that leaves one share of what it sees at each of its layers (PyramidDrop, LazyLLM).

    Where a `keep` is too low for the published layers, they move towards the first ones; explicit `layers` stay.
    """

    schedule: str = "steps"

    @property
    @abstractmethod
    def step(self) -> float:
        """The share that each of the layers leaves, where no `keep` is given."""

    @property
    def movable(self) -> bool:
        """Where `layers` are not given."""
        return self.layers is None

    def places(self, share: float | None = None) -> tuple[int, ...]:
        """`layers`, or the published ones, moved towards the first ones where `share` is too low for them."""
        if self.layers is not None:
            return self.layers
        return moved_layers(self.published_layers, self.model.decoder_depth, share, self.rankable)

    def own_ratios(self, layers: tuple[int, ...]) -> schedules.Ratios:
        """1, the step, its square, ..."""
        depth = self.model.decoder_depth
        own = schedules.factor_steps(depth, layers, self.step)
        if self.schedule == "steps":
            return own
        return schedules.fitted(self.schedule, depth, layers, schedules.mean(own))

    def scores(self, layer: DecoderLayer) -> Tensor:
        """The attention of the last prompt token: (N,)."""
        return last_attention(layer)


@functools.lru_cache(maxsize=4096)
def _counts(pruner: Scheduled, tokens: int, entered: int) -> tuple[int, ...]:
    if pruner.keep is None:
        return schedules.counts(pruner.ratios(), entered)
    budget = budget_of(pruner.keep, tokens)
    if budget >= entered:
        return (entered,) * pruner.model.decoder_depth
    return schedules.counts(pruner.ratios(budget / entered), entered, budget)


def scaled_layers(published: tuple[int, ...], depth: int, published_depth: int = PUBLISHED_DEPTH) -> tuple[int, ...]:
    """The published layers as fractions of another depth: rounded (half up), distinct, from 1 to depth - 1."""
    found: list[int] = []
    for layer in published:
        place = max(1, (2 * layer * depth + published_depth) // (2 * published_depth))
        found.append(max(place, found[-1] + 1) if found else place)
    return tuple(layer for layer in found if layer < depth)


# Asked for at every layer of every forward.
@functools.lru_cache(maxsize=4096)
def moved_layers(
    published: tuple[int, ...], depth: int, share: float | None, among: tuple[int, ...] | None = None
) -> tuple[int, ...]:
    """The published layers at this depth, of those `among` (None: all), moved towards the first ones where a mean of
    `share` is too low for them."""
    whole = scaled_layers(published, depth)
    layers = snapped(whole, among)
    for step in range(STEPS):
        moved = scaled_layers(published, depth, PUBLISHED_DEPTH * STEPS // (STEPS - step))
        layers = snapped(tuple(min(pair) for pair in zip(whole, moved, strict=False)), among)
        if share is None or schedules.mean(schedules.factor_steps(depth, layers, LEAST)) <= share:
            break
    return layers
