"""What the methods of a list do with one image, known on the host before anything runs: who acts, where, how many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from vtprune.errors import CannotCut
from vtprune.method.kinds import IMAGE, Shown
from vtprune.method.pruner import Pruner, asked, form_for
from vtprune.method.stages import (
    BeforeDecoder,
    BetweenLayers,
    InCache,
    InEncoder,
    InLayers,
    Read,
    drop_layers,
    routed_layers,
    spares,
)

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """What bound `pruners` do with an image, or a video, of `tokens` vision tokens in `units` (see `Shown`).

    Methods are named by their place in the list. `entered` is how many of the image's tokens entered the decoder,
    `alive` how many there are when a method is asked; both are shapes, so that nothing waits for a device. A budget
    that a method cannot meet keeps all tokens (`whole` says why); None is a count that the method decides.
    """

    pruners: tuple[Pruner, ...]
    tokens: int
    units: int = 1
    kind: str = IMAGE
    # What was said before: each decoder layer of each forward asks.
    _said: dict[tuple[str | int, ...], Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def _once(self, say: Callable[..., T], *asked: int) -> T:
        key: tuple[str | int, ...] = (say.__name__, *asked)
        if key not in self._said:
            self._said[key] = say(*asked)
        said: T = self._said[key]
        return said

    def acts(self, order: int) -> bool:
        """Whether anything of the image is to go anywhere by this method; the budget of a whole staged method is a
        mean, which may round to all of them."""
        return self._once(self._acts, order)

    def _acts(self, order: int) -> bool:
        pruner, tokens = self.pruners[order], self.tokens
        if spares(pruner, self.kind):
            return False
        budgets: list[int | None] = [pruner.budget(tokens), self.in_encoder(order), self.entering(order)]
        budgets += [self.left(order, layer, tokens) for layer in drop_layers(pruner)]
        budgets += [self.routed(order, layer, tokens) for layer in routed_layers(pruner)]
        return any(budget is None or budget < tokens for budget in budgets)

    @property
    def drops(self) -> bool:
        """Whether any method acts."""
        return any(self.acts(order) for order in range(len(self.pruners)))

    def whole(self, order: int, entered: int) -> str:
        """Why a method cannot cut the image to its budget, "" where it can."""
        return self._once(self._whole, order, entered)

    def _whole(self, order: int, entered: int) -> str:
        pruner, tokens = self.pruners[order], self.tokens
        try:
            if isinstance(pruner, InEncoder):
                self._in_encoder(pruner)
            if isinstance(pruner, BeforeDecoder):
                pruner.input_budget(tokens)
            for layer in drop_layers(pruner)[:1]:
                assert isinstance(pruner, BetweenLayers)
                pruner.drop_budget(tokens, layer, entered)
            for layer in routed_layers(pruner)[:1]:
                assert isinstance(pruner, InLayers)
                pruner.routed_budget(tokens, layer, entered)
        except CannotCut as error:
            return str(error)
        return ""

    def in_encoder(self, order: int) -> int:
        """Tokens that the method's encoder stage leaves; the fewest where it decides by itself."""
        return self._once(self._met_in_encoder, order)

    def _met_in_encoder(self, order: int) -> int:
        pruner = self.pruners[order]
        if not isinstance(pruner, InEncoder):
            return self.tokens
        return _met(self.tokens, partial(self._in_encoder, pruner))

    def _in_encoder(self, pruner: InEncoder) -> int:
        budget = pruner.encoder_budget(self.tokens)
        if asked(pruner) is None and self.units > 1:
            # What a method decides by itself it decides for each unit.
            return self.units
        if budget >= self.units:
            return budget
        raise CannotCut(
            f"{pruner.name} prunes inside the vision encoder, where each of {self.units} frames keeps at least one "
            f"token, and {budget} are asked for"
        )

    def entering(self, order: int) -> int | None:
        """Tokens that the method lets into the decoder."""
        return self._once(self._entering, order)

    def _entering(self, order: int) -> int | None:
        pruner = self.pruners[order]
        if not isinstance(pruner, BeforeDecoder) or spares(pruner, self.kind):
            return self.tokens
        return _met(self.tokens, partial(pruner.input_budget, self.tokens))

    def selects(self, order: int, alive: int) -> bool:
        """Whether the method has to say which tokens enter the decoder."""
        budget = self.entering(order)
        return budget is None or budget < alive

    def left(self, order: int, layer: int, entered: int) -> int | None:
        """Tokens that the method leaves after a decoder layer."""
        return self._once(self._left, order, layer, entered)

    def _left(self, order: int, layer: int, entered: int) -> int | None:
        pruner = self.pruners[order]
        if not isinstance(pruner, BetweenLayers) or layer not in pruner.drop_layers() or spares(pruner, self.kind):
            return entered
        return _met(entered, partial(pruner.drop_budget, self.tokens, layer, entered))

    def asks(self, order: int, layer: int, entered: int, *, alive: int) -> bool:
        """Whether the method has to say which tokens go on after a decoder layer, or to note what it needs for a later
        one."""
        budget = self.left(order, self._once(self._asked_until, order, layer), entered)
        return budget is None or budget < alive

    def _asked_until(self, order: int, layer: int) -> int:
        """The layer whose budget says whether a method is asked at `layer`: its last one, for one that notes something
        of every layer."""
        pruner = self.pruners[order]
        if isinstance(pruner, BetweenLayers) and Read.EVERY_LAYER in pruner.layer_reads:
            return pruner.drop_layers()[-1]
        return layer

    def routed(self, order: int, layer: int, entered: int) -> int | None:
        """Tokens that a decoder layer computes at the most, by the method that routes it."""
        return self._once(self._routed, order, layer, entered)

    def _routed(self, order: int, layer: int, entered: int) -> int | None:
        pruner = self.pruners[order]
        if not isinstance(pruner, InLayers) or layer not in pruner.routed_layers():
            return entered
        return _met(entered, partial(pruner.routed_budget, self.tokens, layer, entered))

    def evicts(self, order: int) -> bool:
        """Whether the method cuts what the cache holds of the image."""
        pruner = self.pruners[order]
        return isinstance(pruner, InCache) and pruner.budget(self.tokens) < self.tokens

    def layers(self) -> list[int | None]:
        """Tokens of the image that each decoder layer computes at the most; None from where on a method decides."""
        orders = range(len(self.pruners))
        entered: int | None = self.tokens
        for order in orders:
            pruner = self.pruners[order]
            decides = isinstance(pruner, InEncoder) and asked(pruner) is None
            entered = None if decides else _least(entered, self.in_encoder(order), self.entering(order))
        alive, found = entered, []
        for layer in range(self.pruners[0].model.decoder_depth):
            computed = alive
            if entered is not None:
                computed = _least(alive, *(self.routed(order, layer, entered) for order in orders))
                alive = _least(alive, *(self.left(order, layer, entered) for order in orders))
            found.append(computed)
        return found


class Plans:
    """The plans of one wrapped model, by what is shown.

    pruners: bound to the model; given: as they were before that, for images that share a budget, and for levels;
    level: what is kept instead of the methods' own keep in the forward under way, None: their own.
    """

    def __init__(
        self,
        pruners: Sequence[Pruner],
        given: Sequence[Pruner] = (),
        level: Callable[[], int | float | None] = lambda: None,
    ) -> None:
        self.pruners, self._given, self._level = tuple(pruners), tuple(given), level
        self._known: dict[Shown, Plan] = {}
        # 1, a token, is not 1.0, the whole.
        self._levels: dict[tuple[type, int | float], Plans] = {}

    def of(self, shown: Shown) -> Plan:
        """The plan of an image or a video."""
        level = self._level()
        if level is not None:
            return self.at(level).of(shown)
        plan = self._known.get(shown)
        if plan is None:
            own = tuple(form_for(pruner, shown.kind) for pruner in self.pruners)
            if shown.keep is not None:
                own = self._kept(shown.keep)
            plan = self._known[shown] = Plan(own, shown.tokens, shown.units, shown.kind)
        return plan

    def now(self) -> Plans:
        """The plans of the forward under way, for whoever asks when it is over."""
        level = self._level()
        return self if level is None else self.at(level)

    def at(self, level: int | float) -> Plans:
        """The plans at a level; one of 1.0 keeps everything."""
        key = type(level), level
        if key not in self._levels:
            self._levels[key] = Plans(self._kept(level), self._given)
        return self._levels[key]

    def _kept(self, keep: int | float) -> tuple[Pruner, ...]:
        pairs = zip(self._given, self.pruners, strict=True)
        return tuple(replace(one, keep=keep).bind(bound.model) for one, bound in pairs)


def _met(whole: int, budget: Callable[[], T]) -> T | int:
    """A budget, or all tokens where the method says that it cannot be met."""
    try:
        return budget()
    except CannotCut:
        return whole


def _least(*counts: int | None) -> int | None:
    known = [count for count in counts if count is not None]
    return min(known) if len(known) == len(counts) else None
