"""Images of one size in front of blocks that take a mask each, as the towers of open_clip and timm run them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtprune.encoder.encoding import Call
from vtprune.encoder.padded import PaddedEncoding


class BlockEncoding(PaddedEncoding):
    """A padded batch whose blocks take an `attn_mask` and, where `batch_first` is False, hidden states (L, B, D).

    head_masks: whether each head has a mask, (B * heads, L, L), as `nn.MultiheadAttention` takes it, or all have one,
    (B, 1, L, L).
    """

    def __init__(self, *args: Any, batch_first: bool, head_masks: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, flash=False, **kwargs)
        self.batch_first, self.head_masks = batch_first, head_masks

    def turned(self, states: Tensor) -> Tensor:
        """States of the blocks as (B, L, D), and back."""
        return states if self.batch_first else states.transpose(0, 1)

    def layer_inputs(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        (states,), masked = super().layer_inputs(index, (self.turned(args[0]),), {})
        mask = masked.get("attention_mask")
        if mask is not None:
            if self.head_masks:
                mask = mask.expand(-1, self.heads, -1, -1).flatten(0, 1)
            kwargs = {**kwargs, "attn_mask": mask}
        return (self.turned(states), *args[1:]), kwargs

    def hidden(self, states: Tensor) -> Tensor:
        return self.turned(states)

    def open_mlp(self, index: int, states: Tensor) -> None:
        super().open_mlp(index, self.turned(states))

    def mlp_input(self, index: int, states: Tensor) -> Tensor:
        return self.turned(super().mlp_input(index, self.turned(states)))

    def mlp_output(self, index: int, states: Tensor) -> Tensor:
        return self.turned(super().mlp_output(index, self.turned(states)))

    def whole(self, states: Tensor) -> Tensor:
        """(B, P + N, D) what the last block put out, (B, P + N', D), with zeros where tokens were dropped."""
        tokens = self.projector_output(self.projector_input(states[:, self.prefix :]))
        return torch.cat([states[:, : self.prefix], tokens], dim=1)

    def full_sizes(self) -> tuple[Tensor, Tensor]:
        """(B, N) which tokens of the image are left, and how many patches each one stands for: 0 for those that are
        gone, and for one in whose place the CLS token stands."""
        both = torch.stack([self.valid.to(self.sizes), self.sizes.masked_fill(~self.valid, 0)], dim=-1)
        left, sizes = self.projector_output(both).unbind(-1)
        return left > 0, sizes
