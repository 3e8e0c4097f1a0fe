"""Random models of open_clip and timm to test with."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vtprune.encoder.encoding import Encoding


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
    shape: dict[str, Any] = {"img_size": 24, "patch_size": 4, "embed_dim": 48, "depth": 6, "num_heads": 4, **tower}
    trunk = VisionTransformer(**shape, class_token=cls, global_pool=pool, num_classes=0)
    vision = CLIPVisionCfg(timm_model_name="test_vit", image_size=160, timm_pool="avg")
    text = CLIPTextCfg(context_length=16, vocab_size=100, width=32, heads=4, layers=2)
    model: Any = CustomTextCLIP(32, vision, text)
    model.visual.trunk, model.visual.head.proj = trunk, nn.Linear(48, 32, bias=False)
    for parameter in model.visual.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1 if parameter.ndim > 2 else parameter.shape[-1] ** -0.5)
    return model.eval()


def watched(monkeypatch: pytest.MonkeyPatch, images: int, *, layers: int, tokens: int) -> list[Tensor]:
    """Which tokens (B, N) are alive before each block of a wrapped tower, and behind the last, once it has run."""
    alive = [torch.ones(images, tokens, dtype=torch.bool) for _ in range(layers + 1)]
    apply = Encoding.apply

    def noted(self: Encoding, selection: Any, index: int, cls: Any) -> None:
        apply(self, selection, index, cls)
        left = torch.zeros(images, tokens + 1, dtype=torch.bool)
        left.scatter_(1, self.alive.masked_fill(~self.valid, tokens), True)
        for after in range(index + 1, layers + 1):
            alive[after] = left[:, :tokens]

    monkeypatch.setattr(Encoding, "apply", noted)
    return alive


def masked(model: Any, pixels: Tensor, alive: list[Tensor]) -> Tensor:
    """The embeddings of a tower whose blocks, and whose pool, mask as keys what is not alive (B, N) there, row by row;
    alive: before each block, and behind the last."""
    one = _masked_timm if hasattr(model.visual, "trunk") else _masked_open_clip
    return torch.cat(
        [one(model.visual, image[None], [mask[row] for mask in alive]) for row, image in enumerate(pixels)]
    )


def _masked_open_clip(visual: Any, image: Tensor, alive: list[Tensor]) -> Tensor:
    states = visual._embeds(image)
    for block, mask in zip(visual.transformer.resblocks, alive, strict=False):
        seen = torch.cat([torch.ones(1, dtype=torch.bool), mask])
        bias = torch.zeros(1, len(seen)).masked_fill(~seen, -math.inf).expand(len(seen), -1)
        if not visual.transformer.batch_first:
            states = states.transpose(0, 1)
        states = block(states, attn_mask=bias)
        if not visual.transformer.batch_first:
            states = states.transpose(0, 1)
    states = visual.ln_post(states)
    pooled = states[:, 0] if visual.pool_type == "tok" else states[:, 1:][:, alive[-1]].mean(dim=1)
    found: Tensor = pooled @ visual.proj
    return found


def _masked_timm(visual: Any, image: Tensor, alive: list[Tensor]) -> Tensor:
    trunk = visual.trunk
    prefix = torch.ones(trunk.num_prefix_tokens, dtype=torch.bool)
    states = trunk.norm_pre(trunk._pos_embed(trunk.patch_embed(image)))
    seen = [torch.cat([prefix, mask]) for mask in alive]
    for block, own in zip(trunk.blocks, seen, strict=False):
        states = block(states, attn_mask=torch.zeros(1, 1, 1, len(own)).masked_fill(~own, -math.inf))
    pooled = trunk.head(trunk.fc_norm(trunk.pool(trunk.norm(states)[:, seen[-1]])))
    found: Tensor = visual.head(pooled)
    return found


# By whose a tower is and how it pools.
TOWERS: dict[str, Callable[[], Any]] = {
    "open_clip, tok": random_clip,
    "open_clip, avg": functools.partial(random_clip, "avg"),
    "timm, token": functools.partial(random_timm, "token", cls=True),
    "timm, avg": random_timm,
    "timm, map": functools.partial(random_timm, "map"),
}
