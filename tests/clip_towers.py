"""Random models of open_clip and timm to test with."""

from __future__ import annotations

from typing import Any

import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from timm.models.vision_transformer import VisionTransformer
from torch import nn


def random_clip(pool_type: str = "tok", *, batch_first: bool = True, **tower: Any) -> Any:
    """Six blocks, 36 patches; the same weights for every layout."""
    torch.manual_seed(0)
    vision = CLIPVisionCfg(
        layers=6, width=48, head_width=12, patch_size=4, image_size=24, pool_type=pool_type, **tower
    )  # fmt: skip
    model = CLIP(32, vision, CLIPTextCfg(context_length=16, vocab_size=100, width=32, heads=4, layers=2)).eval()
    for parameter in model.visual.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1 if parameter.ndim > 2 else parameter.shape[-1] ** -0.5)
    if not batch_first:
        blocks: Any = model.visual.transformer
        blocks.batch_first = False
        for block in blocks.resblocks:
            block.attn.batch_first = False
    return model


def random_timm(pool: str = "avg", *, cls: bool = False, **tower: Any) -> Any:
    """timm's ViT in an open_clip model, of the same size."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"img_size": 24, "patch_size": 4, "embed_dim": 48, "depth": 6, "num_heads": 4}
    trunk = VisionTransformer(**shape, class_token=cls, global_pool=pool, num_classes=0, **tower)
    vision = CLIPVisionCfg(timm_model_name="test_vit", image_size=160, timm_pool="avg")
    text = CLIPTextCfg(context_length=16, vocab_size=100, width=32, heads=4, layers=2)
    model: Any = CustomTextCLIP(32, vision, text)
    model.visual.trunk, model.visual.head.proj = trunk, nn.Linear(48, 32, bias=False)
    for parameter in model.visual.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1 if parameter.ndim > 2 else parameter.shape[-1] ** -0.5)
    return model.eval()
