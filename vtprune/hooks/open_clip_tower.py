"""How open_clip's ViT attends and pools, for methods that act in it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vtprune.encoder.blocks import BlockEncoding
from vtprune.hooks.installing import Installed
from vtprune.hooks.tower import TowerHooks, weighted_mean
from vtprune.tensors.attention import split_heads


class OpenClipHooks(TowerHooks):
    """Blocks with `nn.MultiheadAttention`, whose insides nobody sees unless it runs in parts."""

    def install(self, installed: Installed, layers: dict[int, Any]) -> None:
        visual = self.tower.tower
        installed.override(visual, "_global_pool", self._pooling(visual._global_pool))
        for index, layer in layers.items():
            installed.override(layer.attn, "forward", self._attention(index, layer, layer.attn.forward))

    def _attention(self, index: int, layer: Any, original: Callable[..., Any]) -> Callable[..., Any]:
        """What stands for the forward of a block's attention where a method looks at the block: the same, with
        queries, keys and values that can be seen."""

        module: nn.MultiheadAttention = layer.attn

        @functools.wraps(original)
        def forward(query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
            encoding, sink = self.state.encoding, self.state.sink()
            if sink is None or not isinstance(encoding, BlockEncoding) or not self.asks(encoding, index):
                answer: tuple[Tensor, None] = original(query, *args, **kwargs)
                return answer
            made = self.tower.attention_states(layer, encoding.turned(query))
            sink.update(zip("qkv", made, strict=True))
            q, k, v = (split_heads(one, module.num_heads) for one in made)
            mask = kwargs.get("attn_mask")
            if mask is not None:
                mask = mask.unflatten(0, (-1, module.num_heads))
            dropout = module.dropout if module.training else 0.0
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
            return encoding.turned(module.out_proj(mixed.transpose(1, 2).flatten(2))), None

        return forward

    def _pooling(
        self, original: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """What stands for the pooling: the mean is that of the tokens that are left, each weighed by the patches
        that it stands for; tokens that are gone are zeros."""

        @functools.wraps(original)
        def pool(x: Tensor) -> tuple[Tensor, Tensor]:
            pooled, tokens = original(x)
            encoding = self.state.encoding
            if not isinstance(encoding, BlockEncoding) or not encoding.dropped:
                return pooled, tokens
            left, sizes = encoding.full_sizes()
            if self.tower.tower.pool_type == "avg":
                pooled = weighted_mean(tokens, sizes)
            return pooled, tokens.masked_fill(~left[..., None], 0)

        return pool
