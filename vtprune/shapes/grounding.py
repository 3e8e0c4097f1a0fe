"""Where is it: boxes in words, and what lies at a place. It matters where tokens stand, not what they show alone."""

from __future__ import annotations

import re

import numpy as np

from vtprune.shapes.questions import QA, pick, unique
from vtprune.shapes.scene import Scene, Thing

# Places are told in so many steps across the picture and down, whatever its size.
STEPS = 24
# A box is right from this overlap on, as for referring expressions elsewhere.
RIGHT_OVERLAP = 0.5

Box = tuple[float, float, float, float]


def box_of(scene: Scene, thing: Thing) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a thing in steps, rounded outwards."""
    x, y, reach = thing.x, thing.y, thing.radius
    left, right = (x - reach) * STEPS // scene.width, -(-(x + reach + 1) * STEPS // scene.width)
    top, bottom = (y - reach) * STEPS // scene.height, -(-(y + reach + 1) * STEPS // scene.height)
    return left, top, right, bottom


def read_box(text: str) -> Box | None:
    """The box that an answer tells, None where it tells none."""
    numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", text)]
    if len(numbers) != 4 or numbers[0] >= numbers[2] or numbers[1] >= numbers[3]:
        return None
    return numbers[0], numbers[1], numbers[2], numbers[3]


def overlap(one: Box, other: Box) -> float:
    """Intersection over union."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0.0) * max(height, 0.0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return shared / (sum(areas) - shared)


def is_right_box(answer: str, truth: str) -> bool:
    """Whether an answer's box covers the true one well enough."""
    found, wanted = read_box(answer), read_box(truth)
    assert wanted is not None
    return found is not None and overlap(found, wanted) >= RIGHT_OVERLAP


def ask_box(scene: Scene, rng: np.random.Generator) -> QA | None:
    """Find a thing that its colour and shape single out."""
    things = unique(scene)
    if not things:
        return None
    thing = pick(rng, things)
    return QA(f"find the {thing.name}", " ".join(map(str, box_of(scene, thing))), "grounding", "box")


def ask_point(scene: Scene, rng: np.random.Generator) -> QA:
    """Say what lies at a place: the middle of a thing."""
    thing = pick(rng, scene.things)
    x, y = thing.x * STEPS // scene.width, thing.y * STEPS // scene.height
    return QA(f"what is at {x} {y}?", thing.name, "grounding", "point")
