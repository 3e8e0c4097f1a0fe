"""Tiny models whose shapes are drawn at random, a number naming each: towers, grids, decoders, rotary scalings."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from tests.copies import Copier

# Ids from TEXT to IMAGE - 1 are words.
PAD, TEXT, IMAGE, START, END, VIDEO, VOCABULARY = 0, 3, 120, 121, 122, 123, 130
PATCH = 4
ARCHITECTURES = 15

KINDS = ("llava-clip", "llava-siglip", "qwen2.5-vl")
# Sides of a LLaVA tower's grid, and the depths of decoders: lists that the numbers go through in turn.
SIDES, DEPTHS = (5, 4, 1, 6, 3), (12, 6, 12, 9, 5)
ROPES: tuple[dict[str, Any], ...] = (
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 64},
)  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """The shape of a model.

    side: of a LLaVA tower's grid, in tokens (0: images of any size); feature: the layers of a LLaVA tower that are
    read; window: of a Qwen tower, in pixels, and `full` its blocks that attend to everything.
    """

    number: int
    kind: str
    tower_depth: int
    depth: int
    heads: int
    key_heads: int
    head_size: int
    bias: bool
    tied: bool
    rope: dict[str, Any]
    side: int = 0
    feature: int | tuple[int, ...] = -2
    window: int = 0
    full: tuple[int, ...] = ()

    @property
    def is_qwen(self) -> bool:
        """Whether images have any size, and positions three axes."""
        return self.kind.startswith("qwen")


def architecture(number: int) -> Architecture:
    """The same shape for the same number, each time."""
    rng = Random(f"architecture {number}")
    kind, turn = KINDS[number % len(KINDS)], number // len(KINDS)
    heads, key_heads = rng.choice([(4, 2), (4, 1), (6, 2), (6, 3), (4, 4)])
    tower_depth = rng.randint(4, 6)
    common: dict[str, Any] = {
        "number": number, "kind": kind, "tower_depth": tower_depth, "depth": DEPTHS[turn % len(DEPTHS)],
        "heads": heads, "key_heads": key_heads, "tied": turn % 2 == 1,
    }  # fmt: skip
    if kind.startswith("qwen"):
        # The last block sees the whole image, which the adapter asks for.
        full = (*sorted(rng.sample(range(tower_depth - 1), rng.randint(0, 2))), tower_depth - 1)
        # Scaled rotary embeddings are for one axis here: Qwen's has sections.
        return Architecture(
            **common, head_size=8, bias=True, rope=ROPES[0], window=rng.choice([16, 24, 32]), full=full
        )
    feature: Any = rng.choice([-2, -1, -2, -1, (2, -2)]) if turn else -2
    return Architecture(
        **common, head_size=rng.choice([6, 8, 12]), bias=rng.random() < 0.5, rope=rng.choice(ROPES),
        side=SIDES[turn % len(SIDES)], feature=feature,
    )  # fmt: skip


def _llava(shape: Architecture) -> Any:
    tower = shape.kind.removeprefix("llava-")
    config = LlavaConfig(
        vision_config={
            "model_type": f"{tower}_vision_model", "hidden_size": 32, "intermediate_size": 40,
            "num_hidden_layers": shape.tower_depth, "num_attention_heads": 4, "image_size": PATCH * shape.side,
            "patch_size": PATCH,
        },
        text_config={
            "model_type": "llama", "hidden_size": 8 * shape.heads, "intermediate_size": 40,
            "num_hidden_layers": shape.depth,
            "num_attention_heads": shape.heads, "num_key_value_heads": shape.key_heads, "head_dim": shape.head_size,
            "vocab_size": VOCABULARY, "max_position_embeddings": 512, "pad_token_id": PAD,
            "attention_bias": shape.bias, "mlp_bias": shape.bias, "tie_word_embeddings": shape.tied,
            "rope_parameters": {"rope_theta": 1e4, **shape.rope},
        },
        image_token_id=IMAGE,
        vision_feature_layer=shape.feature if isinstance(shape.feature, int) else list(shape.feature),
        vision_feature_select_strategy="default" if tower == "clip" else "full",
        tie_word_embeddings=shape.tied,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)


def _qwen(shape: Architecture) -> Any:
    width = shape.heads * shape.head_size
    config = Qwen2_5_VLConfig(
        vision_config={
            "hidden_size": 32, "intermediate_size": 40, "depth": shape.tower_depth, "num_heads": 4,
            "patch_size": PATCH, "window_size": shape.window, "fullatt_block_indexes": list(shape.full),
            "out_hidden_size": width, "spatial_merge_size": 2, "temporal_patch_size": 2, "tokens_per_second": 2,
        },
        text_config={
            "hidden_size": width, "intermediate_size": 40, "num_hidden_layers": shape.depth,
            "num_attention_heads": shape.heads, "num_key_value_heads": shape.key_heads, "vocab_size": VOCABULARY,
            "max_position_embeddings": 512, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2,
            "tie_word_embeddings": shape.tied,
            "rope_parameters": {"rope_theta": 1e4, "mrope_section": [2, 1, 1], **shape.rope},
        },
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END,
        tie_word_embeddings=shape.tied,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config)


def _spread(model: Any, seed: int) -> None:
    """Weights so large that attention is peaky and no two tokens are alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            if weight.ndim < 2:
                weight.copy_(0.1 * noise + (0.0 if "bias" in name else 1.0))
            elif "lm_head" in name or "embed_tokens" in name:
                weight.copy_(0.7 * noise)
            else:
                peaky = any(part in name for part in ("q_proj", "k_proj", "qkv"))
                weight.copy_((2.4 if peaky else 1.6) * weight.shape[-1] ** -0.5 * noise)


class ExactNorm(nn.Module):
    """An RMS norm that stays in fp64: transformers makes it in fp32, where two numbers that differ in the sixteenth
    digit may be rounded to some that differ in the eighth."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, states: Tensor) -> Tensor:
        squares = states.square().mean(dim=-1, keepdim=True)
        return self.weight * states * (squares + self.variance_epsilon).rsqrt()


def _in_fp64(model: Any) -> Any:
    """The model in fp64, its norms as well."""
    for parent in list(model.double().modules()):
        for name, module in list(parent.named_children()):
            if type(module).__name__.endswith("RMSNorm"):
                setattr(parent, name, ExactNorm(module))
    return model


@functools.cache
def _copier(number: int) -> Copier:
    shape = architecture(number)
    model = _in_fp64((_qwen if shape.is_qwen else _llava)(shape))
    _spread(model, number)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return Copier(model.eval())


@functools.cache
def original(number: int) -> Any:
    """The model of this architecture, in fp64 so that what should be equal is; never to be wrapped."""
    return fresh(number)


def fresh(number: int) -> Any:
    """Another model of this architecture with the same weights."""
    return _copier(number).copy()
