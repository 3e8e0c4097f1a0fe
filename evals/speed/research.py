"""A decoder-stage method as research code is written: for one prompt, around the model's own layers, with whole maps.

What the released code of such methods does between the layers, to measure against; nothing here prunes for users.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from vtprune.cache.adopting import with_cache
from vtprune.tensors.attention import split_heads
from vtprune.tensors.rotary import rotate


class ResearchModel:
    """A LLaVA at batch 1 whose decoder keeps the columns `plan[layer]` of what it had, before each of these layers.

    ahead: False is FastV's way: the layer before a drop runs eager, its attention over all pairs (H, n, n) is averaged
    over heads, and the last row of that is ranked. (The released code with a cache runs this layer twice, and caches
    its keys twice; not so here.) True is PyramidDrop's way: queries, keys and values of all tokens are computed from
    the next layer's weights, and the last query's attention is ranked. The other layers run as the model has it. The
    ranking is carried out, but the tokens of `plan` are taken, so that all that is compared keeps the same ones.
    """

    def __init__(self, model: Any, plan: dict[int, Tensor], *, ahead: bool) -> None:
        self.model, self.plan, self.ahead = model, plan, ahead
        self.decoder = model.model.language_model
        self._eager = copy.copy(self.decoder.config)
        self._eager._attn_implementation = "eager"
        self._cache, self._length = DynamicCache(), 0

    def prefill(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        """The logits (1, 1, V) of the last token of a prompt (1, L), which starts a new cache."""
        inner = self.model.model
        features = torch.cat(list(inner.get_image_features(pixel_values).pooler_output))
        marks = (input_ids == self.model.config.image_token_id)[..., None]
        hidden = inner.get_input_embeddings()(input_ids)
        hidden = hidden.masked_scatter(marks, features.to(hidden))
        self._cache, self._length = DynamicCache(), input_ids.shape[1]
        positions = torch.arange(self._length, device=hidden.device)[None]
        turn = self.decoder.rotary_emb(hidden, positions)
        for index, layer in enumerate(self.decoder.layers):
            if index in self.plan:
                kept = self.plan[index]
                if self.ahead:
                    rank(self._attention_ahead(layer, hidden, turn), kept)
                hidden, positions = hidden.index_select(1, kept), positions.index_select(1, kept)
                turn = self.decoder.rotary_emb(hidden, positions)
            if not self.ahead and index + 1 in self.plan:
                hidden, attention = self._eager_layer(layer, hidden, turn)
                rank(attention, self.plan[index + 1])
            else:
                hidden = self._layer(layer, hidden, turn)
        return self.model.lm_head(self.decoder.norm(hidden[:, -1:]))

    def step(self, token: Tensor) -> Tensor:
        """The logits (1, 1, V) after one more token (1, 1)."""
        hidden = self.model.get_input_embeddings()(token)
        turn = self.decoder.rotary_emb(hidden, torch.full_like(token, self._length))
        self._length += 1
        for layer in self.decoder.layers:
            hidden = self._layer(layer, hidden, turn)
        return self.model.lm_head(self.decoder.norm(hidden))

    def _layer(self, layer: Any, hidden: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor | None = None) -> Tensor:
        arguments = with_cache(layer.forward, {"position_embeddings": turn, "attention_mask": mask}, self._cache)
        output = layer(hidden, **arguments)
        return output[0] if isinstance(output, tuple) else output

    def _eager_layer(self, layer: Any, hidden: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The layer's output, and the last row (n,) of its attention averaged over heads."""
        length = hidden.shape[1]
        lowest = torch.finfo(hidden.dtype).min
        mask = torch.full((1, 1, length, length), lowest, dtype=hidden.dtype, device=hidden.device).triu(1)
        with self._captured(layer.self_attn) as maps:
            hidden = self._layer(layer, hidden, turn, mask)
        return hidden, maps.pop().mean(dim=1)[0, -1]

    @contextmanager
    def _captured(self, attention: Any) -> Iterator[list[Tensor]]:
        """Runs an attention module eager and keeps the maps (1, H, n, n) that it computes."""
        maps: list[Tensor] = []
        handle = attention.register_forward_hook(lambda module, args, output: maps.append(output[1]))
        own, attention.config = attention.config, self._eager
        try:
            yield maps
        finally:
            attention.config = own
            handle.remove()

    def _attention_ahead(self, layer: Any, hidden: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """(n,) the attention of the last token in the layer to come, averaged over heads."""
        own, config = layer.self_attn, self.decoder.config
        normed = layer.input_layernorm(hidden)
        cos, sin = (part[:, None] for part in turn)
        query = rotate(split_heads(own.q_proj(normed), config.num_attention_heads), cos, sin)
        key = rotate(split_heads(own.k_proj(normed), config.num_key_value_heads), cos, sin)
        own.v_proj(normed)
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        logits = torch.matmul(query[:, :, -1:], key.transpose(2, 3)) * own.scaling
        return logits.softmax(dim=-1, dtype=torch.float32).mean(dim=1)[0, 0]


def rank(attention: Tensor, kept: Tensor) -> Tensor:
    """The places of the `len(kept)` tokens with the most attention (n,), in order."""
    return attention.topk(len(kept)).indices.sort().values
