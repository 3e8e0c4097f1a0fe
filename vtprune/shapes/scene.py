"""Scenes: what stands where. A scene is a function of (split, seed, index) and of nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np

# The side of a picture in pixels, where nothing else is said.
SIZE = 96
COLORS = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("circle", "square", "triangle", "diamond", "cross")
GLYPHS = tuple("123456789acehktx")
# Each split draws from its own seed space, so an evaluation scene cannot be met in training.
SPLITS = {"train": 11, "val": 23, "eval": 37}

MAX_THINGS = 6
# How often a picture holds one, two, … things; many are common.
COUNT_WEIGHTS = (1, 2, 3, 4, 4, 4)
MIN_RADIUS, MAX_RADIUS = 9, 13
PIXELS_A_THING = 1300
# A glyph (5x7 pixels) is printed inside one cell of this grid. Reading it then hangs on few vision
# tokens, on a single one where patches are of this size: the detail that pruning can lose.
CELL = 8
GLYPH_CHANCE = 0.55
LOOSE_GLYPH_CHANCE = 0.35


@dataclass(frozen=True)
class Glyph:
    """A printed digit or letter; x and y are its centre in pixels."""

    char: str
    x: int
    y: int


@dataclass(frozen=True)
class Thing:
    """One coloured shape; x and y are its centre, radius its half extent, in pixels."""

    color: str
    shape: str
    x: int
    y: int
    radius: int
    glyph: str | None = None

    @property
    def name(self) -> str:
        """What a question calls it, such as "red circle"."""
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Things on a grey ground, perhaps with one glyph printed on the ground itself; width and height in pixels."""

    things: tuple[Thing, ...]
    ground: int
    texture: int
    loose: Glyph | None = None
    width: int = SIZE
    height: int = SIZE

    def key(self) -> str:
        """The layout alone (no texture): two scenes with one key would be the same picture but for noise."""
        layout = [sorted(str(thing) for thing in self.things), str(self.loose)]
        return json.dumps(layout)

    def to_json(self) -> str:
        """The scene as JSON, for readers of the evaluation sets; a size is told where it is not the usual one."""
        values = asdict(self)
        if (self.width, self.height) == (SIZE, SIZE):
            del values["width"], values["height"]
        return json.dumps(values, separators=(",", ":"))


def glyph_drop(shape: str, radius: int) -> int:
    """How far below a thing's centre its glyph is printed: triangles are narrow at the top."""
    return round(0.22 * radius) if shape == "triangle" else 0


def scene_rng(split: str, seed: int, index: int, stream: int = 0) -> np.random.Generator:
    """The random generator of one scene; stream 0 draws the scene, others its questions."""
    return np.random.default_rng([SPLITS[split], seed, index, stream])


def make_scene(split: str, seed: int, index: int) -> Scene:
    """The scene with this index in this split."""
    return sample_scene(scene_rng(split, seed, index))


def most_things(width: int, height: int) -> int:
    """How many things find room in a picture of this size."""
    return min(MAX_THINGS, width * height // PIXELS_A_THING)


def sample_scene(rng: np.random.Generator, width: int = SIZE, height: int = SIZE) -> Scene:
    """Draw one scene: one to six things that stand apart, fewer where a small picture has no room for them."""
    weights = np.array(COUNT_WEIGHTS[: most_things(width, height)])
    count = int(rng.choice(len(weights), p=weights / weights.sum())) + 1
    colors, shapes = _palette(rng, COLORS), _palette(rng, SHAPES)
    glyphs = rng.permutation(len(GLYPHS))
    while True:
        things: list[Thing] = []
        for i in range(count):
            color, shape = colors[rng.integers(len(colors))], shapes[rng.integers(len(shapes))]
            glyph = GLYPHS[glyphs[i]] if rng.random() < GLYPH_CHANCE else None
            thing = _place(rng, (color, shape), glyph, others=things, size=(width, height))
            if thing is None:
                break  # no room is left: start again
            things.append(thing)
        else:
            break
    loose = None
    if rng.random() < LOOSE_GLYPH_CHANCE:
        loose = _place_loose(rng, things, GLYPHS[glyphs[-1]], (width, height))
    ground, texture = int(rng.integers(25, 110)), int(rng.integers(2**31))
    return Scene(tuple(things), ground, texture, loose, width=width, height=height)


def _palette(rng: np.random.Generator, names: tuple[str, ...]) -> list[str]:
    """All names, or half of the time two or three of them, so that counts above one are common."""
    if rng.random() < 0.5:
        return list(names)
    chosen = rng.permutation(len(names))[: rng.integers(2, 4)]
    return [names[i] for i in chosen]


def _into_cell(x: int, y: int) -> tuple[int, int]:
    """The nearest centre at which a glyph does not cross a border of the grid."""
    return x - x % CELL + min(max(x % CELL, 2), 5), y - y % CELL + min(max(y % CELL, 3), 4)


def _place(
    rng: np.random.Generator, look: tuple[str, str], glyph: str | None, *, others: list[Thing], size: tuple[int, int]
) -> Thing | None:
    """A thing inside the image and apart from the others, or None where there seems to be no room."""
    color, shape = look
    for _ in range(60):
        radius = int(rng.integers(MIN_RADIUS, MAX_RADIUS + 1))
        x, y = (int(rng.integers(radius + 1, side - radius - 1)) for side in size)
        if glyph is not None:
            drop = glyph_drop(shape, radius)
            x, y = _into_cell(x, y + drop)
            y -= drop
        thing = Thing(color, shape, x, y, radius=radius, glyph=glyph)
        if stands_free(thing, others, size):
            return thing
    return None


def stands_free(thing: Thing, others: Iterable[Thing], size: tuple[int, int]) -> bool:
    """Whether a thing lies whole inside a picture of this (width, height) and apart from the others."""
    x, y, radius = thing.x, thing.y, thing.radius
    inside = all(radius < place < side - radius - 1 for place, side in zip((x, y), size, strict=True))
    return inside and all((x - o.x) ** 2 + (y - o.y) ** 2 > (radius + o.radius + 2) ** 2 for o in others)


def _place_loose(rng: np.random.Generator, things: list[Thing], char: str, size: tuple[int, int]) -> Glyph | None:
    """A glyph on bare ground, or None where no free place was found."""
    for _ in range(30):
        x, y = _into_cell(*(int(rng.integers(6, side - 6)) for side in size))
        if all((x - t.x) ** 2 + (y - t.y) ** 2 > (t.radius + 7) ** 2 for t in things):
            return Glyph(char, x, y)
    return None
