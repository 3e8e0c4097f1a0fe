"""Two pictures in one prompt: which of them, and what in the second."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

from vtprune.shapes.questions import QA, pick
from vtprune.shapes.scene import COLORS, Scene

ORDINALS = ("first", "second")
Pair = tuple[Scene, Scene]


def _which(pair: Pair, rng: np.random.Generator) -> QA | None:
    names = [{thing.name for thing in scene.things} for scene in pair]
    right = int(rng.integers(2))
    only = sorted(names[right] - names[1 - right])
    if not only:
        return None
    return QA(f"in which picture is a {pick(rng, only)}?", ORDINALS[right], "two_pictures", "pair_which")


def _more(pair: Pair, rng: np.random.Generator) -> QA | None:
    first, second = (len(scene.things) for scene in pair)
    if first == second:
        return None
    return QA("which picture has more shapes?", ORDINALS[second > first], "two_pictures", "pair_more")


def _color(pair: Pair, rng: np.random.Generator) -> QA | None:
    which = int(rng.integers(2))
    counts = [Counter(thing.shape for thing in scene.things) for scene in pair]
    single = [thing for thing in pair[which].things if counts[which][thing.shape] == 1]
    if not single:
        return None
    # A shape that the other picture has, too, in another colour, is answered rightly only from the right picture.
    others = {(thing.shape, thing.color) for thing in pair[1 - which].things}
    hard = [t for t in single if any(shape == t.shape and color != t.color for shape, color in others)]
    thing = pick(rng, hard or single)
    question = f"what color is the {thing.shape} in the {ORDINALS[which]} picture?"
    return QA(question, thing.color, "two_pictures", "pair_color")


PAIR_FORMS: dict[str, tuple[Callable[[Pair, np.random.Generator], QA | None], tuple[str, ...]]] = {
    "pair_which": (_which, ORDINALS),
    "pair_more": (_more, ORDINALS),
    "pair_color": (_color, COLORS),
}
