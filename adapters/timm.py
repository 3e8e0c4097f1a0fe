"""timm's ViT alone, as open_clip's SigLIPs have it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from vtprune.adapters.tower import Tower
from vtprune.cost.sizes import FixedVisionCost, TransformerCost
from vtprune.encoder.blocks import BlockEncoding
from vtprune.errors import UnsupportedModelError
from vtprune.method.facts import ModelFacts

POOLS = ("token", "avg", "map")


class TimmTower(Tower):
    """An open_clip model whose `visual` is timm's VisionTransformer, that `visual`, or the VisionTransformer alone.

    With a CLS token or without; pooled by it, by the mean of the patches, or by a latent query's attention to them.
    """

    name = "timm"
    models = ("CLIP", "CustomTextCLIP", "TimmModel", "VisionTransformer")
    notes = "a ViT alone (encode_image): methods that act inside the encoder; no text is ever pruned"

    @classmethod
    def takes(cls, model: object) -> bool:
        """Whether timm's classes are in it: others have the same names."""
        visual = getattr(model, "visual", model)
        kind = type(visual)
        if kind.__name__ == "TimmModel":
            return kind.__module__.partition(".")[0] == "open_clip"
        return kind.__name__ in cls.models and kind.__module__.partition(".")[0] == "timm"

    def check(self) -> None:
        tower, here = self.tower, type(self.tower).__name__
        if here != "VisionTransformer":
            raise UnsupportedModelError(f"the timm adapter takes timm's VisionTransformer, this model's is a {here}")
        if tower.global_pool not in POOLS:
            raise UnsupportedModelError(
                f"the timm adapter takes towers that pool by {', '.join(map(repr, POOLS))}, this one pools by "
                f"{tower.global_pool!r}"
            )
        if getattr(tower, "reg_token", None) is not None or tower.num_prefix_tokens > 1:
            raise UnsupportedModelError("this tower has register tokens, which have no place in a grid of patches")
        if tower.patch_embed.dynamic_img_pad or not isinstance(tower.patch_drop, nn.Identity):
            raise UnsupportedModelError(
                "this tower pads pictures, or drops patches by itself (patch_drop_rate), so no token is known to be a "
                "certain patch"
            )
        if tower.attn_pool is not None and tower.attn_pool.pos_embed is not None:
            raise UnsupportedModelError("this tower's attention pool knows the places of its tokens")
        for block in tower.blocks:
            attention = getattr(block, "attn", None)
            if type(block).__name__ != "Block" or type(attention).__name__ != "Attention":
                raise UnsupportedModelError(
                    f"the timm adapter takes blocks (Block) with Attention, this tower has {type(block).__name__} "
                    f"with {type(attention).__name__}"
                )
            if type(block.mlp).__name__ != "Mlp":
                raise UnsupportedModelError(
                    f"the timm adapter takes blocks with Mlp, this tower has {type(block.mlp).__name__}"
                )
        if "attn_mask" not in inspect.signature(tower.blocks[0].forward).parameters:
            raise UnsupportedModelError("blocks of this release of timm take no mask; install a newer one")

    @property
    def tower(self) -> Any:
        """The VisionTransformer."""
        visual = getattr(self.model, "visual", self.model)
        return getattr(visual, "trunk", visual)

    @property
    def blocks(self) -> nn.Module:
        blocks: nn.Module = self.tower.blocks
        return blocks

    @property
    def encoder_layers(self) -> Iterable[nn.Module]:
        return list(self.tower.blocks)

    @property
    def checkpoints(self) -> bool:
        return bool(self.tower.grad_checkpointing)

    @property
    def encoder_scale(self) -> float:
        return float(self.tower.blocks[0].attn.scale)

    def facts(self) -> ModelFacts:
        return ModelFacts(
            has_cls=bool(self.tower.has_class_token),
            encoder_depth=len(self.tower.blocks),
            decoder_depth=0,
            group=1,
            source="",
        )

    def encoder_mlp(self, layer: Any) -> tuple[nn.Module, nn.Module]:
        return layer.norm2, layer.mlp

    def attention_norm(self, layer: Any) -> nn.Module:
        norm: nn.Module = layer.norm1
        return norm

    def attention_states(self, layer: Any, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.split(layer, layer.attn.qkv(normed))

    def split(self, layer: Any, made: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same from what the one projection of all three puts out (B, L, 3 * H * d)."""
        query, key, value = made.chunk(3, dim=-1)
        heads = (-1, layer.attn.head_dim)
        norms = (layer.attn.q_norm, layer.attn.k_norm)
        query, key = (
            states if isinstance(norm, nn.Identity) else norm(states.unflatten(-1, heads)).flatten(2)
            for norm, states in zip(norms, (query, key), strict=True)
        )
        return query, key, value

    def start(self, pixels: Tensor) -> BlockEncoding:
        height, width = (
            side // patch for side, patch in zip(pixels.shape[-2:], self.tower.patch_embed.patch_size, strict=True)
        )
        depth = len(self.tower.blocks)
        return BlockEncoding(
            [(1, height, width)] * pixels.shape[0],
            group=1,
            prefix=self.tower.num_prefix_tokens,
            heads=self.tower.blocks[0].attn.num_heads,
            depth=depth,
            last=depth - 1,
            device=pixels.device,
            batch_first=True,
            head_masks=False,
        )

    @property
    def cost(self) -> FixedVisionCost:
        tower, block = self.tower, self.tower.blocks[0]
        width, inner = tower.embed_dim, block.attn.attn_dim
        blocks = TransformerCost(
            width=width,
            heads=block.attn.num_heads,
            query_width=inner,
            kv_width=inner,
            mlp_width=block.mlp.fc1.out_features,
            mlp_matrices=2,
            layers=len(tower.blocks),
        )
        patch = tower.patch_embed.proj.weight.numel()
        extra = tower.num_prefix_tokens
        return FixedVisionCost(
            blocks, patch, side=tower.patch_embed.grid_size, extra=extra, dropped=extra, pooling=False
        )

    def pooled_macs(self, patches: int) -> int:
        visual: Any = getattr(self.model, "visual", self.model)
        last = [*self.tower.head.modules(), *(visual.head.modules() if visual is not self.tower else ())]
        macs = sum(one.weight.numel() for one in last if isinstance(one, nn.Linear))
        pool = self.tower.attn_pool
        if pool is None:
            return macs
        linears = [one for one in pool.modules() if isinstance(one, nn.Linear) and one is not pool.kv]
        tokens = patches + (self.tower.num_prefix_tokens if self.tower.pool_include_prefix else 0)
        products = 2 * pool.latent_len * pool.num_heads * pool.head_dim
        return (
            macs
            + pool.latent_len * sum(one.weight.numel() for one in linears)
            + tokens * (pool.kv.weight.numel() + products)
        )
