"""How many tokens VFlowOpt keeps where, so that the mean over the decoder's layers is what was asked for."""

from __future__ import annotations

from dataclasses import astuple, dataclass

from vtprune.errors import VTPruneError
from vtprune.pruner import budget_of

# The decoder layers before which the authors drop tokens, and how many their decoder has.
PUBLISHED_LAYERS, PUBLISHED_DEPTH = (9, 18), 28


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


def mean_retention(first: float, second: float, last: float, layers: tuple[int, int], depth: int) -> float:
    """Mean over `depth` layers of the share of tokens that a layer processes, from the ratios of the stages."""
    start, end = layers
    return first * (start + second * (end - start + last * (depth - end))) / depth


def last_ratio(target: float, first: float, second: float, layers: tuple[int, int], depth: int) -> float:
    """The last stage's ratio with which `mean_retention` is `target`; not above 0 where none is, and above 1 where
    even dropping nothing there keeps less."""
    start, end = layers
    return (depth * target - first * (start + second * (end - start))) / (first * second * (depth - end))


def released_count(tokens: int, ratio: float) -> int:
    """Tokens left of `tokens` as the released code rounds: what is dropped is round(tokens * (1 - ratio))."""
    return tokens - round(tokens * (1 - ratio))


def stage_counts(
    tokens: int,
    budget: int,
    first: float,
    second: float,
    layers: tuple[int, int],
    depth: int,
    *,
    fill: bool = False,
) -> tuple[int, int, int]:
    """Tokens that enter the decoder and that either stage leaves, each at least 1; their mean over the layers is
    at most `budget` and within a token of it, where the ratios can reach it.

    first, second: ratios of the tokens. Where rounding alone leaves nothing for the last layers, earlier stages
    keep fewer. fill: the first stage keeps more where the last one, keeping all, would keep less than asked.
    """
    start, end = layers
    entering = min(tokens, max(1, round(first * tokens)))
    middle = min(entering, max(1, round(second * entering)))

    def rest() -> int:
        return (depth * budget - start * entering - (end - start) * middle) // (depth - end)

    while rest() < 1:
        if middle > 1:
            middle -= 1
        else:
            entering -= 1
    if fill and rest() > middle:
        middle = min(entering, max(middle, (depth * budget - start * entering) // (depth - start)))
    return entering, middle, min(middle, rest())


@dataclass(frozen=True)
class Schedule:
    """A keep with what was set by hand of its settings, on a decoder.

    first, second, threshold, cell: as in `Settings`, None for the authors';
    layers: those before which tokens drop out, of `depth`; released: round as the released code does.
    """

    keep: int | float
    first: float | None
    second: float | None
    threshold: float | None
    cell: float | None
    layers: tuple[int, int]
    depth: int
    released: bool

    def target(self, tokens: int) -> float:
        """The share to keep of an image of `tokens`."""
        return self.keep if isinstance(self.keep, float) else min(1.0, self.keep / tokens)

    def settings(self, target: float) -> Settings:
        """What holds at a mean share of `target`."""
        given = (self.first, self.second, self.threshold, self.cell)
        known = astuple(released_settings(target))
        return Settings(*(b if a is None else a for a, b in zip(given, known, strict=True)))

    def entering(self, target: float) -> float:
        """The share of all tokens that enters the decoder at a mean share of `target`."""
        return min(1.0, self.settings(target).first * target)

    def last(self, target: float) -> float:
        """The share that goes on at the second of `layers`; raises VTPruneError where none meets `target`."""
        at, entering = self.settings(target), self.entering(target)
        ratio = last_ratio(target, entering, at.second, self.layers, self.depth)
        if ratio <= 0:
            raise VTPruneError(
                f"vflowopt: first={at.first:.4g} and second={at.second:.4g} use up a mean of {target:.4g} over "
                f"{self.depth} layers before layer {self.layers[1]}; lower first or second, or raise keep"
            )
        return min(1.0, ratio)

    def counts(self, tokens: int) -> tuple[int, int, int]:
        """Tokens of an image of `tokens` that enter the decoder, and that either of its stages leaves."""
        budget, target = budget_of(self.keep, tokens), self.target(tokens)
        if budget >= tokens:
            return tokens, tokens, tokens
        at, last, share = self.settings(target), self.last(target), self.entering(target)
        if self.released:
            entering = max(1, released_count(tokens, share))
            middle = max(1, released_count(entering, at.second))
            return entering, middle, max(1, released_count(middle, last))
        fill = self.second is None
        return stage_counts(tokens, budget, share, at.second, self.layers, self.depth, fill=fill)

    def left(self, alive: int, tokens: int, stage: int) -> int:
        """Tokens that stage 0 or 1 leaves of `alive`, as released: of those that are there, not of all."""
        if budget_of(self.keep, tokens) >= tokens:
            return alive
        target = self.target(tokens)
        return max(1, released_count(alive, self.last(target) if stage else self.settings(target).second))
