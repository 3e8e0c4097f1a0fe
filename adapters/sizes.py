"""Sizes that families share, read from a transformers config: the decoder, and what stands around the tower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vtprune.cost.sizes import DeltaCost, ModelCost, TransformerCost, VisionCost
from vtprune.errors import UnsupportedModelError

# Decoders that are Llama's kin; add one here once its layers are known to be.
DECODERS = (
    "llama",
    "mistral",
    "qwen2",
    "qwen2_vl_text",
    "qwen2_5_vl_text",
    "qwen3_vl_text",
    "qwen3_vl_moe_text",
    "qwen3_5_text",
    "qwen3_5_moe_text",
)
# Those of them whose attention has a gate on what it puts out.
GATED = ("qwen3_5_text", "qwen3_5_moe_text")
LINEAR = "linear_attention"


def model_sizes(config: Any, vision: VisionCost, projector_macs: int, *, planes: int = 0) -> ModelCost:
    """The sizes of a whole model; planes: as in `ModelCost`. Raises UnsupportedModelError for a decoder that is no
    kin of Llama's."""
    text = config.text_config
    if text.model_type not in DECODERS:
        raise UnsupportedModelError(f"no cost for decoder {text.model_type!r}; supported: {', '.join(DECODERS)}")
    head = text.hidden_size * text.vocab_size
    return ModelCost(vision, projector_macs, decoder_sizes(text), head, planes=planes)


def decoder_sizes(text: Any) -> TransformerCost:
    """Llama and its kin: grouped queries, gated MLP or a mixture of such, linear attention in some layers; raises
    UnsupportedModelError where layers differ otherwise."""
    heads = text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    experts = getattr(text, "num_experts", None) or 0
    sparse, dense = getattr(text, "decoder_sparse_step", 1), getattr(text, "mlp_only_layers", None)
    if experts and (sparse != 1 or dense):
        raise UnsupportedModelError(
            "no cost for a decoder of which some layers have experts and others have none (decoder_sparse_step "
            f"{sparse}, mlp_only_layers {dense})"
        )
    shared = getattr(text, "shared_expert_intermediate_size", None) or 0
    states = state_layers(text)
    return TransformerCost(
        width=text.hidden_size,
        heads=heads,
        query_width=heads * head,
        kv_width=kv_heads * head,
        mlp_width=text.num_experts_per_tok * text.moe_intermediate_size + shared
        if experts
        else text.intermediate_size,
        mlp_matrices=3,
        layers=text.num_hidden_layers,
        experts=experts + (shared > 0),
        gated=text.model_type in GATED,
        delta=_delta_sizes(text) if states else None,
        states=states,
    )


def state_layers(text: Any) -> frozenset[int]:
    """The layers of a decoder that are of linear attention."""
    kinds = getattr(text, "layer_types", None) or ()
    return frozenset(layer for layer, kind in enumerate(kinds) if kind == LINEAR)


def _delta_sizes(text: Any) -> DeltaCost:
    return DeltaCost(
        heads=text.linear_num_value_heads,
        key_heads=text.linear_num_key_heads,
        key_size=text.linear_key_head_dim,
        value_size=text.linear_value_head_dim,
        kernel=text.linear_conv_kernel_dim,
    )


def tower_sizes(width: int, heads: int, mlp_width: int, *, gated: bool, layers: int) -> TransformerCost:
    """A vision tower whose heads share its width."""
    return TransformerCost(
        width=width,
        heads=heads,
        query_width=width,
        kv_width=width,
        mlp_width=mlp_width,
        mlp_matrices=3 if gated else 2,
        layers=layers,
    )


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """A size given as one int or as (height, width)."""
    return (size[0], size[1]) if isinstance(size, Sequence) else (size, size)
