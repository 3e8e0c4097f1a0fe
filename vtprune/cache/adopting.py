"""A cache, anybody's, on its way into a wrapped model: which kinds can be pruned, and where a forward has it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, LinearAttentionLayer

from vtprune.cache.books import CacheLayer, entry_layers
from vtprune.cache.layer import PrunedLayer
from vtprune.cache.states import StateLayer
from vtprune.errors import UnsupportedCacheError


def adopt_cache(cache: Cache, depth: int, states: frozenset[int] = frozenset()) -> list[CacheLayer]:
    """Turns the layers of a dynamic cache (anybody's) into PrunedLayers, and those of linear attention into
    StateLayers, in place and returns them; states: the decoder layers (of `depth`) that are of linear attention.

    Raises UnsupportedCacheError for static, quantised, sliding-window and offloaded caches.
    """
    if not isinstance(cache, Cache):
        raise UnsupportedCacheError(f"past_key_values must be a transformers Cache, got {type(cache).__name__}")
    reason = unsupported_reason(cache)
    if reason is not None:
        raise unsupported_cache(reason)
    layers: list[Any] = cache.layers
    for index, layer in enumerate(layers):
        if type(layer) is DynamicLayer:
            layers[index] = PrunedLayer.adopt(layer)
        elif type(layer) is LinearAttentionLayer:
            layers[index] = StateLayer.adopt(layer)
    while len(layers) < depth:
        layers.append(StateLayer() if len(layers) in states else PrunedLayer())
    return list(layers)


def unsupported_cache(reason: str) -> UnsupportedCacheError:
    """The exception for a cache that cannot be pruned, `reason` naming it."""
    return UnsupportedCacheError(
        f"{reason} cannot hold layers of different lengths; pass past_key_values=DynamicCache() (made without a "
        "config where the model's own has sliding windows)"
    )


def unsupported_reason(cache: Cache) -> str | None:
    """The name of what vtprune cannot prune in this cache, or None."""
    if getattr(cache, "offloading", False):
        return "an offloaded cache"
    if type(cache) not in (DynamicCache, Cache):
        return f"a {type(cache).__name__}"
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, PrunedLayer, LinearAttentionLayer, StateLayer):
            return f"a cache with {type(layer).__name__} layers"
    replicated = cache.layer_class_to_replicate
    if replicated is not None and replicated is not DynamicLayer:
        return f"a cache of {replicated.__name__} layers"
    return None


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The cache among a forward's arguments: `cache` since transformers 5.24, `past_key_values` before."""
    given = arguments.get("cache")
    return arguments.get("past_key_values") if given is None else given


def with_cache(forward: Callable[..., Any], arguments: dict[str, Any], cache: object) -> dict[str, Any]:
    """The arguments with this cache (or what stands in for one, or None), under the name that `forward` has for it."""
    others = {name: value for name, value in arguments.items() if name not in ("cache", "past_key_values")}
    name = "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"
    return {**others, name: cache}


def is_adopted(cache: object) -> bool:
    """Whether a wrapped model has filled this cache."""
    return bool(entry_layers(getattr(cache, "layers", None) or []))


def logical_length(cache: Cache | None) -> int:
    """Tokens of the sequence so far, dropped ones included."""
    return 0 if cache is None else int(cache.get_seq_length())


def all_slots(length: int, batch: int, device: torch.device) -> Tensor:
    """(B, length) slots of a layer that dropped nothing."""
    return torch.arange(length, device=device).expand(batch, length)
