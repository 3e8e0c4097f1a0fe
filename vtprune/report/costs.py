"""FLOPs and KV-cache bytes of one prefill, from a transformers config: `vtprune.flops` and `vtprune.kv_bytes`.

cost.md (in vtprune/cost) says line by line what is counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vtprune.adapters import model_cost
from vtprune.cost.formulas import FlopsBreakdown, cache_bytes, prefill_flops
from vtprune.cost.sizes import Alive, PlannedTokens


def flops(
    config: Any,
    tokens_per_layer: int | Sequence[int],
    *,
    text_tokens: int | Sequence[int],
    images: int | Sequence[Sequence[int]],
    convention: str = "exact",
    encoder_tokens_per_layer: Sequence[Sequence[Alive]] | None = None,
    encoder_mlp_tokens_per_layer: Sequence[Sequence[int]] | None = None,
    projector_tokens: int | None = None,
    plane_tokens: int | None = None,
    read_tokens_per_layer: int | Sequence[int] = 0,
    keys_alone: bool = False,
    planned: Mapping[int, PlannedTokens] | None = None,
    scoring: int = 0,
    logits: int = 1,
) -> FlopsBreakdown:
    """FLOPs to prefill one row at batch 1, from a model config.

    tokens_per_layer, text_tokens: vision and text tokens that each decoder layer processes (one int for all);
    images: a number of images, or grids (t, h, w) in decoder tokens; 0 if the features came from elsewhere;
    convention: "exact", or the papers' "2ndm" and "3ndm" (decoder alone, multiply-accumulates);
    `encoder_tokens_per_layer[image][layer]`: patches left in an encoder layer (CLS not among them), or the
    lengths (all tokens) of its attention segments; None if all; encoder_mlp_tokens_per_layer: the same for all
    tokens that go through its MLP, None if what its attention sees; projector_tokens: tokens through the
    projector, None for all; plane_tokens: tokens through the modules that make what the decoder adds between its
    layers (deepstack), of all of them together; read_tokens_per_layer: tokens that skip a decoder layer and are still
    attended to in it, by keys and values that it makes of them; keys_alone: whether it makes their keys alone;
    planned: by decoder layer, what it does with vision where that is less than the model's own (`PlannedTokens`);
    scoring: FLOPs of the method itself; logits: positions through the head.
    Raises VTPruneError for bad counts and lengths, plans that a layer cannot have, an unknown convention or an unknown
    model.
    """
    return prefill_flops(
        model_cost(config),
        tokens_per_layer,
        text_tokens=text_tokens,
        images=images,
        convention=convention,
        encoder_tokens_per_layer=encoder_tokens_per_layer,
        encoder_mlp_tokens_per_layer=encoder_mlp_tokens_per_layer,
        projector_tokens=projector_tokens,
        plane_tokens=plane_tokens,
        read_tokens_per_layer=read_tokens_per_layer,
        keys_alone=keys_alone,
        planned=planned,
        scoring=scoring,
        logits=logits,
    )


def kv_bytes(config: Any, kv_tokens_per_layer: int | Sequence[int], dtype: torch.dtype | str) -> int:
    """Bytes of one row's keys and values, from the entries (vision and text) that each decoder layer holds, and of the
    states of its linear-attention layers.

    kv_tokens_per_layer: one count a layer (0 in those of linear attention), or one int for all that hold entries;
    dtype: a torch dtype or its name ("bfloat16").
    Raises VTPruneError for a wrong length, negative counts, entries in a layer of linear attention, or an unknown
    dtype.
    """
    return cache_bytes(model_cost(config).decoder, kv_tokens_per_layer, dtype)
