"""Sizes that families share, read from a transformers config: the decoder, and what stands around the tower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vtprune.cost.sizes import ModelCost, TransformerCost, VisionCost
from vtprune.errors import UnsupportedModelError

# Decoders that are Llama's kin; add one here once its layers are known to be.
DECODERS = ("llama", "mistral", "qwen2", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text")


def model_sizes(config: Any, vision: VisionCost, projector_macs: int, *, planes: int = 0) -> ModelCost:
    """The sizes of a whole model; planes: as in `ModelCost`. Raises UnsupportedModelError for a decoder that is no
    kin of Llama's."""
    text = config.text_config
    if text.model_type not in DECODERS:
        raise UnsupportedModelError(f"no cost for decoder {text.model_type!r}; supported: {', '.join(DECODERS)}")
    head = text.hidden_size * text.vocab_size
    return ModelCost(vision, projector_macs, decoder_sizes(text), head, planes=planes)


def decoder_sizes(text: Any) -> TransformerCost:
    """Llama and its kin: grouped queries, gated MLP or a mixture of such; raises UnsupportedModelError where layers
    differ."""
    heads = text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    experts = getattr(text, "num_experts", None) or 0
    if experts and (text.decoder_sparse_step != 1 or text.mlp_only_layers):
        raise UnsupportedModelError(
            "no cost for a decoder of which some layers have experts and others have none (decoder_sparse_step "
            f"{text.decoder_sparse_step}, mlp_only_layers {text.mlp_only_layers})"
        )
    return TransformerCost(
        width=text.hidden_size,
        heads=heads,
        query_width=heads * head,
        kv_width=kv_heads * head,
        mlp_width=text.num_experts_per_tok * text.moe_intermediate_size if experts else text.intermediate_size,
        mlp_matrices=3,
        layers=text.num_hidden_layers,
        experts=experts,
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
