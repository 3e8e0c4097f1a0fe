"""Attention of the prompt's tokens to an image's in one decoder layer: a few rows of it, never the whole map."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vtprune.method.facts import Work
from vtprune.method.views import DecoderLayer
from vtprune.tensors.attention import hiding_later, rows_at_once


def text_behind(layer: DecoderLayer) -> range | None:
    """The places of the text after the image, where it is all that stands between the image and the end of its prompt,
    which the host knows; else None."""
    first = layer.last + 1 - layer.text_after
    return range(first, layer.last + 1) if first == layer.after else None


def _unbroken_rows(layer: DecoderLayer, rows: range) -> Iterator[Tensor]:
    """As `_whole_rows`, the weights of tokens that follow each other in a row without padding."""
    query, key = layer.query, layer.key.float()
    several = rows_at_once(key.device, key.shape[0] * key.shape[1])
    for start in range(rows.start, rows.stop, several):
        stop = min(start + several, rows.stop)
        hidden = hiding_later(start, stop, key.shape[1], key.device).to(key.dtype)
        asked = query[:, start:stop].float() * layer.scale
        yield torch.baddbmm(hidden, asked, key.transpose(-1, -2)).softmax(dim=-1)


def _whole_rows(layer: DecoderLayer, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Attention of the tokens at the places `rows` (T,) to all tokens up to their own place, as the layer computes it:
    a few rows at a time, their places (t,) and their (H, t, n) fp32 weights."""
    query, key = layer.query, layer.key.float()
    place = torch.arange(key.shape[1], device=key.device)
    for some in rows.to(key.device).split(rows_at_once(key.device, key.shape[0] * key.shape[1])):
        hidden = place > some[:, None]
        if layer.first:
            hidden = hidden | (place < layer.first)
        logits = torch.matmul(query.index_select(1, some).float() * layer.scale, key.transpose(-1, -2))
        yield some, logits.masked_fill_(hidden, float("-inf")).softmax(dim=-1)


def attention_of_heads(layer: DecoderLayer, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Attention of the tokens at the places `rows` (T,) to the image's, softmaxed over all tokens up to their own
    place: a few rows at a time, their places (t,) and their (H, t, N) fp32 weights."""
    vision = layer.vision.to(layer.key.device)
    for some, weights in _whole_rows(layer, rows):
        yield some, weights.index_select(-1, vision)


def attention_to_image(layer: DecoderLayer, rows: Tensor | range) -> Tensor:
    """(T, N) fp32 attention of the tokens at the places `rows` (T,) to the image's, averaged over heads."""
    vision = layer.vision.to(layer.key.device)
    if isinstance(rows, range) and layer.first:
        rows = torch.arange(rows.start, rows.stop, device=vision.device)
    if isinstance(rows, range):
        maps = _unbroken_rows(layer, rows)
    else:
        maps = (weights for _, weights in _whole_rows(layer, rows))
    # Heads first: the image's columns are then picked from one map.
    found = [weights.mean(dim=0).index_select(1, vision) for weights in maps]
    return found[0] if len(found) == 1 else torch.cat(found)


def next_layer_flops(work: Work) -> int:
    """FLOPs of `last_attention` by the queries and keys of layers that have not run: the last token's query and all
    keys once for a row's images, and one row of attention for each image, a layer."""
    width, asked, total = work.decoder_width, work.attention_width, 0
    for tokens, first in zip(work.decoder_tokens, work.first_asked, strict=True):
        total += 2 * tokens * asked
        total += 2 * width * (asked + tokens * work.decoder_kv_width) if first else 0
    return total


def last_attention(layer: DecoderLayer) -> Tensor:
    """(N,) fp32 attention of the last prompt token to the image's tokens, softmaxed over all tokens of the row up to
    it and averaged over heads."""
    first, end = layer.first, layer.last + 1
    key = layer.key[:, first:end].float()
    logits = torch.matmul(layer.last_query.float() * layer.scale, key.transpose(-1, -2))
    weights = logits.softmax(dim=-1)[:, 0].mean(dim=0)
    vision = layer.vision.to(weights.device)
    return weights.index_select(0, vision - first if first else vision)
