"""YOPO, computed in full and masked: every token goes through every layer, what is left out is zeroed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.models import IMAGE
from tests.oracle import embeddings_of, positions_of
from vtprune.tensors.rotary import rotate


def near(grids: list[tuple[int, ...]], window: int, *, causal: bool) -> Tensor:
    """(V, V) which vision tokens of images on these grids see which, by Chebyshev distance; earlier images whole."""
    place = [
        (image, at // width, at % width) for image, (high, width) in enumerate(grids) for at in range(high * width)
    ]
    reach = (window - 1) // 2
    sees = torch.zeros(len(place), len(place), dtype=torch.bool)
    for one, (image, row, column) in enumerate(place):
        for two, (other, other_row, other_column) in enumerate(place):
            if other < image:
                sees[one, two] = True
            elif other == image:
                inside = max(abs(row - other_row), abs(column - other_column)) <= reach
                sees[one, two] = inside and (two <= one or not causal)
    return sees


def entering(kind: str, model: Any, inputs: dict[str, Tensor], later: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids (1, L + steps) of a row's prompt and what comes after it, and what the first layer is given of them: hidden
    states, cosines and sines."""
    ids = torch.cat([inputs["input_ids"], later[None]], dim=1)
    states, decoder = embeddings_of(model, inputs, ids, None), model.model.language_model
    cos, sin = decoder.rotary_emb(states, positions_of(kind, model, inputs, ids.shape[1]))
    if cos.ndim == 4:
        sections = decoder.config.rope_parameters["mrope_section"]
        cos, sin = (
            torch.cat([m[n % 3] for n, m in enumerate(part.split(sections * 2, -1))], -1) for part in (cos, sin)
        )
    return ids, states, cos, sin


@torch.no_grad()
def slow_logits(
    kind: str,
    model: Any,
    inputs: dict[str, Tensor],
    later: Tensor,
    *,
    first: int,
    heads: dict[int, list[int]] | None = None,
    channels: int | None = None,
    window: int | None = None,
    causal: bool = False,
    grids: list[tuple[int, ...]],
    released: bool = False,
) -> Tensor:
    """(L + steps, V) logits of one row: its prompt, and `later` (steps,) tokens after it. first: the layer from which
    on text reads no vision; heads: the key-value heads that read it, by layer; channels: of the MLP."""
    decoder = model.model.language_model
    ids, states, cos, sin = entering(kind, model, inputs, later)
    is_image, length = ids[0] == IMAGE, ids.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    if window is not None:
        places = is_image.nonzero().flatten()
        allowed[places[:, None], places] = near(grids, window, causal=causal)
    sizes = model.config.get_text_config()
    kv, count = sizes.num_key_value_heads, sizes.num_attention_heads
    for index, layer in enumerate(decoder.layers):
        attention, normed = layer.self_attn, layer.input_layernorm(states)

        def split(states: Tensor, number: int) -> Tensor:
            return states.view(1, length, number, -1).transpose(1, 2)

        query = rotate(split(attention.q_proj(normed), count), cos, sin)
        key = rotate(split(attention.k_proj(normed), kv), cos, sin).repeat_interleave(count // kv, dim=1)
        value = split(attention.v_proj(normed), kv).repeat_interleave(count // kv, dim=1)
        logits = query @ key.transpose(-1, -2) * attention.scaling
        if index >= first and not released:
            # Gone altogether: text sees text alone.
            logits = logits.masked_fill(is_image & ~is_image[:, None], float("-inf"))
        weights = logits.masked_fill(~allowed, float("-inf")).softmax(dim=-1)
        reading = (heads or {}).get(index, list(range(kv)))
        cut = torch.tensor([head // (count // kv) not in reading for head in range(count)])
        weights = weights.masked_fill(cut[:, None, None] & is_image, 0.0)
        if index >= first and released:
            weights = weights.masked_fill(is_image, 0.0)
        found = (weights @ value).masked_fill(cut[:, None, None] & is_image[:, None], 0.0)
        after = states + attention.o_proj(found.transpose(1, 2).reshape(1, length, -1))
        normed = layer.post_attention_layernorm(after)
        mlp = layer.mlp
        inside = mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed)
        if channels is not None:
            inside[:, is_image, channels:] = 0.0
        after = after + mlp.down_proj(inside)
        # What has stopped stays as it was.
        states = torch.where((is_image & (index >= first))[:, None], states, after)
    return model.lm_head(decoder.norm(states))[0]
