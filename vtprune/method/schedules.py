"""Keep ratios by decoder layer: how one budget is spread over the depth. Pure functions, shared by all staged methods.

A schedule is a tuple with one ratio a decoder layer: the share of an image's tokens that the layer processes. It
never rises (what is dropped stays dropped), and its mean over the layers is the budget. schedules.md shows them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from vtprune.errors import VTPruneError

Ratios = tuple[float, ...]

# What counts are rounded down with, so that a product like 0.1 * 30 is 3.
ROUNDING = 1e-6
# p-MoD's shifted cosine: the ratio above which a layer is left whole, and the lowest one.
HIGHEST, LOWEST = 0.85, 0.15


def constant(depth: int, layers: Sequence[int], keep: float) -> Ratios:
    """One drop before layer `layers[0]`, as FastV makes it."""
    start = layers[0]
    ratio = (keep * depth - start) / (depth - start)
    _check_reach("constant", depth, layers=layers, keep=keep, least=start / depth)
    return (1.0,) * start + (min(1.0, ratio),) * (depth - start)


def factor_steps(depth: int, layers: Sequence[int], factor: float) -> Ratios:
    """The ratio is multiplied by `factor` before each of `layers` (PyramidDrop's lambda)."""
    return tuple(factor ** sum(start <= layer for start in layers) for layer in range(depth))


def steps(depth: int, layers: Sequence[int], keep: float) -> Ratios:
    """A pyramid: the same factor before each of `layers`."""
    _check_reach("steps", depth, layers=layers, keep=keep, least=layers[0] / depth)
    return _largest(lambda factor: factor_steps(depth, layers, factor), keep)


def stage_ratios(depth: int, layers: Sequence[int], shares: Sequence[float]) -> Ratios:
    """Everything before `layers[0]`, `shares[i]` from `layers[i]` on; the last share where there are more layers."""
    passed = (sum(start <= layer for start in layers) for layer in range(depth))
    return tuple(shares[min(stages, len(shares)) - 1] if stages else 1.0 for stages in passed)


def between(depth: int, layers: Sequence[int], keep: float, known: Sequence[Sequence[float]]) -> Ratios:
    """The ratios between those of known settings, or between them and everything or nothing, whose mean is `keep`.

    known: the shares of each setting as `stage_ratios` takes them, the one that keeps the most first.
    """
    if keep >= 1:
        return (1.0,) * depth
    _check_reach("published", depth, layers=layers, keep=keep, least=layers[0] / depth)
    stages = range(len(known[0]))
    settings = [[0.0 for _ in stages], *reversed(known), [1.0 for _ in stages]]

    def mixed(along: float) -> Ratios:
        place = along * (len(settings) - 1)
        first = min(int(place), len(settings) - 2)
        low, high = settings[first], settings[first + 1]
        return stage_ratios(depth, layers, [a + (place - first) * (b - a) for a, b in zip(low, high, strict=True)])

    return _largest(mixed, keep)


def linear(depth: int, layers: Sequence[int], keep: float) -> Ratios:
    """A straight fall from layer `layers[0]` on, at the lowest to a quarter of what these layers keep on average."""
    start = layers[0]
    _check_reach("linear", depth, layers=layers, keep=keep, least=start / depth)
    floor = (keep * depth - start) / (depth - start) / 4

    def falling(end: float) -> Ratios:
        # The slope goes from infinitely steep (0) to flat (1).
        slope = (1 - end) / max(end, 1e-9)
        fall = (1 - slope * max(0, layer - start + 1) / (depth - start) for layer in range(depth))
        return tuple(max(floor, ratio) for ratio in fall)

    return _largest(falling, keep)


def cosine_ratios(depth: int, shift: float, highest: float = HIGHEST, lowest: float = LOWEST) -> Ratios:
    """p-MoD's progressive ratio decay (arXiv 2412.04449): 0.5 cos(pi l / (depth - 1)) + shift, at least `lowest`; a
    layer at which it is above `highest` is left whole."""
    return _capped(
        [0.5 * math.cos(math.pi * layer / max(1, depth - 1)) + shift for layer in range(depth)], highest, lowest
    )


def line_ratios(depth: int, shift: float, highest: float = HIGHEST, lowest: float = LOWEST) -> Ratios:
    """The same with a straight line, 0.5 - l / (depth - 1) + shift."""
    return _capped([0.5 - layer / max(1, depth - 1) + shift for layer in range(depth)], highest, lowest)


def _capped(values: Sequence[float], highest: float, lowest: float) -> Ratios:
    return tuple(1.0 if value > highest else max(value, lowest) for value in values)


def shifted_cosine(depth: int, layers: Sequence[int], keep: float) -> Ratios:
    """The cosine with the shift that meets `keep`, whole before layer `layers[0]`; its floor is p-MoD's, or half of
    `keep` where that is lower."""
    start = layers[0]
    _check_reach("shifted_cosine", depth, layers=layers, keep=keep, least=start / depth)

    def shifted(along: float) -> Ratios:
        # 0 .. 1 is a shift of -0.5 (nothing but the floor) to 1.5 (everything).
        ratios = cosine_ratios(depth, 2 * along - 0.5, lowest=min(LOWEST, keep / 2) * min(1.0, 4 * along))
        return (1.0,) * start + ratios[start:]

    return _largest(shifted, keep)


# From a depth, the layers before which tokens may drop, and the mean to keep, to a ratio a layer.
SCHEDULES: dict[str, Callable[[int, Sequence[int], float], Ratios]] = {
    "constant": constant,
    "steps": steps,
    "linear": linear,
    "shifted_cosine": shifted_cosine,
}
# Those that take no more than one layer: where they start.
FROM_ONE_LAYER = ("constant", "linear", "shifted_cosine")
# Those of them that drop before every layer from there on.
EVERY_LAYER = ("linear", "shifted_cosine")
# Decided while the model runs: `entropy_count`, within the budget of the steps.
ENTROPY = "entropy"
NAMES = (*SCHEDULES, ENTROPY)


def fitted(name: str, depth: int, layers: Sequence[int], keep: float) -> Ratios:
    """The ratios of schedule `name` whose mean is `keep`.

    layers: those before which tokens may drop (the first of them, for schedules that fall at every layer). Raises
    VTPruneError for an unknown name, for layers that the decoder does not have, and for a `keep` out of reach.
    """
    if name not in NAMES:
        raise VTPruneError(f"schedule is one of {', '.join(NAMES)}, got {name!r}")
    check_layers(layers, depth)
    if keep >= 1:
        return (1.0,) * depth
    return SCHEDULES["steps" if name == ENTROPY else name](depth, layers, keep)


def check_layers(layers: Sequence[int], depth: int) -> None:
    """Raises VTPruneError unless `layers` rise from 1 or later to at most `depth - 1`."""
    if depth < 2:
        raise VTPruneError(f"tokens drop between decoder layers, so it needs at least 2 of them, got {depth}")
    rising = all(type(layer) is int for layer in layers) and list(layers) == sorted(set(layers))
    if not layers or not rising or layers[0] < 1:
        raise VTPruneError(
            f"the decoder layers before which tokens drop are rising ints of at least 1, got {tuple(layers)!r}"
        )
    if layers[-1] >= depth:
        raise VTPruneError(
            f"tokens drop before decoder layer {layers[-1]} (counted from 0), so it needs at least {layers[-1] + 1} "
            f"decoder layers, got {depth}"
        )


def check_ratios(ratios: Sequence[float]) -> None:
    """Raises VTPruneError unless all ratios are in [0, 1] and none is above the one before it."""
    for layer, ratio in enumerate(ratios):
        if not 0 <= ratio <= 1:
            raise VTPruneError(f"a schedule's ratios lie in 0 .. 1, got {ratio!r} at layer {layer}")
        if layer and ratio > ratios[layer - 1]:
            raise VTPruneError(
                f"a schedule cannot rise, since a dropped token does not come back: {ratios[layer - 1]!r} at layer "
                f"{layer - 1}, {ratio!r} at layer {layer}"
            )


def mean(ratios: Sequence[float]) -> float:
    """The share that a layer processes, on average."""
    return sum(ratios) / len(ratios)


def counts(ratios: Sequence[float], tokens: int, budget: int | None = None) -> tuple[int, ...]:
    """Tokens of an image of `tokens` that each layer processes: rounded down, at least 1.

    budget: what their mean may be at the most; the ratios of layers that are not whole are scaled together until
    rounding spends as much of it as it can. Raises VTPruneError where even one token a layer is too much.
    """

    def scaled(scale: float) -> tuple[int, ...]:
        shares = (ratio if ratio == 1 else min(1.0, ratio * scale) for ratio in ratios)
        return tuple(max(1, math.floor(share * tokens + ROUNDING)) for share in shares)

    if budget is None:
        return scaled(1.0)
    fewest = sum(scaled(0.0))
    if fewest > budget * len(ratios):
        raise VTPruneError(
            f"an image of {tokens} tokens cannot be cut to a mean of {budget}: the layers before the first drop, and "
            f"one token in each of the others, make {fewest / len(ratios):.4g}; raise keep, or drop earlier (layers)"
        )
    low, high = 0.0, 2.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(scaled(middle)) <= budget * len(ratios) else (low, middle)
    return scaled(low)


def even_count(alive: int, lengths: Sequence[int], left: int) -> int:
    """How many of `alive` tokens the next stage keeps where `left` tokens x layers are to be spent, in equal steps,
    over stages of these `lengths`; at least 1."""

    def spent(factor: float) -> float:
        return sum(alive * factor ** (stage + 1) * length for stage, length in enumerate(lengths))

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) <= left else (low, middle)
    return max(1, math.floor(alive * low + ROUNDING))


def reserve(alive: int, even: int, lengths: Sequence[int]) -> int:
    """Tokens x layers that the next stage leaves to those after it: half of what they would keep if all kept the
    share `even` of `alive`, and at least one token in each layer."""
    shares = ((even / alive) ** stage for stage in range(1, len(lengths)))
    return sum(length * max(1, math.ceil(even * share / 2)) for length, share in zip(lengths[1:], shares, strict=True))


def entropy_count(scores: Sequence[float], cap: int) -> int:
    """How many tokens an entropy-driven stage keeps: the effective number of tokens that the attention is spread
    over, exp(-sum p ln p) of the scores' shares p, from half of `cap` to twice it.

    cap: what would spend the budget evenly. Scores are not negative.
    """
    whole = sum(scores)
    shares = [score / whole for score in scores] if whole > 0 else [1.0]
    effective = math.exp(-sum(share * math.log(share) for share in shares if share > 0))
    return max(1, min(2 * cap, max(math.ceil(cap / 2), round(effective))))


def _largest(make: Callable[[float], Ratios], keep: float) -> Ratios:
    """The ratios of the x in [0, 1] whose mean is `keep`; the mean rises with x, and where it jumps over `keep` the
    ratios are between those on either side."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(make(middle)) <= keep else (low, middle)
    below, above = make(low), make(high)
    jump = mean(above) - mean(below)
    part = (keep - mean(below)) / jump if jump > 1e-9 else 0.0
    return tuple(a + part * (b - a) for a, b in zip(below, above, strict=True))


def _check_reach(name: str, depth: int, layers: Sequence[int], keep: float, least: float) -> None:
    if keep > least:
        return
    raise VTPruneError(
        f"schedule {name!r} cannot keep {keep:.4g} of the tokens on average: the {layers[0]} of {depth} layers before "
        f"the first drop alone make {least:.4g}; raise keep, or drop earlier (layers), or combine with a method that "
        "prunes before the decoder"
    )
