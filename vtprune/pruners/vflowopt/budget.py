"""How many tokens VFlowOpt keeps where, so that the mean over the decoder's layers is what was asked for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from vtprune.errors import VTPruneError
from vtprune.method.pruner import budget_of

# The decoder layers before which the authors drop tokens, and how many their decoder has.
PUBLISHED_LAYERS, PUBLISHED_DEPTH = (9, 18), 28

Shares = tuple[float, ...]
Layers = tuple[int, ...]


@dataclass(frozen=True)
class Settings:
    """first: share of the tokens that enters the decoder, over the mean share; second: share of these that the
    first decoder stage keeps; threshold: of received attention over its mean; cell: side in tokens."""

    first: float
    second: float
    threshold: float
    cell: float


# What the authors' search found, by the mean share of tokens kept.
RELEASED = {
    0.1: Settings(0.11661529508161146 / 0.1, 1.0, 39.26492840997221, 17.386981849158786),
    0.25: Settings(0.2651026358526424 / 0.25, 0.9833433139039235, 34.759552803070484, 15.580797034937687),
    0.5: Settings(0.7233201448753168 / 0.5, 0.748747637472693, 28.683047941520474, 11.756787150848968),
}


def released_settings(target: float) -> Settings:
    """The authors' settings at a mean share of `target`: linear between theirs, constant beyond."""
    known = sorted(RELEASED)
    if target <= known[0] or target >= known[-1]:
        return RELEASED[min(max(target, known[0]), known[-1])]
    high = next(share for share in known if share > target)
    low = known[known.index(high) - 1]
    along = (target - low) / (high - low)
    pairs = zip(astuple(RELEASED[low]), astuple(RELEASED[high]), strict=True)
    return Settings(*((1 - along) * a + along * b for a, b in pairs))


def stage_layers(depth: int) -> tuple[int, int]:
    """The decoder layers before which tokens are dropped: the published depth fractions, distinct, at least 1."""
    first, second = (max(1, round(layer * depth / PUBLISHED_DEPTH)) for layer in PUBLISHED_LAYERS)
    return first, max(first + 1, second)


def mean_retention(first: float, second: float | Shares, last: float, layers: Layers, depth: int) -> float:
    """Mean over `depth` layers of the share of tokens that a layer processes, from the ratios of the stages; second:
    of every stage but the last one, or of each of them."""
    return first * _spent([*shares_of(second, layers), last], layers, depth) / depth


def last_ratio(target: float, first: float, second: float | Shares, layers: Layers, depth: int) -> float:
    """The last stage's ratio with which `mean_retention` is `target`; not above 0 where none is, and above 1 where
    even dropping nothing there keeps less."""
    shares = shares_of(second, layers)
    rest = depth * target - first * _spent([*shares, 0.0], layers, depth)
    return rest / (first * math.prod(shares) * (depth - layers[-1]))


def shares_of(second: float | Shares, layers: Layers) -> Shares:
    """The ratios of all stages but the last."""
    return second if isinstance(second, tuple) else (second,) * (len(layers) - 1)


def _spent(shares: Sequence[float], layers: Layers, depth: int) -> float:
    """The sum over layers of the share that each processes of what enters the decoder."""
    alive, total = 1.0, float(layers[0])
    for share, (start, end) in zip(shares, itertools.pairwise([*layers, depth]), strict=True):
        alive *= share
        total += alive * (end - start)
    return total


def released_count(tokens: int, ratio: float) -> int:
    """Tokens left of `tokens` as the released code rounds: what is dropped is round(tokens * (1 - ratio))."""
    return tokens - round(tokens * (1 - ratio))


def stage_counts(
    tokens: int,
    budget: int,
    first: float,
    second: float | Shares,
    layers: Layers,
    depth: int,
    *,
    fill: bool = False,
) -> tuple[int, ...]:
    """Tokens that enter the decoder and that each stage leaves, each at least 1; their mean over the layers is
    at most `budget` and within a token of it, where the ratios can reach it.

    first, second: ratios of the tokens, as in `mean_retention`. Where rounding alone leaves nothing for the last
    layers, earlier stages keep fewer. fill: the stages before the last keep more where that one, keeping all, would
    keep less than asked.
    """
    lengths = [end - start for start, end in itertools.pairwise([0, *layers, depth])]
    counts = [min(tokens, max(1, round(first * tokens)))]
    for share in shares_of(second, layers):
        counts.append(min(counts[-1], max(1, round(share * counts[-1]))))

    def rest(before: Sequence[int]) -> int:
        left = depth * budget - sum(n * length for n, length in zip(before, lengths, strict=False))
        return left // sum(lengths[len(before) :])

    while rest(counts) < 1:
        # The latest stage that has tokens to spare gives one up.
        place = max(stage for stage, count in enumerate(counts) if count > 1)
        counts[place] -= 1
    if fill and rest(counts) > counts[-1]:
        for place in range(1, len(counts)):
            counts[place] = min(counts[place - 1], max(counts[place], rest(counts[:place])))
    return (*counts, min(counts[-1], rest(counts)))


@dataclass(frozen=True)
class Schedule:
    """A keep with what was set by hand of its settings, on a decoder.

    first, second, threshold, cell: as in `Settings`, None for the authors';
    second: of all stages but the last, or of each of them; layers: those before which tokens drop out, of `depth`;
    released: round as the released code does.
    """

    keep: int | float
    first: float | None
    second: float | Shares | None
    threshold: float | None
    cell: float | None
    layers: Layers
    depth: int
    released: bool

    def target(self, tokens: int) -> float:
        """The share to keep of an image of `tokens`."""
        return self.keep if isinstance(self.keep, float) else min(1.0, self.keep / tokens)

    def settings(self, target: float) -> Settings:
        """What holds at a mean share of `target`; `second` of the first stage, where each has its own."""
        second = self.second[0] if isinstance(self.second, tuple) and self.second else self.second
        given = (self.first, None if isinstance(second, tuple) else second, self.threshold, self.cell)
        known = astuple(released_settings(target))
        return Settings(*(b if a is None else a for a, b in zip(given, known, strict=True)))

    def shares(self, target: float) -> Shares:
        """The ratios of all stages but the last at a mean share of `target`."""
        return shares_of(self.settings(target).second if self.second is None else self.second, self.layers)

    def entering(self, target: float) -> float:
        """The share of all tokens that enters the decoder at a mean share of `target`."""
        return min(1.0, self.settings(target).first * target)

    def last(self, target: float) -> float:
        """The share that goes on at the last of `layers`; raises VTPruneError where none meets `target`."""
        first, entering, shares = self.settings(target).first, self.entering(target), self.shares(target)
        ratio = last_ratio(target, entering, second=shares, layers=self.layers, depth=self.depth)
        if ratio <= 0:
            second = (
                "" if not shares else f" and second={', '.join(f'{share:.4g}' for share in dict.fromkeys(shares))}"
            )
            raise VTPruneError(
                f"vflowopt: first={first:.4g}{second} use up a mean of {target:.4g} over {self.depth} layers before "
                f"layer {self.layers[-1]}; lower first{' or second' * bool(shares)}, or raise keep"
            )
        return min(1.0, ratio)

    def counts(self, tokens: int) -> tuple[int, ...]:
        """Tokens of an image of `tokens` that enter the decoder, and that each of its stages leaves."""
        budget, target = budget_of(self.keep, tokens), self.target(tokens)
        if budget >= tokens:
            return (tokens,) * (1 + len(self.layers))
        last, share, shares = self.last(target), self.entering(target), self.shares(target)
        if self.released:
            found = [max(1, released_count(tokens, share))]
            for ratio in (*shares, last):
                found.append(max(1, released_count(found[-1], ratio)))
            return tuple(found)
        return stage_counts(
            tokens, budget, first=share, second=shares, layers=self.layers, depth=self.depth, fill=self.second is None
        )

    def left(self, alive: int, tokens: int, stage: int) -> int:
        """Tokens that a stage leaves of `alive`, as released: of those that are there, not of all."""
        if budget_of(self.keep, tokens) >= tokens:
            return alive
        target = self.target(tokens)
        return max(1, released_count(alive, (*self.shares(target), self.last(target))[stage]))
