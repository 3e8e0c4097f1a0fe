"""SpAtten's two cascades, computed in full and masked: every token goes through every layer in all heads, what was cut
is zeroed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.models import IMAGE
from tests.pruners.slow_yopo import entering
from vtprune.tensors.rotary import rotate


@dataclass(frozen=True)
class Slow:
    """logits (L + steps, V); kept: by layer and image, the tokens alive there; reading: by layer, the heads that read
    vision."""

    logits: Tensor
    kept: list[list[list[int]]]
    reading: list[list[int]]


@torch.no_grad()
def slow_cascades(
    kind: str,
    model: Any,
    inputs: dict[str, Tensor],
    later: Tensor,
    *,
    tokens: list[list[int]],
    heads: list[int],
) -> Slow:
    """One row: its prompt, and `later` (steps,) tokens after it. tokens: by layer and image, heads: by layer, how many
    are left."""
    decoder = model.model.language_model
    ids, states, cos, sin = entering(kind, model, inputs, later)
    length, prompt = ids.shape[1], inputs["input_ids"].shape[1]
    sizes = model.config.get_text_config()
    kv, count = sizes.num_key_value_heads, sizes.num_attention_heads
    is_image = ids[0] == IMAGE
    places = is_image.nonzero().flatten().split(tokens[0])
    own = [torch.arange(len(one)) for one in places]
    received, spoken = torch.zeros(length), torch.zeros(kv)
    reading, found = list(range(kv)), Slow(states, [], [])
    for index, layer in enumerate(decoder.layers):
        own = [best(received[one], kept, most) for one, kept, most in zip(places, own, tokens[index], strict=True)]
        reading = best(spoken, torch.tensor(reading), heads[index]).tolist()
        found.kept.append([one.tolist() for one in own])
        found.reading.append(reading)
        alive = ~is_image
        for one, kept in zip(places, own, strict=True):
            alive[one[kept]] = True
        attention, normed = layer.self_attn, layer.input_layernorm(states)

        def split(states: Tensor, number: int) -> Tensor:
            return states.view(1, length, number, -1).transpose(1, 2)

        query = rotate(split(attention.q_proj(normed), count), cos, sin)
        key = rotate(split(attention.k_proj(normed), kv), cos, sin).repeat_interleave(count // kv, dim=1)
        value = split(attention.v_proj(normed), kv).repeat_interleave(count // kv, dim=1)
        logits = query @ key.transpose(-1, -2) * attention.scaling
        seen = torch.ones(length, length, dtype=torch.bool).tril() & (alive | torch.eye(length, dtype=torch.bool))
        weights = logits.masked_fill(~seen, float("-inf")).softmax(dim=-1)
        cut = torch.tensor([head // (count // kv) not in reading for head in range(count)])
        rows = alive & (torch.arange(length) < prompt)
        received = received + weights[0, ~cut][:, rows].sum(dim=(0, 1))
        put = weights.masked_fill(cut[:, None, None] & is_image, 0.0) @ value
        put = put.masked_fill(cut[:, None, None] & is_image[:, None], 0.0)
        spoken = spoken + put[0, :, rows].abs().sum(dim=(1, 2)).view(kv, -1).sum(dim=1)
        states = states + attention.o_proj(put.transpose(1, 2).reshape(1, length, -1))
        states = states + layer.mlp(layer.post_attention_layernorm(states))
    return Slow(model.lm_head(decoder.norm(states))[0], found.kept, found.reading)


def best(scores: Tensor, alive: Tensor, count: int) -> Tensor:
    """The `count` of those alive with the highest scores, ascending."""
    return alive[scores[alive].topk(count).indices].sort().values
