"""What an adapter knows of a vision encoder that stands alone, with no decoder behind it."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn

from vtprune.adapters.encoder_side import EncoderSide
from vtprune.cost.sizes import FixedVisionCost
from vtprune.encoder.blocks import BlockEncoding


class Tower(EncoderSide):
    """A ViT alone: its blocks run one after another, then something pools what they put out."""

    @property
    @abstractmethod
    def tower(self) -> Any:
        """The module that makes an embedding, or what a projection makes one of, of pixels."""

    @property
    def vision_tower(self) -> nn.Module:
        tower: nn.Module = self.tower
        return tower

    @property
    @abstractmethod
    def blocks(self) -> nn.Module:
        """The module that runs all blocks."""

    @property
    @abstractmethod
    def checkpoints(self) -> bool:
        """Whether gradient checkpointing is switched on."""

    @abstractmethod
    def start(self, pixels: Tensor) -> BlockEncoding:
        """The state of one pass of images (B, 3, H, W)."""

    @abstractmethod
    def attention_norm(self, layer: Any) -> nn.Module:
        """The norm before the attention of one block."""

    @abstractmethod
    def attention_states(self, layer: Any, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, L, H * d) of one block, from what its norm puts out (B, L, D)."""

    @property
    @abstractmethod
    def cost(self) -> FixedVisionCost:
        """The sizes of the tower."""

    @abstractmethod
    def pooled_macs(self, patches: int) -> int:
        """Multiply-accumulates of what comes after the blocks, for a picture of so many patches."""
