"""Questions about a scene, with answers of one or two words in five categories."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from vtprune.shapes.scene import (
    COLORS,
    GLYPHS,
    SHAPES,
    Scene,
    Thing,
)

T = TypeVar("T")

# Positions are asked only where they are clear: the margins are in pixels between centres.
QUADRANT_MARGIN = 8
EXTREME_MARGIN = 8
RELATION_MARGIN = 12
MAX_COUNT = 4

PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}
EXTREMES: dict[str, Callable[[Thing], int]] = {
    "leftmost": lambda thing: -thing.x,
    "rightmost": lambda thing: thing.x,
    "topmost": lambda thing: -thing.y,
    "bottommost": lambda thing: thing.y,
}
RELATIONS: dict[str, Callable[[Thing, Thing], int]] = {
    "left of": lambda a, b: b.x - a.x,
    "right of": lambda a, b: a.x - b.x,
    "above": lambda a, b: b.y - a.y,
    "below": lambda a, b: a.y - b.y,
}


@dataclass(frozen=True)
class QA:
    """One question; `form` names the template, which is what a blind answerer could go by."""

    question: str
    answer: str
    category: str
    form: str


def normalise(text: str) -> str:
    """What exact match compares."""
    return text.strip().lower()


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    """One of these, each as likely."""
    return items[int(rng.integers(len(items)))]


def unique(scene: Scene) -> list[Thing]:
    """Things whose colour and shape together single them out."""
    names = Counter(thing.name for thing in scene.things)
    return [thing for thing in scene.things if names[thing.name] == 1]


def _exists(scene: Scene, rng: np.random.Generator) -> QA | None:
    present = {(thing.color, thing.shape) for thing in scene.things}
    colors, shapes = {c for c, _ in present}, {s for _, s in present}
    absent = [(c, s) for c in COLORS for s in SHAPES if (c, s) not in present]
    # Hard negatives hold both words' properties, on two things: they need binding, not recognition.
    hard = [(c, s) for c, s in absent if c in colors and s in shapes]
    if rng.random() < 0.5:
        pair, answer = pick(rng, sorted(present)), "yes"
    else:
        pair, answer = pick(rng, hard if hard and rng.random() < 0.5 else absent), "no"
    return QA(f"is there a {pair[0]} {pair[1]}?", answer, "existence", "exists")


def _count_all(scene: Scene, rng: np.random.Generator) -> QA | None:
    return QA("how many shapes are there?", str(len(scene.things)), "counting", "count_all")


def _count_some(scene: Scene, rng: np.random.Generator) -> QA | None:
    colors = Counter(thing.color for thing in scene.things)
    shapes = Counter(thing.shape for thing in scene.things)
    options = [(f"how many {c} shapes are there?", colors[c]) for c in COLORS]
    options += [(f"how many {PLURALS[s]} are there?", shapes[s]) for s in SHAPES]
    # The count is drawn before the question: drawn the other way round, most answers would be 0 or 1.
    count = pick(rng, sorted({n for _, n in options if n <= MAX_COUNT}))
    question = pick(rng, [q for q, n in options if n == count])
    return QA(question, str(count), "counting", "count_some")


def _color(scene: Scene, rng: np.random.Generator) -> QA | None:
    shapes = Counter(thing.shape for thing in scene.things)
    single = [thing for thing in scene.things if shapes[thing.shape] == 1]
    if not single:
        return None
    thing = pick(rng, single)
    return QA(f"what color is the {thing.shape}?", thing.color, "attribute", "color")


def _shape(scene: Scene, rng: np.random.Generator) -> QA | None:
    colors = Counter(thing.color for thing in scene.things)
    single = [thing for thing in scene.things if colors[thing.color] == 1]
    if not single:
        return None
    thing = pick(rng, single)
    return QA(f"which shape is {thing.color}?", thing.shape, "attribute", "shape")


def quadrant(scene: Scene, thing: Thing) -> str | None:
    """Such as "top left", or None where the thing is too near a middle line to say."""
    x, y = thing.x - scene.width // 2, thing.y - scene.height // 2
    if min(abs(x), abs(y)) < QUADRANT_MARGIN:
        return None
    return f"{'top' if y < 0 else 'bottom'} {'left' if x < 0 else 'right'}"


def _where(scene: Scene, rng: np.random.Generator) -> QA | None:
    clear = [(thing, place) for thing in unique(scene) if (place := quadrant(scene, thing)) is not None]
    if not clear:
        return None
    thing, place = pick(rng, clear)
    return QA(f"where is the {thing.name}?", place, "position", "where")


def _extreme(scene: Scene, rng: np.random.Generator) -> tuple[str, Thing] | None:
    """A direction in which one thing clearly goes furthest, and that thing."""
    found = []
    for word, reach in EXTREMES.items():
        order = sorted(scene.things, key=reach)
        if len(order) > 1 and reach(order[-1]) - reach(order[-2]) >= EXTREME_MARGIN:
            found.append((word, order[-1]))
    return pick(rng, found) if found else None


def _extreme_color(scene: Scene, rng: np.random.Generator) -> QA | None:
    found = _extreme(scene, rng)
    if found is None:
        return None
    return QA(f"what color is the {found[0]} shape?", found[1].color, "position", "extreme_color")


def _extreme_shape(scene: Scene, rng: np.random.Generator) -> QA | None:
    found = _extreme(scene, rng)
    if found is None:
        return None
    return QA(f"which shape is {found[0]}?", found[1].shape, "position", "extreme_shape")


def _relation(scene: Scene, rng: np.random.Generator) -> QA | None:
    things = unique(scene)
    word = pick(rng, sorted(RELATIONS))
    gap = RELATIONS[word]
    wanted = 1 if rng.random() < 0.5 else -1
    pairs = [(a, b) for a in things for b in things if gap(a, b) * wanted >= RELATION_MARGIN]
    if not pairs:
        return None
    a, b = pick(rng, pairs)
    answer = "yes" if wanted > 0 else "no"
    return QA(f"is the {a.name} {word} the {b.name}?", answer, "position", "relation")


def _read_thing(scene: Scene, rng: np.random.Generator) -> QA | None:
    marked = [(thing, thing.glyph) for thing in unique(scene) if thing.glyph is not None]
    if not marked:
        return None
    thing, glyph = pick(rng, marked)
    return QA(f"what is written on the {thing.name}?", glyph, "reading", "read_thing")


def _read_ground(scene: Scene, rng: np.random.Generator) -> QA | None:
    if scene.loose is None:
        return None
    return QA("what is written on the ground?", scene.loose.char, "reading", "read_ground")


def _marked_color(scene: Scene, rng: np.random.Generator) -> QA | None:
    marked = [thing for thing in scene.things if thing.glyph is not None]
    if len(marked) < 2:  # with one glyph the question could be answered without reading it
        return None
    thing = pick(rng, marked)
    return QA(f"what color is the shape marked {thing.glyph}?", thing.color, "reading", "marked_color")


def _marked_shape(scene: Scene, rng: np.random.Generator) -> QA | None:
    marked = [thing for thing in scene.things if thing.glyph is not None]
    if len(marked) < 2:
        return None
    thing = pick(rng, marked)
    return QA(f"which shape is marked {thing.glyph}?", thing.shape, "reading", "marked_shape")


@dataclass(frozen=True)
class Form:
    """A question template: its maker, its possible answers, and its share of its category."""

    make: Callable[[Scene, np.random.Generator], QA | None]
    answers: tuple[str, ...]
    share: float


YES_NO = ("yes", "no")
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
FORMS: dict[str, dict[str, Form]] = {
    "existence": {"exists": Form(_exists, YES_NO, 1.0)},
    "counting": {
        "count_all": Form(_count_all, tuple("123456"), 1 / 3),
        "count_some": Form(_count_some, tuple("01234"), 2 / 3),
    },
    "attribute": {"color": Form(_color, COLORS, 0.5), "shape": Form(_shape, SHAPES, 0.5)},
    "position": {
        "where": Form(_where, QUADRANTS, 1 / 3),
        "extreme_color": Form(_extreme_color, COLORS, 1 / 6),
        "extreme_shape": Form(_extreme_shape, SHAPES, 1 / 6),
        "relation": Form(_relation, YES_NO, 1 / 3),
    },
    "reading": {
        "read_thing": Form(_read_thing, GLYPHS, 0.5),
        "read_ground": Form(_read_ground, GLYPHS, 0.2),
        "marked_color": Form(_marked_color, COLORS, 0.15),
        "marked_shape": Form(_marked_shape, SHAPES, 0.15),
    },
}
CATEGORIES = tuple(FORMS)
# How often a model that learns is asked a question of each.
CATEGORY_SHARES = {"existence": 0.05, "counting": 0.2, "attribute": 0.08, "position": 0.42, "reading": 0.25}


def ask(scene: Scene, rng: np.random.Generator, category: str) -> QA | None:
    """Draw a question of a category, or None where the scene does not allow the form that was drawn."""
    forms = list(FORMS[category].values())
    pick = rng.choice(len(forms), p=[form.share for form in forms])
    return forms[pick].make(scene, rng)


def draw_questions(scene: Scene, rng: np.random.Generator, count: int) -> list[QA]:
    """Distinct questions about one scene, at most `count`."""
    names, shares = list(CATEGORY_SHARES), list(CATEGORY_SHARES.values())
    found: dict[str, QA] = {}
    for pick in rng.choice(len(names), size=2 * count, p=shares):
        qa = ask(scene, rng, names[pick])
        if qa is not None:
            found.setdefault(qa.question, qa)
    return list(found.values())[:count]


def vocabulary() -> list[str]:
    """Every word and mark that questions and answers are written in."""
    templates = """is there a how many shapes are what color the which shape where leftmost rightmost
        topmost bottommost left right of above below written on ground marked yes no top bottom ?"""
    words = [*templates.split(), *COLORS, *SHAPES, *PLURALS.values(), *GLYPHS, *"0123456"]
    return sorted(set(words))
