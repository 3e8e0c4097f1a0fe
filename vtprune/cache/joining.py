"""Keys and values that a layer brings to its attention beside those of the tokens that it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from vtprune.tensors.compaction import gather_tokens


@dataclass(frozen=True)
class Joining:
    """Stands in for the cache of one layer, with or without one behind it: what the attention appends is joined with
    the keys and values (B, Hkv, s, d) of tokens that skip the layer.

    order: (B, n) where each token stands in the row of the computed ones, and behind them those that skip; or, for one
    row without padding, columns: (m,) and (s,) where both stand among all n.
    """

    cache: Cache | None
    key: Tensor
    value: Tensor
    order: Tensor | None = None
    columns: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of the layer, (B, Hkv, k, d), after appending those of all tokens in their order."""
        key, value = self._joined(key_states, self.key), self._joined(value_states, self.value)
        if self.cache is None:
            return key, value
        return self.cache.update(key, value, *args, **kwargs)

    def _joined(self, own: Tensor, skipped: Tensor) -> Tensor:
        if self.columns is not None:
            first, others = (columns.to(own.device) for columns in self.columns)
            both = own.new_empty(*own.shape[:2], len(first) + len(others), own.shape[3])
            return both.index_copy_(2, first, own).index_copy_(2, others, skipped.to(own))
        assert self.order is not None
        both = torch.cat([own, skipped.to(own)], dim=2).transpose(1, 2)
        return gather_tokens(both, self.order).transpose(1, 2)
