"""What the tower is taught: every vision token says what it shows, and looks to the decoder as the LLaVA's would."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from vtprune.evals.tiny_models.labels import PATCH_CLASSES, VisionTargets, weighted_loss
from vtprune.evals.tiny_models.qwen.architecture import HEADS, MERGE, PATCH, TOWER_WIDTH, WIDTH

TARGETS = ("shape", "color", "glyph")
Grid = tuple[int, int]


@dataclass
class Features:
    """Of pictures, or of steps in time of clips: tokens [b, n, w], and as many again a plane."""

    tokens: Tensor
    planes: list[Tensor]


def patches_of(frames: Tensor) -> tuple[Tensor, Grid]:
    """[b, 2, 3, H, W] frames in twos (a picture twice) as flat patches [b, n, 96], four of a token together; the grid
    of patches."""
    rows, columns = (side // PATCH for side in frames.shape[-2:])
    flat = rearrange(
        frames, "b t c (h m p) (w n q) -> b (h w m n) (c t p q)", m=MERGE, n=MERGE, p=PATCH, q=PATCH
    )  # fmt: skip
    return flat, (rows, columns)


@cache
def _places(grid: Grid, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """For a grid of patches: which learned positions each lies between, by what weights, and its row and column."""
    shape = torch.tensor([[1, *grid]])
    between, weights = get_vision_interpolation_indices_and_weights(
        shape, num_grid_per_side=side, mode="bilinear", align_corners=True, spatial_merge_size=MERGE, kwargs={}
    )
    return between, weights, get_vision_position_ids(shape, MERGE, kwargs={})


def look(visual: Any, patches: Tensor, grid: Grid) -> Features:
    """The tower's forward for a batch whose pictures have one size: attention within each row of the batch."""
    between, weights, positions = _places(grid, visual.num_grid_per_side)
    b, n, _ = patches.shape
    kernel = visual.patch_embed.proj
    states = F.linear(patches, kernel.weight.flatten(1), kernel.bias)
    states = states + (visual.pos_embed(between) * weights[:, :, None]).sum(1)
    cos, sin = visual.rotary_pos_emb(states, positions)
    planes = []
    for layer, block in enumerate(visual.blocks):
        q, k, v = rearrange(block.attn.qkv(block.norm1(states)), "b n (three h d) -> three b n h d", three=3, h=HEADS)
        q, k = apply_rotary_pos_emb_vision(q, k, cos, sin)
        mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        states = states + block.attn.proj(mixed.transpose(1, 2).reshape(b, n, TOWER_WIDTH))
        states = states + block.mlp(block.norm2(states))
        if layer in visual.deepstack_visual_indexes:
            merger = visual.deepstack_merger_list[visual.deepstack_visual_indexes.index(layer)]
            planes.append(merger(states).view(b, n // MERGE**2, WIDTH))
    return Features(visual.merger(states).view(b, n // MERGE**2, WIDTH), planes)


class TokenHeads(nn.Module):
    """Linear read-outs of vision tokens, which exist in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(WIDTH, sum(PATCH_CLASSES))
        self.place = nn.Linear(WIDTH, 2)

    def forward(self, tokens: Tensor, targets: VisionTargets) -> Tensor:
        """The loss of tokens [b, n, w]."""
        *classes, centre = self.patch(tokens).split(PATCH_CLASSES, dim=-1)
        seen = sum(
            weighted_loss(logits, getattr(targets, name)) for name, logits in zip(TARGETS, classes, strict=True)
        )
        centres = F.binary_cross_entropy_with_logits(
            centre.squeeze(-1), targets.centre, pos_weight=centre.new_tensor(5.0)
        )
        return seen + centres + 5 * F.mse_loss(self.place(tokens), targets.place)

    @torch.no_grad()
    def accuracy(self, tokens: Tensor, targets: VisionTargets) -> dict[str, float]:
        """Share of non-bare tokens whose shape, colour and glyph are read right."""
        found = {}
        for name, logits in zip(TARGETS, self.patch(tokens).split(PATCH_CLASSES, dim=-1), strict=False):
            classes = getattr(targets, name)
            found[name] = (logits.argmax(-1) == classes)[classes > 0].float().mean().item()
        return found
