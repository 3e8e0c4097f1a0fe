"""How timm's ViT attends and pools, for methods that act in it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.adapters.timm import TimmTower
from vtprune.encoder.blocks import BlockEncoding
from vtprune.hooks.installing import Installed
from vtprune.hooks.tower import TowerHooks, weighted_mean


class TimmHooks(TowerHooks):
    """Blocks whose one projection shows queries, keys and values; a pool that may attend."""

    def install(self, installed: Installed, layers: dict[int, Any]) -> None:
        trunk = self.tower.tower
        installed.override(trunk, "pool", self._pooling(trunk.pool))
        if trunk.attn_pool is not None:
            installed.override(trunk.attn_pool, "forward", self._attending(trunk.attn_pool.forward))
        for index, layer in layers.items():
            installed.after(layer.attn.qkv, functools.partial(self._seen, index, layer))

    def _seen(self, index: int, layer: Any, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Shows the queries, keys and values of a block to those who ask for them."""
        encoding, sink = self.state.encoding, self.state.sink()
        if sink is None or output is None or not isinstance(encoding, BlockEncoding):
            return
        if self.asks(encoding, index):
            assert isinstance(self.tower, TimmTower)
            sink.update(zip("qkv", self.tower.split(layer, output), strict=True))

    def _left(self) -> Tensor | None:
        """(B, P + N) how many patches each token stands for, 1 for a CLS token, None where nothing has dropped."""
        encoding = self.state.encoding
        if not isinstance(encoding, BlockEncoding) or not encoding.dropped:
            return None
        return torch.nn.functional.pad(encoding.full_sizes()[1], (encoding.prefix, 0), value=1)

    def _pooling(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """What stands for the pooling: the mean is that of the tokens that are left, each weighed by the patches that
        it stands for."""
        trunk = self.tower.tower

        @functools.wraps(original)
        def pool(x: Tensor, pool_type: str | None = None) -> Tensor:
            left, kind = self._left(), trunk.global_pool if pool_type is None else pool_type
            if left is None or trunk.attn_pool is not None or kind != "avg":
                return original(x, pool_type)
            first = 0 if trunk.pool_include_prefix else trunk.num_prefix_tokens
            return weighted_mean(x[:, first:], left[:, first:])

        return pool

    def _attending(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """What stands for a pool that attends: tokens weigh as many patches as they stand for, and none that is gone
        is seen."""
        trunk = self.tower.tower

        @functools.wraps(original)
        def attend(x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
            left = self._left()
            if left is None:
                return original(x, attn_mask)
            first = 0 if trunk.pool_include_prefix else trunk.num_prefix_tokens
            return original(x, left[:, None, None, first:].log().to(x.dtype))

        return attend
