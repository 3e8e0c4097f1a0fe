"""Stage 1: the vision tower alone learns what each patch shows, and CLS what the image holds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModel

from vtprune.evals.tiny_models.architecture import FEATURE_LAYER, PATCH, WIDTH
from vtprune.shapes.render import glyph_map, owner_map, render
from vtprune.shapes.scene import (
    COLORS,
    GLYPHS,
    MAX_THINGS,
    SHAPES,
    Scene,
)

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
# The size of a feature that says "at the right edge", of the order of the other features.
PLACE_SIZE = 4.0


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
    rows, columns = (side // PATCH for side in pixels.shape)
    patches = pixels.reshape(rows, PATCH, columns, PATCH).transpose(0, 2, 1, 3).reshape(rows * columns, -1)
    counts = (patches[:, :, None] == np.arange(classes)).sum(1)
    return np.where(counts.max(1) >= least, counts.argmax(1) + 1, 0)


def _scene_targets(scene: Scene) -> tuple[np.ndarray, ...]:
    owner = _patch_classes(owner_map(scene), MAX_THINGS, MIN_THING_PIXELS)
    shapes = np.array([0] + [SHAPES.index(thing.shape) + 1 for thing in scene.things])
    colors = np.array([0] + [COLORS.index(thing.color) + 1 for thing in scene.things])
    glyph = _patch_classes(glyph_map(scene), len(GLYPHS), MIN_GLYPH_PIXELS)
    rows, columns = scene.height // PATCH, scene.width // PATCH
    centre, labels = np.zeros(rows * columns, dtype=np.float32), np.zeros(SCENE_LABELS, dtype=np.float32)
    pairs = len(COLORS) * len(SHAPES)
    for thing in scene.things:
        centre[thing.y // PATCH * columns + thing.x // PATCH] = 1
        labels[COLORS.index(thing.color) * len(SHAPES) + SHAPES.index(thing.shape)] = 1
    labels[pairs + glyph[glyph > 0] - 1] = 1
    labels[pairs + len(GLYPHS) + len(scene.things) - 1] = 1
    middles = np.mgrid[:rows, :columns].reshape(2, -1).T[:, ::-1] * PATCH + PATCH / 2
    centres = np.array([(0, 0)] + [(thing.x, thing.y) for thing in scene.things])
    halves = np.array([scene.width, scene.height]) / 2
    place = np.where(owner[:, None] > 0, centres[owner], middles) / halves - 1
    return shapes[owner], colors[owner], glyph, centre, place.astype(np.float32), labels


def vision_targets(scenes: Iterable[Scene]) -> VisionTargets:
    """The labels of a batch of scenes."""
    columns = zip(*(_scene_targets(scene) for scene in scenes), strict=True)
    return VisionTargets(*(torch.from_numpy(np.stack(column)) for column in columns))


class VisionHeads(nn.Module):
    """Linear read-outs that exist in training only."""

    place: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(WIDTH, sum(PATCH_CLASSES))
        # Fixed directions of unit length for x and y: the features themselves have to carry the place,
        # at a size that the decoder sees. With a learnt read-out it stays a hundredth of their variance.
        self.register_buffer("place", torch.eye(WIDTH)[:2] / PLACE_SIZE)
        self.scene_norm = nn.LayerNorm(WIDTH)
        # CLS is read twice: where LLaVA's features are taken, and at the tower's end.
        self.scene_at_features = nn.Linear(WIDTH, SCENE_LABELS)
        self.scene_at_end = nn.Linear(WIDTH, SCENE_LABELS)

    def forward(self, states: Tensor, pooled: Tensor, targets: VisionTargets) -> Tensor:
        """The stage 1 loss from states [b, 145, w] at the feature layer and the pooled CLS [b, w]."""
        shape, color, glyph, centre = self.patch(states[:, 1:]).split(PATCH_CLASSES, dim=-1)
        dense = (
            weighted_loss(shape, targets.shape)
            + weighted_loss(color, targets.color)
            + weighted_loss(glyph, targets.glyph)
            + 5 * F.mse_loss(states[:, 1:] @ self.place.T, targets.place)
            + F.binary_cross_entropy_with_logits(centre.squeeze(-1), targets.centre, pos_weight=centre.new_tensor(5.0))
        )
        read = (self.scene_at_features(self.scene_norm(states[:, 0])), self.scene_at_end(pooled))
        image = sum(F.binary_cross_entropy_with_logits(logits, targets.scene) for logits in read)
        return dense + 4 * image


def weighted_loss(logits: Tensor, classes: Tensor) -> Tensor:
    """Cross entropy over patches in which a bare one weighs less."""
    weight = torch.ones(logits.shape[-1], device=logits.device)
    weight[0] = NOTHING_WEIGHT
    return F.cross_entropy(logits.flatten(0, 1), classes.flatten(), weight=weight)


def tower_states(tower: CLIPVisionModel, pixels: Tensor) -> Tensor:
    """Hidden states [b, 145, w] that LLaVA reads; the tower's last layer does not run."""
    states = tower.pre_layrnorm(tower.embeddings(pixels))
    for layer in tower.encoder.layers[: FEATURE_LAYER + 1]:
        states = layer(states, None)
    return states


def pooled_state(tower: CLIPVisionModel, states: Tensor) -> Tensor:
    """The tower's own output [b, w]: CLS after the last layer and the post-layernorm."""
    for layer in tower.encoder.layers[FEATURE_LAYER + 1 :]:
        states = layer(states, None)
    return tower.post_layernorm(states[:, 0])


@torch.no_grad()
def patch_accuracy(heads: VisionHeads, states: Tensor, targets: VisionTargets) -> dict[str, float]:
    """Share of non-bare patches whose shape, colour and glyph are read right."""
    logits = heads.patch(states[:, 1:]).split(PATCH_CLASSES, dim=-1)
    scores = {}
    for name, values in zip(("shape", "color", "glyph"), logits, strict=False):
        classes = getattr(targets, name)
        scores[name] = (values.argmax(-1) == classes)[classes > 0].float().mean().item()
    scores["place"] = 1 - F.mse_loss(states[:, 1:] @ heads.place.T, targets.place).item() / 0.33
    return scores
