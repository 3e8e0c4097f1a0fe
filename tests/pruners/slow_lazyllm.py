"""LazyLLM token by token on an unwrapped model, for one row: sets and dictionaries, and nothing of vtprune; and how
the tests feed a cache."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tests.models import IMAGE, PAST
from tests.oracle import through_norm

Sets = list[set[int]]


@dataclass
class SlowLazyLLM:
    """ids: (L,) every token that will be fed; embeds: (L, D); positions: (..., 1, L); images: the places of each of
    them; boundaries: the layers before which tokens drop; added: (L, D) what the first layers are followed by.

    hidden[layer][place]: the layer's input for a token; states[layer][place]: its key and value. attended, computed:
    by forward and layer, the vision tokens that the new tokens attended to, and those that were computed.
    """

    model: Any
    ids: Tensor
    embeds: Tensor
    positions: Tensor
    images: list[list[int]]
    boundaries: tuple[int, ...]
    ratio: float = 0.3
    added: list[Tensor] = field(default_factory=list)
    fed: int = 0
    attended: list[Sets] = field(default_factory=list)
    computed: list[Sets] = field(default_factory=list)
    queries: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layers = self.model.model.language_model.layers
        self.hidden: list[dict[int, Tensor]] = [{} for _ in range(len(self.layers) + 1)]
        self.states: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in self.layers]

    def feed(self, count: int) -> Tensor:
        """Logits (count, V) of the next tokens; those of vision tokens that were left out are zero."""
        new = list(range(self.fed, self.fed + count))
        self.fed += count
        for place in new:
            self.hidden[0][place] = self.embeds[place]
        taking = {place for image in self.images for place in image if place < self.fed}
        words = [place for place in range(self.fed) if self.ids[place] != IMAGE]
        self.attended.append([])
        self.computed.append([])
        for index in range(len(self.layers)):
            due = {place for place in new if place in words}
            due |= {place for place in taking if place not in self.states[index]}
            self._project(index, sorted(due))
            held = set(self.states[index])
            rows = {}
            for place in sorted(due):
                seen = held if place < new[0] else set(words) | taking
                rows[place] = self._attend(index, place, sorted(one for one in seen if one <= place))
            self.attended[-1].append(set(taking))
            self.computed[-1].append({place for place in due if place not in words})
            if index + 1 in self.boundaries:
                taking = self._choose(index + 1, taking, rows[new[-1]], new[0])
        logits = torch.zeros(count, self.model.config.get_text_config().vocab_size)
        for row, place in enumerate(new):
            if place in self.hidden[-1]:
                logits[row] = self.model.lm_head(self.model.model.language_model.norm(self.hidden[-1][place]))
        return logits

    def _choose(self, layer: int, taking: set[int], row: dict[int, Tensor], start: int) -> set[int]:
        """The tokens of each image that the last one attends to most; where an image is new, within this turn."""
        factor = (1 - self.ratio) ** sum(boundary <= layer for boundary in self.boundaries)
        chosen = set()
        for image in self.images:
            count = max(1, math.floor(factor * len(image) + 1e-6))
            new = bool(image) and image[0] >= start
            logits = {place: score for place, score in row.items() if place >= start or not new}
            weights = torch.stack(list(logits.values()), dim=-1).softmax(dim=-1).mean(dim=0)
            scores = dict(zip(logits, weights.tolist(), strict=True))
            alive = [place for place in image if place in taking]
            chosen |= set(sorted(alive, key=lambda place: (-scores[place], place))[:count])
        return chosen

    def _project(self, index: int, due: list[int]) -> None:
        """Queries, keys and values of tokens that have none yet."""
        self.queries = {}
        layer, decoder = self.layers[index], self.model.model.language_model
        for place in due:
            assert place not in self.states[index], "computed twice"
            normed = layer.input_layernorm(self.hidden[index][place])
            attention = layer.self_attn
            q, k, v = (part(normed).view(1, -1, 1, attention.head_dim) for part in
                       (attention.q_proj, attention.k_proj, attention.v_proj))  # fmt: skip
            q, k = through_norm(attention, "q", q), through_norm(attention, "k", k)
            q, k = apply_rotary_pos_emb(q, k, *decoder.rotary_emb(normed, self.positions[..., place : place + 1]))
            self.states[index][place] = (k[0, :, 0], v[0, :, 0])
            self.queries[place] = q[0, :, 0]

    def _attend(self, index: int, place: int, seen: list[int]) -> dict[int, Tensor]:
        """Runs one token through the layer; the logits (H,) of its attention, by place."""
        layer, query = self.layers[index], self.queries[place]
        groups = layer.self_attn.num_key_value_groups
        keys = torch.stack([self.states[index][one][0] for one in seen]).repeat_interleave(groups, dim=1)
        values = torch.stack([self.states[index][one][1] for one in seen]).repeat_interleave(groups, dim=1)
        logits = (keys * query).sum(dim=-1) * layer.self_attn.scaling
        mixed = (logits.softmax(dim=0)[..., None] * values).sum(dim=0)
        state = self.hidden[index][place] + layer.self_attn.o_proj(mixed.flatten())
        # Experts take rows of tokens.
        state = state + layer.mlp(layer.post_attention_layernorm(state)[None, None])[0, 0]
        self.hidden[index + 1][place] = state + self.added[index][place] if index < len(self.added) else state
        return dict(zip(seen, logits, strict=True))


@torch.no_grad()
def turn(model: Any, inputs: dict[str, Tensor], cache: Any = None) -> Any:
    """What a model answers to a prompt, on a cache."""
    return model(**inputs, **{PAST: DynamicCache() if cache is None else cache}, use_cache=True)


@torch.no_grad()
def steps(model: Any, cache: Any, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits (B, n, V) after feeding tokens (B, n) one by one."""
    logits = []
    for column in tokens.split(1, dim=1):
        extra = {}
        if mask is not None:
            mask = torch.cat([mask, torch.ones_like(column)], dim=1)
            extra["attention_mask"] = mask
        logits.append(model(input_ids=column, **{PAST: cache}, **extra).logits)
    return torch.cat(logits, dim=1)
