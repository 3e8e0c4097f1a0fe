"""Long answers: everything that a picture shows, thing by thing, and how much of it an answer got right."""

from __future__ import annotations

import re
from collections import Counter

from vtprune.shapes.questions import QA, QUADRANTS, quadrant
from vtprune.shapes.scene import COLORS, GLYPHS, SHAPES, Scene, Thing

DESCRIBE = "what shapes are there?"
SIDES = {side for place in QUADRANTS for side in place.split()}

# A thing as an answer tells it: colour, shape, glyph and place, "" for what it does not say.
Told = tuple[str, str, str, str]


def words_of(scene: Scene, thing: Thing) -> list[str]:
    """Colour, shape, glyph if any, place if clear."""
    return [part for part in (thing.color, thing.shape, thing.glyph, quadrant(scene, thing)) if part is not None]


def describe(scene: Scene) -> str:
    """All things from left to right."""
    things = sorted(scene.things, key=lambda thing: (thing.x, thing.y))
    return " ".join(word for thing in things for word in words_of(scene, thing))


def read_description(text: str) -> list[Told]:
    """The things that an answer tells, their words in any order; a second colour or shape begins the next thing."""
    things: list[dict[str, str]] = []
    for word in re.findall(r"\w+", text.lower()):
        kind = _kind(word)
        if kind is None:
            continue
        starts = kind in ("color", "shape") and (not things or kind in things[-1] or "rest" in things[-1])
        if starts or not things:
            things.append({})
        if kind == "side":
            things[-1]["place"] = f"{things[-1].get('place', '')} {word}".strip()
        else:
            things[-1][kind] = word
        if kind in ("glyph", "side"):
            things[-1]["rest"] = word
    return [(t.get("color", ""), t.get("shape", ""), t.get("glyph", ""), t.get("place", "")) for t in things]


def _kind(word: str) -> str | None:
    kinds = {"color": COLORS, "shape": SHAPES, "glyph": GLYPHS, "side": SIDES}
    return next((kind for kind, words in kinds.items() if word in words), None)


def description_score(answer: str, truth: str) -> float:
    """F1 of the things told, each right only if colour, shape, glyph and place are; their order does not matter."""
    told, wanted = Counter(read_description(answer)), Counter(read_description(truth))
    return 2 * (told & wanted).total() / (told.total() + wanted.total())


def ask_description(scene: Scene) -> QA:
    """List everything."""
    return QA(DESCRIBE, describe(scene), "description", "describe")
