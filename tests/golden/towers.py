"""transformers' own CLIP, Qwen2-VL and Llama layers, run one by one with what the methods read from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaModel,
    PretrainedConfig,
)
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig, Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2VisionTransformerPretrainedModel,
    Qwen2VLTextModel,
)

from tests.golden.case import UnknownCase

ATTENTION = "vtprune_golden"
CONFIG_KEYS = {
    CLIPVisionConfig: "hidden_size intermediate_size num_hidden_layers num_attention_heads num_channels "
    "image_size patch_size hidden_act layer_norm_eps",
    Qwen2VLVisionConfig: "depth embed_dim hidden_size hidden_act mlp_ratio num_heads in_channels patch_size "
    "spatial_merge_size temporal_patch_size",
    LlamaConfig: "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads hidden_act rms_norm_eps max_position_embeddings attention_bias",
    Qwen2VLTextConfig: "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads hidden_act rms_norm_eps max_position_embeddings",
}


class Recorder:
    """Queries, keys and values (B, H, n, d) of the last layer that ran."""

    def __init__(self) -> None:
        self.chunks: list[tuple[Tensor, Tensor, Tensor]] = []

    def take(self) -> tuple[Tensor, Tensor, Tensor]:
        """What was recorded since the last call; sequences that attended apart are joined."""
        query, key, value = (torch.cat(states, dim=2) for states in zip(*self.chunks, strict=True))
        self.chunks.clear()
        return query, key, value


RECORDER = Recorder()


def recording_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Plain attention that records its inputs, key-value heads repeated."""
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    RECORDER.chunks.append((query, key, value))
    logits = torch.matmul(query * scaling, key.transpose(-1, -2))
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attention_mask, float("-inf"))
    elif attention_mask is not None:
        logits = logits + attention_mask
    return torch.matmul(logits.softmax(dim=-1), value).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, recording_attention)


def clip_tower(config: dict[str, Any], weights: dict[str, Tensor]) -> CLIPVisionModel:
    """A CLIP vision tower with the recorded weights."""
    weights = {name.removeprefix("vision_model."): tensor for name, tensor in weights.items()}
    return filled(CLIPVisionModel, settings(CLIPVisionConfig, config), weights)


def qwen_tower(config: dict[str, Any], weights: dict[str, Tensor]) -> Qwen2VisionTransformerPretrainedModel:
    """A Qwen2-VL vision tower with the recorded weights."""
    return filled(Qwen2VisionTransformerPretrainedModel, settings(Qwen2VLVisionConfig, config), weights)


def llama(config: dict[str, Any], weights: dict[str, Tensor]) -> LlamaModel:
    """A Llama decoder with the recorded weights."""
    rope = {"rope_type": "default", "rope_theta": config.get("rope_theta", 10000.0)}
    return filled(LlamaModel, settings(LlamaConfig, config, rope_parameters=rope), weights)


def qwen_text(config: dict[str, Any], weights: dict[str, Tensor]) -> Qwen2VLTextModel:
    """A Qwen2-VL decoder with the recorded weights."""
    rope = {
        "rope_type": "default",
        "rope_theta": config["rope_theta"],
        "mrope_section": config["rope_scaling"]["mrope_section"],
    }
    return filled(Qwen2VLTextModel, settings(Qwen2VLTextConfig, config, rope_parameters=rope), weights)


def settings(kind: type[PretrainedConfig], config: dict[str, Any], **more: Any) -> PretrainedConfig:
    """A config of today's transformers from one that an older version wrote."""
    known = {key: config[key] for key in CONFIG_KEYS[kind].split() if key in config}
    return kind(**known, **more, bos_token_id=None, eos_token_id=None)


def filled(kind: Callable[..., Any], config: PretrainedConfig, weights: dict[str, Tensor]) -> Any:
    """The model in evaluation mode; raises UnknownCase where the weights are not the model's."""
    model = kind(config).eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = [name for name in missing if "embed_tokens" not in name]
    if missing or unexpected:
        raise UnknownCase(f"weights do not fit {type(model).__name__}: {missing or unexpected}")
    model.config._attn_implementation = ATTENTION
    return model


def causal_mask(tokens: int) -> Tensor:
    """(1, 1, n, n) additive."""
    return torch.full((tokens, tokens), float("-inf")).triu(1)[None, None]


def run_decoder_layer(model: Any, index: int, hidden: Tensor, positions: Tensor) -> Tensor:
    """(B, n, D) after decoder layer `index`; positions: (B, n), or (3, B, n) on Qwen."""
    RECORDER.chunks.clear()
    rotary = model.rotary_emb(hidden, positions)
    return model.layers[index](hidden, attention_mask=causal_mask(hidden.shape[1]), position_embeddings=rotary)


def qwen_block_inputs(tower: Any, pixels: Tensor, grid: Tensor) -> dict[str, Any]:
    """What the tower hands to its first block: hidden_states, cu_seqlens, position_embeddings."""
    seen: dict[str, Any] = {}

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(kwargs, hidden_states=args[0])

    handle = tower.blocks[0].register_forward_pre_hook(look, with_kwargs=True)
    tower(pixels, grid_thw=grid)
    handle.remove()
    return seen
