"""open_clip: a ViT alone, which embeds images and has no decoder behind it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear

from vtprune.adapters.tower import Tower
from vtprune.cost.sizes import FixedVisionCost, TransformerCost
from vtprune.encoder.blocks import BlockEncoding
from vtprune.errors import UnsupportedModelError
from vtprune.method.facts import ModelFacts


class OpenClipTower(Tower):
    """An open_clip model, or its `visual` alone: a ViT with a CLS token, which pools it or the mean of its patches."""

    name = "open_clip"
    models = ("CLIP", "CustomTextCLIP", "VisionTransformer")
    notes = "a ViT alone (encode_image): methods that act inside the encoder; no text is ever pruned"

    @classmethod
    def takes(cls, model: object) -> bool:
        """Whether this is one of open_clip's classes: others have the same names."""
        kind = type(model)
        return kind.__name__ in cls.models and kind.__module__.partition(".")[0] == "open_clip"

    def check(self) -> None:
        visual, here = self.tower, type(self.tower).__name__
        if here != "VisionTransformer":
            raise UnsupportedModelError(
                f"the open_clip adapter takes open_clip's own VisionTransformer, this model's tower is a {here}"
            )
        if visual.attn_pool is not None or visual.pool_type not in ("tok", "avg"):
            raise UnsupportedModelError(
                "this tower pools by attention over all its tokens, which knows no mask; only pool_type 'tok' and "
                "'avg' are supported"
            )
        for block in visual.transformer.resblocks:
            attention = getattr(block, "attn", None)
            if type(block).__name__ != "ResidualAttentionBlock" or not isinstance(attention, nn.MultiheadAttention):
                raise UnsupportedModelError(
                    f"the open_clip adapter takes blocks with nn.MultiheadAttention, this tower has "
                    f"{type(block).__name__} with {type(attention).__name__}"
                )
            weight = attention.in_proj_weight
            if weight is None or not weight.is_floating_point():
                raise UnsupportedModelError(
                    "queries, keys and values are read from the weights of nn.MultiheadAttention, which are quantised "
                    "or apart in this tower"
                )

    @property
    def tower(self) -> Any:
        """The VisionTransformer."""
        return getattr(self.model, "visual", self.model)

    @property
    def blocks(self) -> nn.Module:
        blocks: nn.Module = self.tower.transformer
        return blocks

    @property
    def encoder_layers(self) -> Iterable[nn.Module]:
        return list(self.tower.transformer.resblocks)

    @property
    def _attention(self) -> Any:
        return self.tower.transformer.resblocks[0].attn

    @property
    def checkpoints(self) -> bool:
        return bool(self.tower.transformer.grad_checkpointing)

    @property
    def batch_first(self) -> bool:
        """Whether blocks are given (B, L, D), not (L, B, D)."""
        return bool(self._attention.batch_first)

    @property
    def encoder_scale(self) -> float:
        return float(self._attention.head_dim**-0.5)

    def facts(self) -> ModelFacts:
        return ModelFacts(
            has_cls=True, encoder_depth=len(self.tower.transformer.resblocks), decoder_depth=0, group=1, source=""
        )

    def encoder_mlp(self, layer: Any) -> tuple[nn.Module, nn.Module]:
        return layer.ln_2, layer.mlp

    def attention_norm(self, layer: Any) -> nn.Module:
        norm: nn.Module = layer.ln_1
        return norm

    def attention_states(self, layer: Any, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = linear(normed, layer.attn.in_proj_weight, layer.attn.in_proj_bias).chunk(3, dim=-1)
        return query, key, value

    def start(self, pixels: Tensor) -> BlockEncoding:
        height, width = (
            side // patch for side, patch in zip(pixels.shape[-2:], self.tower.patch_size, strict=True)
        )  # fmt: skip
        depth = len(self.tower.transformer.resblocks)
        return BlockEncoding(
            [(1, height, width)] * pixels.shape[0],
            group=1,
            prefix=1,
            heads=self._attention.num_heads,
            depth=depth,
            last=depth - 1,
            device=pixels.device,
            batch_first=self.batch_first,
        )

    @property
    def cost(self) -> FixedVisionCost:
        tower, block = self.tower, self.tower.transformer.resblocks[0]
        width, (rows, columns) = self._attention.embed_dim, tower.patch_size
        blocks = TransformerCost(
            width=width,
            heads=self._attention.num_heads,
            query_width=width,
            kv_width=width,
            mlp_width=block.mlp.c_fc.out_features,
            mlp_matrices=2,
            layers=len(tower.transformer.resblocks),
        )
        patch = tower.conv1.in_channels * rows * columns * width
        return FixedVisionCost(blocks, patch, side=tower.grid_size, extra=1, dropped=1, pooling=False)

    def pooled_macs(self, patches: int) -> int:
        return 0 if self.tower.proj is None else self.tower.proj.numel()
