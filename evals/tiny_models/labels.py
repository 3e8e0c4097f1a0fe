"""What each cell of a drawn picture shows: the labels that towers are taught with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vtprune.shapes.render import glyph_map, owner_map, render
from vtprune.shapes.scene import COLORS, GLYPHS, MAX_THINGS, SHAPES, Scene

# The side of a cell in pixels: a patch of the LLaVA, a vision token of the Qwen.
CELL = 8
# A patch is said to show a thing or a glyph that covers at least so many of its 64 pixels.
MIN_THING_PIXELS = 6
MIN_GLYPH_PIXELS = 5
# Classes per patch: nothing or a shape, a colour, a glyph; and whether a thing's centre is here. Besides
# these a patch learns the place of its thing's centre.
PATCH_CLASSES = (len(SHAPES) + 1, len(COLORS) + 1, len(GLYPHS) + 1, 1)
# Labels per image: which coloured shapes, which glyphs, how many things.
SCENE_LABELS = len(COLORS) * len(SHAPES) + len(GLYPHS) + MAX_THINGS
# Most patches are bare: "nothing" weighs less, or the glyphs would be learnt last.
NOTHING_WEIGHT = 0.2


@dataclass
class VisionTargets:
    """Patch classes [b, n] three times, centres [b, n], places [b, n, 2], scene labels [b, labels]."""

    shape: Tensor
    color: Tensor
    glyph: Tensor
    centre: Tensor
    place: Tensor
    scene: Tensor

    def to(self, device: torch.device) -> VisionTargets:
        """The same on another device."""
        return VisionTargets(*(tensor.to(device) for tensor in vars(self).values()))


def pixel_batch(scenes: Iterable[Scene]) -> Tensor:
    """Rendered and normalised as the processor does it, float [b, 3, height, width]."""
    images = torch.from_numpy(np.stack([render(scene) for scene in scenes]))
    return (images.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25


def _patch_classes(pixels: np.ndarray, classes: int, least: int) -> np.ndarray:
    """Class per patch [rows * columns]: the one that covers most pixels plus one, or 0 where it covers too few."""
    rows, columns = (side // CELL for side in pixels.shape)
    patches = pixels.reshape(rows, CELL, columns, CELL).transpose(0, 2, 1, 3).reshape(rows * columns, -1)
    counts = (patches[:, :, None] == np.arange(classes)).sum(1)
    return np.where(counts.max(1) >= least, counts.argmax(1) + 1, 0)


def _scene_targets(scene: Scene) -> tuple[np.ndarray, ...]:
    owner = _patch_classes(owner_map(scene), MAX_THINGS, MIN_THING_PIXELS)
    shapes = np.array([0] + [SHAPES.index(thing.shape) + 1 for thing in scene.things])
    colors = np.array([0] + [COLORS.index(thing.color) + 1 for thing in scene.things])
    glyph = _patch_classes(glyph_map(scene), len(GLYPHS), MIN_GLYPH_PIXELS)
    rows, columns = scene.height // CELL, scene.width // CELL
    centre, labels = np.zeros(rows * columns, dtype=np.float32), np.zeros(SCENE_LABELS, dtype=np.float32)
    pairs = len(COLORS) * len(SHAPES)
    for thing in scene.things:
        centre[thing.y // CELL * columns + thing.x // CELL] = 1
        labels[COLORS.index(thing.color) * len(SHAPES) + SHAPES.index(thing.shape)] = 1
    labels[pairs + glyph[glyph > 0] - 1] = 1
    labels[pairs + len(GLYPHS) + len(scene.things) - 1] = 1
    middles = np.mgrid[:rows, :columns].reshape(2, -1).T[:, ::-1] * CELL + CELL / 2
    centres = np.array([(0, 0)] + [(thing.x, thing.y) for thing in scene.things])
    halves = np.array([scene.width, scene.height]) / 2
    place = np.where(owner[:, None] > 0, centres[owner], middles) / halves - 1
    return shapes[owner], colors[owner], glyph, centre, place.astype(np.float32), labels


def vision_targets(scenes: Iterable[Scene]) -> VisionTargets:
    """The labels of a batch of scenes."""
    columns = zip(*(_scene_targets(scene) for scene in scenes), strict=True)
    return VisionTargets(*(torch.from_numpy(np.stack(column)) for column in columns))


def weighted_loss(logits: Tensor, classes: Tensor) -> Tensor:
    """Cross entropy over patches in which a bare one weighs less."""
    weight = torch.ones(logits.shape[-1], device=logits.device)
    weight[0] = NOTHING_WEIGHT
    return F.cross_entropy(logits.flatten(0, 1), classes.flatten(), weight=weight)
