"""Stage 1: the vision tower alone learns what each patch shows, and CLS what the image holds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModel

from vtprune.evals.tiny_models.labels import PATCH_CLASSES, SCENE_LABELS, VisionTargets, weighted_loss
from vtprune.evals.tiny_models.llava.architecture import FEATURE_LAYER, WIDTH

# The size of a feature that says "at the right edge", of the order of the other features.
PLACE_SIZE = 4.0


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
