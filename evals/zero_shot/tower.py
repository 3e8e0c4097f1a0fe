"""The tower of a transformers CLIP as open_clip's, with the very same weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


@torch.no_grad()
def from_transformers(tower: Any, layers: int | None = None) -> Any:
    """An open_clip VisionTransformer that computes what the first `layers` (None: all) of a CLIPVisionModel do.

    It has no projection; `tok` pooling hands out the normed CLS token.
    """
    from open_clip.transformer import VisionTransformer

    config = tower.config
    depth = config.num_hidden_layers if layers is None else layers
    visual = VisionTransformer(
        image_size=config.image_size,
        patch_size=config.patch_size,
        width=config.hidden_size,
        layers=depth,
        heads=config.num_attention_heads,
        mlp_ratio=config.intermediate_size / config.hidden_size,
        output_dim=config.hidden_size,
        act_layer=nn.GELU,
    )
    visual.proj = None
    embeddings = tower.embeddings
    visual.class_embedding.copy_(embeddings.class_embedding)
    visual.conv1.weight.copy_(embeddings.patch_embedding.weight)
    visual.positional_embedding.copy_(embeddings.position_embedding.weight)
    visual.ln_pre.load_state_dict(tower.pre_layrnorm.state_dict())
    visual.ln_post.load_state_dict(tower.post_layernorm.state_dict())
    for block, layer in zip(visual.transformer.resblocks, tower.encoder.layers, strict=False):
        projections = [getattr(layer.self_attn, f"{name}_proj") for name in "qkv"]
        block.attn.in_proj_weight.copy_(torch.cat([one.weight for one in projections]))
        block.attn.in_proj_bias.copy_(torch.cat([one.bias for one in projections]))
        block.attn.out_proj.load_state_dict(layer.self_attn.out_proj.state_dict())
        block.ln_1.load_state_dict(layer.layer_norm1.state_dict())
        block.ln_2.load_state_dict(layer.layer_norm2.state_dict())
        block.mlp.c_fc.load_state_dict(layer.mlp.fc1.state_dict())
        block.mlp.c_proj.load_state_dict(layer.mlp.fc2.state_dict())
    return visual.eval()
