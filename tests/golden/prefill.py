"""A Llama decoder with recorded weights: a prefill that a method prunes between layers, and one decode step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.golden import towers
from tests.golden.case import Case
from vtprune.method.pruner import Pruner
from vtprune.method.stages import Query
from vtprune.method.views import DecoderLayer
from vtprune.tensors.rotary import rotate

HIDDEN = {"atol": 1e-4, "rtol": 1e-4}
CONFIG = {
    "hidden": "hidden_size",
    "inter": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "rope": "rope_theta",
    "rope_theta": "rope_theta",
    "eps": "rms_norm_eps",
}


def decoder(case: Case) -> Any:
    """The recorded decoder; without "kv_heads" it has as many key heads as query heads."""
    given = case.setting("cfg")
    config = {CONFIG[name]: value for name, value in given.items() if name in CONFIG}
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    return towers.llama({**config, "vocab_size": 2}, case.weights())


@dataclass
class Cached:
    """What a layer holds: places of the prompt, and (H, n, d) keys and values, key-value heads repeated."""

    places: Tensor
    key: Tensor
    value: Tensor


@dataclass
class Prefill:
    """The run so far. hidden: (1, n, D); places: (n,) of the whole prompt that are alive; vision: (start, tokens) of
    its image; compact: whether positions are renumbered in every layer; selected: (scores, kept places) by layer."""

    model: Any
    pruner: Pruner
    hidden: Tensor
    vision: tuple[int, int]
    compact: bool = False

    def __post_init__(self) -> None:
        self.places = torch.arange(self.hidden.shape[1])
        self.length = self.hidden.shape[1]
        self.caches: list[Cached] = []
        self.seen: dict[int, DecoderLayer] = {}

    def run(self, budgets: dict[int, int]) -> Tensor:
        """(1, n, D) after the last norm; budgets: how many tokens go on after a layer."""
        for index in range(len(self.model.layers)):
            numbers = torch.arange(self.places.numel()) if self.compact else self.places
            self.hidden = towers.run_decoder_layer(self.model, index, self.hidden, numbers[None])
            query, key, value = (states[0] for states in towers.RECORDER.take())
            self.caches.append(Cached(self.places, key, value))
            if index in budgets:
                if self.pruner.query is Query.NEXT_LAYER:
                    query, key = self.ahead(index + 1, numbers)
                self.drop(self.layer(index, budgets[index], query, key))
        return self.model.norm(self.hidden)

    def ahead(self, index: int, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """The last token's query (H, 1, d) and all keys (H, n, d) of a layer that did not run yet."""
        query, key, _ = project(self.model, index, self.hidden, numbers)
        return query[0, :, -1:], key[0]

    def layer(self, index: int, budget: int, query: Tensor, key: Tensor) -> DecoderLayer:
        """What the method sees after layer `index`."""
        start, tokens = self.vision
        image = (self.places >= start) & (self.places < start + tokens)
        span = image.nonzero().flatten()
        return DecoderLayer(
            query=query, key=key, value=key[:, :0], vision=span, last=self.places.numel() - 1,
            scale=query.shape[-1] ** -0.5, total=tokens, indices=self.places[span] - start, budget=budget,
            index=index, depth=len(self.model.layers), text=(~image).nonzero().flatten(), memory={}, entered=tokens,
        )  # fmt: skip

    def drop(self, layer: DecoderLayer) -> None:
        """Asks the method, and lets go of what it does not keep."""
        self.seen[layer.index] = layer
        selection = self.pruner.prune_decoder(layer)
        if selection is not None:
            stay = torch.ones(self.places.numel(), dtype=torch.bool)
            stay[layer.vision] = False
            stay[layer.vision[selection.kept]] = True
            self.hidden, self.places = self.hidden[:, stay], self.places[stay]

    def lengths(self) -> Tensor:
        """(layers,) entries in each layer's cache."""
        return torch.tensor([cached.places.numel() for cached in self.caches])

    def decode(self, hidden: Tensor) -> Tensor:
        """(1, 1, D) after one more token: at the length of the whole prompt, or of each layer's own cache."""
        positions = self.lengths().tolist() if self.compact else [self.length] * len(self.caches)
        return decode(self.model, hidden, self.caches, positions)


def project(model: Any, index: int, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v (B, H, n, d) of decoder layer `index`, key-value heads repeated; positions: (n,)."""
    layer = model.layers[index]
    cos, sin = (part[:, None] for part in model.rotary_emb(hidden, positions[None]))
    states, own = layer.input_layernorm(hidden), layer.self_attn
    query, key, value = (
        projection(states).unflatten(-1, (-1, own.head_dim)).transpose(1, 2)
        for projection in (own.q_proj, own.k_proj, own.v_proj)
    )
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, dim=1) for part in (rotate(key, cos, sin), value))
    return rotate(query, cos, sin), key, value


def decode(model: Any, hidden: Tensor, caches: list[Cached], positions: list[int], *, grow: bool = False) -> Tensor:
    """(1, 1, D) after one more token, at its own position in each layer; grow: its keys and values stay."""
    for index, (layer, cached, position) in enumerate(zip(model.layers, caches, positions, strict=True)):
        query, key, value = project(model, index, hidden, torch.tensor([position]))
        keys, values = torch.cat([cached.key[None], key], dim=2), torch.cat([cached.value[None], value], dim=2)
        if grow:
            cached.key, cached.value = keys[0], values[0]
        attended, _ = towers.recording_attention(layer.self_attn, query, keys, values, None, layer.self_attn.scaling)
        hidden = hidden + layer.self_attn.o_proj(attended.flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    towers.RECORDER.chunks.clear()
    return model.norm(hidden)
