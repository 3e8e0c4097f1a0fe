"""Four forms of one question: yes or no, a choice of two, a short answer, and a description that has to hold it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from vtprune.shapes.describing import read_description, words_of
from vtprune.shapes.questions import QA, QUADRANTS, pick, quadrant, unique
from vtprune.shapes.scene import COLORS, GLYPHS, SHAPES, Scene, Thing

FORMS_OF_ONE = ("yes_no", "choice", "short", "describe_one")
# What a fact is about, and where it stands in what a description tells.
FACTS = {"color": 0, "shape": 1, "glyph": 2, "place": 3}
CHOICES = {"color": COLORS, "shape": SHAPES, "glyph": GLYPHS, "place": QUADRANTS}


@dataclass(frozen=True)
class Fact:
    """One thing's colour, shape, glyph or place: what is asked (`subject`), what is true, and what is not.

    thing: the whole description of it.
    """

    kind: str
    subject: str
    truth: str
    other: str
    thing: str


def _subjects(scene: Scene, kind: str) -> list[tuple[Thing, str, str]]:
    """(thing, how a question names it, the true answer) for everything that can be asked without doubt."""
    colors = Counter(thing.color for thing in scene.things)
    shapes = Counter(thing.shape for thing in scene.things)
    if kind == "color":
        return [(t, f"the {t.shape}", t.color) for t in scene.things if shapes[t.shape] == 1]
    if kind == "shape":
        return [(t, f"the {t.color} shape", t.shape) for t in scene.things if colors[t.color] == 1]
    if kind == "glyph":
        return [(t, f"the {t.name}", t.glyph) for t in unique(scene) if t.glyph is not None]
    return [(t, f"the {t.name}", place) for t in unique(scene) if (place := quadrant(scene, t)) is not None]


def _wrong(scene: Scene, kind: str, truth: str, rng: np.random.Generator) -> str:
    """A wrong answer, half of the time one that is true of another thing of the picture."""
    told = [
        {"color": thing.color, "shape": thing.shape, "glyph": thing.glyph, "place": quadrant(scene, thing)}
        for thing in scene.things
    ]
    others = {thing[kind] for thing in told}
    near = [word for word in CHOICES[kind] if word in others and word != truth]
    return pick(rng, near if near and rng.random() < 0.5 else [word for word in CHOICES[kind] if word != truth])


def draw_fact(scene: Scene, rng: np.random.Generator, kind: str) -> Fact | None:
    """A fact of this kind, or None where the scene has none that can be asked without doubt."""
    found = _subjects(scene, kind)
    if not found:
        return None
    thing, subject, truth = pick(rng, found)
    other = _wrong(scene, kind, truth, rng)
    return Fact(kind, subject, truth, other, thing=" ".join(words_of(scene, thing)))


def _yes_no(fact: Fact, value: str) -> str:
    return {
        "color": f"is {fact.subject} {value}?",
        "shape": f"is {fact.subject} a {value}?",
        "glyph": f"is {value} written on {fact.subject}?",
        "place": f"is {fact.subject} at the {value}?",
    }[fact.kind]


def _short(fact: Fact) -> str:
    return {
        "color": f"what color is {fact.subject}?",
        "shape": f"which shape is {fact.subject.split()[1]}?",
        "glyph": f"what is written on {fact.subject}?",
        "place": f"where is {fact.subject}?",
    }[fact.kind]


def ask_fact(fact: Fact, form: str, rng: np.random.Generator) -> QA:
    """One form of a fact's question; a yes-or-no one is asked of the truth half of the time."""
    if form == "yes_no":
        true = rng.random() < 0.5
        question, answer = _yes_no(fact, fact.truth if true else fact.other), "yes" if true else "no"
    elif form == "choice":
        pair = [fact.truth, fact.other]
        first, second = pair if rng.random() < 0.5 else pair[::-1]
        question, answer = _yes_no(fact, f"{first} or {second}"), fact.truth
    elif form == "short":
        question, answer = _short(fact), fact.truth
    else:
        question, answer = f"describe {fact.subject}", fact.thing
    return QA(question, answer, form, fact.kind)


def says_fact(answer: str, truth: str, kind: str) -> bool:
    """Whether a description of one thing tells the fact of this kind as the true one does."""
    told, wanted = read_description(answer), read_description(truth)
    place = FACTS[kind]
    return len(told) == 1 and told[0][place] == wanted[0][place]
