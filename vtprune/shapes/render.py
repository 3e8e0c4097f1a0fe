"""Drawing scenes with numpy: masks and 5x7 bitmaps, so that no font or library changes a pixel."""

from __future__ import annotations

from functools import cache

import numpy as np

from vtprune.shapes.scene import (
    GLYPHS,
    Scene,
    glyph_drop,
)

GLYPH_HEIGHT, GLYPH_WIDTH = 7, 5
BLACK, WHITE = (10, 10, 10), (250, 250, 250)

RGB = {
    "red": (215, 45, 45),
    "green": (40, 160, 60),
    "blue": (55, 85, 225),
    "yellow": (235, 215, 60),
    "purple": (165, 60, 195),
    "cyan": (80, 210, 220),
}
INK = {name: BLACK if name in ("yellow", "cyan") else WHITE for name in RGB}

# One row of five pixels per string, seven rows per glyph.
_BITMAPS = {
    "1": "..#.. .##.. ..#.. ..#.. ..#.. ..#.. .###.",
    "2": ".###. #...# ....# ...#. ..#.. .#... #####",
    "3": "####. ....# ....# .###. ....# ....# ####.",
    "4": "...#. ..##. .#.#. #..#. ##### ...#. ...#.",
    "5": "##### #.... ####. ....# ....# #...# .###.",
    "6": "..##. .#... #.... ####. #...# #...# .###.",
    "7": "##### ....# ...#. ...#. ..#.. ..#.. ..#..",
    "8": ".###. #...# #...# .###. #...# #...# .###.",
    "9": ".###. #...# #...# .#### ....# ...#. .##..",
    "a": "..#.. .#.#. #...# #...# ##### #...# #...#",
    "c": ".#### #.... #.... #.... #.... #.... .####",
    "e": "##### #.... #.... ####. #.... #.... #####",
    "h": "#...# #...# #...# ##### #...# #...# #...#",
    "k": "#...# #..#. #.#.. ##... #.#.. #..#. #...#",
    "t": "##### ..#.. ..#.. ..#.. ..#.. ..#.. ..#..",
    "x": "#...# #...# .#.#. ..#.. .#.#. #...# #...#",
}


@cache
def glyph_bitmap(char: str) -> np.ndarray:
    """Bool bitmap [7, 5] of one glyph."""
    return np.array([[pixel == "#" for pixel in row] for row in _BITMAPS[char].split()])


@cache
def shape_mask(shape: str, radius: int) -> np.ndarray:
    """Bool mask [2r+1, 2r+1] of one shape about its centre."""
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1].astype(float)
    if shape == "circle":
        return x**2 + y**2 <= (radius + 0.3) ** 2
    if shape == "square":
        side = round(0.86 * radius)
        return np.maximum(abs(x), abs(y)) <= side
    if shape == "triangle":
        return (y <= 0.8 * radius) & (abs(x) <= (y + radius) / 1.8)
    if shape == "diamond":
        return abs(x) + abs(y) <= radius
    if shape == "cross":
        arm = round(0.38 * radius)
        return (np.minimum(abs(x), abs(y)) <= arm) & (np.maximum(abs(x), abs(y)) <= radius)
    raise ValueError(f"unknown shape {shape!r}")


def _stamp(x: int, y: int, mask: np.ndarray) -> tuple[slice, slice]:
    """The image region that a mask centred on (x, y) covers."""
    height, width = mask.shape
    top, left = y - height // 2, x - width // 2
    return slice(top, top + height), slice(left, left + width)


def _printed(scene: Scene) -> list[tuple[str, int, int, tuple[int, int, int]]]:
    """Every glyph of a scene: (char, x, y, ink)."""
    glyphs = [
        (t.glyph, t.x, t.y + glyph_drop(t.shape, t.radius), INK[t.color]) for t in scene.things if t.glyph is not None
    ]
    if scene.loose is not None:
        glyphs.append((scene.loose.char, scene.loose.x, scene.loose.y, WHITE))
    return glyphs


def render(scene: Scene) -> np.ndarray:
    """The picture, uint8 [height, width, 3]."""
    rng = np.random.default_rng(scene.texture)
    image = np.full((scene.height, scene.width, 3), scene.ground, dtype=np.int16)
    jitter = rng.integers(-15, 16, size=(len(scene.things), 3))
    for thing, shift in zip(scene.things, jitter, strict=True):
        mask = shape_mask(thing.shape, thing.radius)
        image[_stamp(thing.x, thing.y, mask)][mask] = np.array(RGB[thing.color]) + shift
    for char, x, y, ink in _printed(scene):
        bitmap = glyph_bitmap(char)
        image[_stamp(x, y, bitmap)][bitmap] = ink
    # Four grey levels of noise: enough texture to keep the ground from being free, and PNGs stay small.
    noise = rng.integers(0, 4, size=(scene.height, scene.width, 1), dtype=np.int16) * 8 - 12
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def owner_map(scene: Scene) -> np.ndarray:
    """Int8 [height, width]: the index of the thing that covers a pixel, -1 on the ground."""
    owner = np.full((scene.height, scene.width), -1, dtype=np.int8)
    for i, thing in enumerate(scene.things):
        mask = shape_mask(thing.shape, thing.radius)
        owner[_stamp(thing.x, thing.y, mask)][mask] = i
    return owner


def glyph_map(scene: Scene) -> np.ndarray:
    """Int8 [height, width]: the class of the glyph whose box covers a pixel, -1 elsewhere."""
    classes = np.full((scene.height, scene.width), -1, dtype=np.int8)
    box = np.ones((GLYPH_HEIGHT, GLYPH_WIDTH), dtype=bool)
    for char, x, y, _ in _printed(scene):
        classes[_stamp(x, y, box)] = GLYPHS.index(char)
    return classes
