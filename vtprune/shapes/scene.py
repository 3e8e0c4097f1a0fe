"""Scenes: what stands where. A scene is a function of (split, seed, index) and of nothing else."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import numpy as np

SIZE = 96
COLORS = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("circle", "square", "triangle", "diamond", "cross")
GLYPHS = tuple("123456789acehktx")
# Each split draws from its own seed space, so an evaluation scene cannot be met in training.
SPLITS = {"train": 11, "val": 23, "eval": 37}

MAX_THINGS = 6
MIN_RADIUS, MAX_RADIUS = 9, 13
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
    """Things on a grey ground, perhaps with one glyph printed on the ground itself."""

    things: tuple[Thing, ...]
    ground: int
    texture: int
    loose: Glyph | None = None

    def key(self) -> str:
        """The layout alone (no texture): two scenes with one key would be the same picture but for noise."""
        layout = [sorted(str(thing) for thing in self.things), str(self.loose)]
        return json.dumps(layout)

    def to_json(self) -> str:
        """The scene as JSON, for readers of the evaluation set."""
        return json.dumps(asdict(self), separators=(",", ":"))


def glyph_drop(shape: str, radius: int) -> int:
    """How far below a thing's centre its glyph is printed: triangles are narrow at the top."""
    return round(0.22 * radius) if shape == "triangle" else 0


def scene_rng(split: str, seed: int, index: int, stream: int = 0) -> np.random.Generator:
    """The random generator of one scene; stream 0 draws the scene, others its questions."""
    return np.random.default_rng([SPLITS[split], seed, index, stream])


def make_scene(split: str, seed: int, index: int) -> Scene:
    """The scene with this index in this split."""
    return sample_scene(scene_rng(split, seed, index))


def sample_scene(rng: np.random.Generator) -> Scene:
    """Draw one scene: one to six things that stand apart."""
    count = int(rng.choice(MAX_THINGS, p=np.array([1, 2, 3, 4, 4, 4]) / 18)) + 1
    colors, shapes = _palette(rng, COLORS), _palette(rng, SHAPES)
    glyphs = rng.permutation(len(GLYPHS))
    while True:
        things: list[Thing] = []
        for i in range(count):
            color, shape = colors[rng.integers(len(colors))], shapes[rng.integers(len(shapes))]
            glyph = GLYPHS[glyphs[i]] if rng.random() < GLYPH_CHANCE else None
            thing = _place(rng, (color, shape), glyph, things)
            if thing is None:
                break  # no room is left: start again
            things.append(thing)
        else:
            break
    loose = None
    if rng.random() < LOOSE_GLYPH_CHANCE:
        loose = _place_loose(rng, things, GLYPHS[glyphs[-1]])
    return Scene(tuple(things), int(rng.integers(25, 110)), int(rng.integers(2**31)), loose)


def _palette(rng: np.random.Generator, names: tuple[str, ...]) -> list[str]:
    """All names, or half of the time two or three of them, so that counts above one are common."""
    if rng.random() < 0.5:
        return list(names)
    chosen = rng.permutation(len(names))[: rng.integers(2, 4)]
    return [names[i] for i in chosen]


def _into_cell(x: int, y: int) -> tuple[int, int]:
    """The nearest centre at which a glyph does not cross a border of the grid."""
    return x - x % CELL + min(max(x % CELL, 2), 5), y - y % CELL + min(max(y % CELL, 3), 4)


def _place(rng: np.random.Generator, look: tuple[str, str], glyph: str | None, others: list[Thing]) -> Thing | None:
    """A thing inside the image and apart from the others, or None where there seems to be no room."""
    color, shape = look
    for _ in range(60):
        radius = int(rng.integers(MIN_RADIUS, MAX_RADIUS + 1))
        x, y = (int(v) for v in rng.integers(radius + 1, SIZE - radius - 1, size=2))
        if glyph is not None:
            drop = glyph_drop(shape, radius)
            x, y = _into_cell(x, y + drop)
            y -= drop
        inside = radius < min(x, y) and max(x, y) < SIZE - radius - 1
        if inside and all((x - o.x) ** 2 + (y - o.y) ** 2 > (radius + o.radius + 2) ** 2 for o in others):
            return Thing(color, shape, x, y, radius=radius, glyph=glyph)
    return None


def _place_loose(rng: np.random.Generator, things: list[Thing], char: str) -> Glyph | None:
    """A glyph on bare ground, or None where no free place was found."""
    for _ in range(30):
        x, y = _into_cell(*(int(v) for v in rng.integers(6, SIZE - 6, size=2)))
        if all((x - t.x) ** 2 + (y - t.y) ** 2 > (t.radius + 7) ** 2 for t in things):
            return Glyph(char, x, y)
    return None
