"""D2O by hand, for one row alone: full attention maps, and a list of entries for each head of each layer.

Nothing here uses vtprune; loops are plain so that they can be read against the paper's rule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.models import IMAGE
from tests.oracle import added, embeddings_of, positions_of, through_norm


@dataclass
class Entry:
    """A key and a value; image: which of the row's images it belongs to, 0 for text."""

    place: int
    image: int
    key: Tensor
    value: Tensor
    score: float = 0.0


@dataclass
class Rule:
    """The hyper-parameters."""

    keep: int | float = 0.2
    merge: bool = True
    text: bool = False
    released: bool = False


class Reference:
    """An unwrapped model's decoder, and the caches that the rule cuts."""

    def __init__(self, kind: str, model: Any, rule: Rule) -> None:
        self.kind, self.model, self.rule = kind, model, rule
        self.decoder = model.model.language_model
        config = model.config.get_text_config()
        self.heads, self.shared = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
        self.depth = config.num_hidden_layers
        self.caches: list[list[list[Entry]]] = [[[] for _ in range(self.heads)] for _ in range(self.depth)]
        # The layers that may be cut: all that hold entries but the first two and the last.
        self.cut = [n for n in range(2, self.depth - 1) if hasattr(self.decoder.layers[n], "self_attn")]
        self.density: dict[int, float] = {}
        # What linear-attention layers have seen so far.
        self.seen: dict[int, Tensor] = {}
        self.totals: dict[int, int] = {}
        self.sizes: dict[int, int] = {}
        self.thresholds: dict[int, float] = {}
        self.sets: list[list[list[list[int]]]] = []
        # What is added after the first layers, (L, D) each.
        self.added: list[Tensor] = []

    @torch.no_grad()
    def run(self, inputs: dict[str, Tensor], tokens: Tensor, first: int = 1) -> Tensor:
        """Logits (L + n, V) of a prompt of one row and of each of `tokens` (1, n), `first` of which come at once, the
        others one by one."""
        ids = torch.cat([inputs["input_ids"], tokens], dim=1)
        length = inputs["input_ids"].shape[1]
        states = embeddings_of(self.model, inputs, ids, None)
        cos, sin = self.decoder.rotary_emb(states, positions_of(self.kind, self.model, inputs, ids.shape[1]))
        marks = self._marks(ids[0], inputs)
        self.added = [plane[0] for plane in added(self.model, inputs, ids)]
        logits = []
        ends = [length, *range(length + first, ids.shape[1] + 1)]
        for start, end in zip([0, *ends], ends, strict=False):
            part = slice(start, end)
            logits.append(self._forward(states[0, part], cos[0, part], sin[0, part], marks[part], start))
            if start:
                self._cut(end)
            self.sets.append(self._held())
        return torch.cat(logits)

    def _marks(self, ids: Tensor, inputs: dict[str, Tensor]) -> list[int]:
        if self.kind.startswith("qwen"):
            lengths = [int(grid.prod()) // 4 for grid in inputs["image_grid_thw"]]
        else:
            lengths = [int((ids == IMAGE).sum()) // len(inputs["pixel_values"])] * len(inputs["pixel_values"])
        order = [number + 1 for number, count in enumerate(lengths) for _ in range(count)]
        self.totals = {number + 1: count for number, count in enumerate(lengths)}
        return [order.pop(0) if token == IMAGE else 0 for token in ids.tolist()]

    def _forward(self, states: Tensor, cos: Tensor, sin: Tensor, marks: list[int], first: int) -> Tensor:
        for index, layer in enumerate(self.decoder.layers):
            normed = layer.input_layernorm(states)
            if not hasattr(layer, "self_attn"):
                # No state is kept: it reads all from the beginning.
                self.seen[index] = torch.cat([self.seen.get(index, normed[:0]), normed])
                states = states + layer.linear_attn(self.seen[index][None])[0, first:]
                states = states + layer.mlp(layer.post_attention_layernorm(states)[None])[0]
                continue
            attention = layer.self_attn
            query, key, value = (
                part(normed).unflatten(-1, (heads, -1)).transpose(0, 1)
                for part, heads in (
                    (attention.q_proj, self.heads * self.shared),
                    (attention.k_proj, self.heads),
                    (attention.v_proj, self.heads),
                )
            )
            # Some families project a gate beside each query.
            query, gate = query[..., : attention.head_dim], query[..., attention.head_dim :]
            query, key = through_norm(attention, "q", query), through_norm(attention, "k", key)
            query, key = _turn(query, cos, sin), _turn(key, cos, sin)
            for head, entries in enumerate(self.caches[index]):
                for token in range(len(normed)):
                    entries.append(Entry(first + token, marks[token], key[head, token], value[head, token]))
            mixed, columns = [], []
            for head in range(len(query)):
                entries = self.caches[index][head // self.shared]
                keys, values = torch.stack([e.key for e in entries]), torch.stack([e.value for e in entries])
                weights = query[head] @ keys.T * attention.head_dim**-0.5
                for token in range(len(normed)):
                    weights[token, len(entries) - len(normed) + token + 1 :] = -math.inf
                weights = weights.softmax(dim=-1)
                mixed.append(weights @ values)
                columns.append(weights.sum(dim=0))
                for entry, got in zip(entries, columns[-1].tolist(), strict=True):
                    entry.score += got
            if first == 0:
                self.density[index] = self._density(columns)
            if gate.numel():
                mixed = [one * open.sigmoid() for one, open in zip(mixed, gate, strict=True)]
            states = states + attention.o_proj(torch.cat(mixed, dim=-1))
            states = states + layer.mlp(layer.post_attention_layernorm(states)[None])[0]
            if index < len(self.added):
                states = states + self.added[index][first : first + len(states)]
        return self.model.lm_head(self.decoder.norm(states))

    def _density(self, columns: list[Tensor]) -> float:
        if self.rule.released:
            spread = [float(column.var()) for column in columns]
            return sum((v - min(spread)) / (max(spread) - min(spread) + 1e-6) for v in spread) / len(spread)
        grouped = [sum(columns[h * self.shared : (h + 1) * self.shared]) / self.shared for h in range(self.heads)]
        return sum(float(column.var()) for column in grouped) / self.heads / len(columns[0])

    def _counts(self, held: int, tokens: int) -> list[int]:
        """Entries of an image (or of the whole row) that the layers that may be cut, one or two, keep."""
        keep = self.rule.keep
        budget = min(keep, tokens) if isinstance(keep, int) else max(1, round(keep * tokens))
        if self.rule.released:
            whole, layers = sum(math.exp(-f) for f in self.density.values()), len(self.density)
            ratios = [math.exp(-self.density[layer]) / whole * layers * budget / tokens for layer in self.cut]
            return [max(1, int(tokens * min(1.0, max(0.01, ratio)))) for ratio in ratios]
        if len(self.cut) == 1:
            return [budget]
        first, second = (math.exp(-self.density[layer]) for layer in self.cut)
        ideal = min(max(2 * budget * first / (first + second), 2 * budget - held, 1), held, 2 * budget - 1)
        lower = int(ideal + 1e-6)
        # With two layers both remainders are the same but for the whole numbers: the larger one gets what is left.
        rest = ideal - lower
        count = lower + (1 if rest >= 0.5 else 0)
        return [count, 2 * budget - count]

    def _cut(self, length: int) -> None:
        if self.rule.text:
            if not self.sizes:
                self.sizes = dict(zip(self.cut, self._counts(length, length), strict=True))
            for layer, size in self.sizes.items():
                self._cut_row(layer, size)
        elif self.totals:
            for image, total in self.totals.items():
                for layer, count in zip(self.cut, self._counts(total, total), strict=True):
                    self._cut_image(layer, image, count)
            self.totals = {}

    def _cut_image(self, layer: int, image: int, count: int) -> None:
        choices = []
        for entries in self.caches[layer]:
            own = [entry for entry in entries if entry.image == image]
            best = sorted(own, key=lambda entry: (-entry.score, entry.place))[:count]
            kept = [entry for entry in own if any(entry is one for one in best)]
            choices.append((kept, [entry for entry in own if not any(entry is one for one in best)]))
        self._let_go(layer, choices, None)

    def _cut_row(self, layer: int, size: int) -> None:
        choices = []
        for entries in self.caches[layer]:
            recent = size // 2
            older = entries[: len(entries) - recent]
            order = sorted(older[4:], key=lambda entry: (-entry.score, entry.place))
            best = (older[:4] + order)[: size - recent]
            kept = [entry for entry in older if any(entry is one for one in best)] + entries[len(entries) - recent :]
            choices.append((kept, [entry for entry in older if not any(entry is one for one in best)]))
        self._let_go(layer, choices, self.thresholds.get(layer))

    def _let_go(self, layer: int, choices: list[tuple[list[Entry], list[Entry]]], before: float | None) -> None:
        alike, nearest = [], []
        for kept, evicted in choices:
            cosines = [
                [float(torch.nn.functional.cosine_similarity(e.key, k.key, dim=0)) for k in kept] for e in evicted
            ]
            alike.append([max(row) for row in cosines])
            nearest.append([row.index(max(row)) for row in cosines])
        flat = [one for head in alike for one in head]
        if self.rule.merge and flat:
            tau = sum(flat) / len(flat)
            tau = tau if before is None else 0.5 * before + 0.5 * tau
            if self.rule.text:
                self.thresholds[layer] = tau
            for head, (kept, evicted) in enumerate(choices):
                arrivals: dict[int, list[tuple[float, Entry]]] = {}
                for order, entry in enumerate(evicted):
                    decisive = alike[head][order]
                    if self.rule.released:
                        decisive = sum(one[order] for one in alike) / len(alike)
                    if decisive >= tau - 1e-9:
                        arrivals.setdefault(nearest[head][order], []).append((alike[head][order], entry))
                for place, came in arrivals.items():
                    survivor = kept[place]
                    survivor.key = (survivor.key + sum(w * e.key for w, e in came)) / (1 + len(came))
                    survivor.value = (survivor.value + sum(w * e.value for w, e in came)) / (1 + len(came))
        for head, (_, evicted) in enumerate(choices):
            self.caches[layer][head] = [e for e in self.caches[layer][head] if not any(e is one for one in evicted)]

    def _held(self) -> list[list[list[int]]]:
        """Places by layer and head."""
        return [[[entry.place for entry in entries] for entries in layer] for layer in self.caches]


def _turn(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turning, still = states[..., : cos.shape[-1]], states[..., cos.shape[-1] :]
    half = cos.shape[-1] // 2
    turned = turning * cos + torch.cat([-turning[..., half:], turning[..., :half]], dim=-1) * sin
    return torch.cat([turned, still], dim=-1)
