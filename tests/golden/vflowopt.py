"""VFlowOpt's cases: patch entropy, importance maps, recycling, frames of a video, and drops in a Qwen2 decoder."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear
from transformers import DynamicCache, Qwen2Config, Qwen2Model

from tests.golden import towers
from tests.golden.case import Case, Mismatch, UnknownCase, expect_close, expect_equal
from tests.golden.fopru import signals_of
from tests.golden.onevision import NEWLINE_IMPORTANCE, joined_tiles, pooled_frames
from vtprune.cache.adopting import with_cache
from vtprune.method.choosing import top
from vtprune.method.views import DecoderLayer, LayerSignals
from vtprune.pruners import VFlowOpt
from vtprune.pruners.vflowopt.budget import released_count
from vtprune.pruners.vflowopt.importance import (
    RELEASED_EPS,
    importance_map,
    level_entropy,
    patch_levels,
    wrapped_levels,
)
from vtprune.pruners.vflowopt.recycling import cells_of, filled_cells, recycle
from vtprune.pruners.vflowopt.vflowopt import IMPORTANCE
from vtprune.tensors.attention import split_heads

PATCH = 14
LAYER_NORM_EPS = 1e-6
HIDDEN = {"atol": 1e-4, "rtol": 1e-3}


@torch.no_grad()
def run(case: Case) -> None:
    """Raises Mismatch where a result differs, UnknownCase for another kind of case."""
    names = set(case.tensors)
    kinds = (
        ({"importance", "prune_layers", "ratios", "x"}, check_decoder),
        ({"importance", "entropy", "t", "alpha_v"}, check_importance),
        ({"features", "attn_maps", "vit_r"}, check_tokens),
        ({"entropy"}, check_entropy),
    )
    for needed, check in kinds:
        if needed <= names:
            return check(case)
    shown = ", ".join(sorted(name for name in names if not name.startswith("w.")))
    raise UnknownCase(f"no VFlowOpt case has tensors {shown}")


def check_entropy(case: Case) -> None:
    """Entropy of each patch, of normalised pixels wrapped around in a byte."""
    if "image_uint8" in case:
        pixels = (case["image_uint8"].float() / 255 - 0.5) / 0.5
    else:
        pixels = case["pixel_values"]
    if "as_uint8" in case:
        expect_equal("as_uint8", (pixels * 255).trunc().long().remainder(256), case["as_uint8"])
    want = case["entropy"]
    images, _, rows, cols = want.shape
    sides = [
        PATCH if size // PATCH == n else size // n for size, n in zip(pixels.shape[-2:], (rows, cols), strict=True)
    ]
    levels = patch_levels(wrapped_levels(pixels), (images, rows, cols), (sides[0], sides[1]))
    expect_close("entropy", level_entropy(levels, RELEASED_EPS).reshape(want.shape), want)


def signals_in(case: Case, index: int) -> LayerSignals:
    """Queries and keys of one image: of the recorded layer, or of its attention map."""
    if "x" not in case:
        return signals_of(case["attn"][index], softmax=True)
    states = case["x"][index]
    states = layer_norm(states, states.shape[-1:], case["ln1_w"], case["ln1_b"], LAYER_NORM_EPS)
    heads = int(case["heads"])
    query, key = (split_heads(linear(states, case[f"w{name}"], case[f"b{name}"]), heads) for name in "qk")
    return LayerSignals(query, key, key, query.shape[-1] ** -0.5, 0, 1)


def check_importance(case: Case) -> None:
    """The importance of every patch. Where no patch is global the code gives NaN, the method numbers."""
    threshold, alpha, entropies = float(case["t"]), float(case["alpha_v"]), case["entropy"]
    for index, want in enumerate(case["importance"]):
        got = importance_map(signals_in(case, index), entropies[index].flatten(), threshold, alpha)
        if bool(want.isnan().all()):
            got = got.new_full(got.shape, torch.nan) if bool(got.isfinite().all()) else got
            expect_equal(f"NaN of image {index}", got.isnan(), want.isnan())
        else:
            expect_close(f"importance of image {index}", got, want, atol=1e-7, rtol=1e-4)


def check_tokens(case: Case) -> None:
    """The tokens that enter the decoder, and their importance."""
    features, maps, newline = case["features"], case["attn_maps"], case["newline"]
    heavy = torch.tensor([NEWLINE_IMPORTANCE])
    if bool(case["is_video"]):
        tokens = torch.cat([pooled_frames(features).flatten(0, 1), newline[None]])
        importance = torch.cat([pooled_frames(maps[..., None]).flatten(), heavy])
        kept = top(importance, released_count(importance.numel(), float(case["vit_r"])))
        vectors = tokens[kept]
    else:
        kept, vectors, importance = recycled(case, features, maps, newline, heavy)
    if "n_kept" in case and kept.numel() != int(case["n_kept"]):
        raise Mismatch(f"{kept.numel()} tokens, recorded {int(case['n_kept'])}")
    expect_close("out_importance", importance[kept], case["out_importance"], atol=1e-7)
    expect_close("out_tokens", vectors, case["out_tokens"])


def recycled(
    case: Case, features: Tensor, maps: Tensor, newline: Tensor, heavy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Kept tokens, their vectors and the importance of all, of an image of a base and tiles."""
    (cols, rows), (width, height) = case["grid_wh"].tolist(), case["image_size_wh"].tolist()
    if rows * cols + 1 != features.shape[0]:
        raise UnknownCase(f"{features.shape[0]} tiles, which are no base and {rows} x {cols} tiles")
    side = math.isqrt(features.shape[1])
    whole = joined_tiles(features[1:], (rows, cols), (width, height), newline)
    worth = joined_tiles(maps[1:, :, None], (rows, cols), (width, height), heavy)
    tokens = torch.cat([features[0], whole.flatten(0, 1)])
    importance = torch.cat([maps[0], worth.flatten()])
    count, size = importance.numel(), float(case["vit_m"])
    cells, names = cells_of([(side, side), (whole.shape[0], whole.shape[1])], size)
    direct = max(0, released_count(count, float(case["vit_r"])) - int(count / size**2))
    filled = filled_cells(importance, cells, names, direct)
    selection = recycle(tokens, importance, cells, count=names, direct=direct, filled=filled)
    assert selection.vectors is not None
    return selection.kept, selection.vectors, importance


def qwen2(case: Case) -> Any:
    """A Qwen2 decoder with the recorded weights."""
    given = case.setting("cfg")
    config = Qwen2Config(
        vocab_size=8,
        hidden_size=given["hidden"],
        intermediate_size=given["inter"],
        num_hidden_layers=given["layers"],
        num_attention_heads=given["heads"],
        num_key_value_heads=given["kv_heads"],
        rms_norm_eps=given["eps"],
        rope_parameters={"rope_type": "default", "rope_theta": given["rope_theta"]},
        bos_token_id=None,
        eos_token_id=None,
    )
    return towers.filled(Qwen2Model, config, case.weights())


def check_decoder(case: Case) -> None:
    """Hidden states of prefill and one decode step without the code's non-causal layer, and the cache's lengths."""
    model, hidden = qwen2(case), case["x"]
    start, count, length = int(case["start"]), int(case["n_vis"]), hidden.shape[1]
    stages = dict(zip((case["prune_layers"] - 1).tolist(), case["ratios"].tolist(), strict=True))
    pruner = VFlowOpt(layers=tuple(case["prune_layers"].tolist()))
    if tuple(stages) != pruner.drop_layers():
        raise Mismatch(f"acts after layers {pruner.drop_layers()}, recorded {tuple(stages)}")
    places, alive, cache = torch.arange(length), torch.arange(count), DynamicCache()
    memory = {IMPORTANCE: case["importance"].float()}
    for index in range(len(model.layers)):
        hidden = run_layer(model, index, hidden, places, cache, towers.causal_mask(hidden.shape[1]))
        if index in stages:
            budget = released_count(alive.numel(), stages[index])
            vision = start + torch.arange(alive.numel())
            selection = pruner.prune_decoder(decoder_layer(hidden, vision, alive, memory, budget, index, count))
            if selection is not None:
                stay = torch.ones(hidden.shape[1], dtype=torch.bool)
                stay[vision] = False
                stay[vision[selection.kept]] = True
                hidden, places, alive = hidden[:, stay], places[stay], alive[selection.kept]
                memory = {name: values[selection.kept] for name, values in memory.items()}
    expect_close("last_hidden_causal", model.norm(hidden), case["last_hidden_causal"], **HIDDEN)
    lengths = torch.tensor([layer.keys.shape[-2] for layer in cache.layers])
    expect_equal("cache_lens", lengths, case["cache_lens"])
    step = case["decode_in"]
    for index in range(len(model.layers)):
        step = run_layer(model, index, step, torch.tensor([length]), cache, None)
    expect_close("decode_out_causal", model.norm(step), case["decode_out_causal"], **HIDDEN)


def run_layer(model: Any, index: int, hidden: Tensor, places: Tensor, cache: Any, mask: Tensor | None) -> Tensor:
    """(1, n, D) after decoder layer `index`, at the positions `places`, with the layer's own cache."""
    towers.RECORDER.chunks.clear()
    layer, rotary = model.layers[index], model.rotary_emb(hidden, places[None])
    own = {"attention_mask": mask, "position_embeddings": rotary}
    return layer(hidden, **with_cache(layer.forward, own, cache))


def decoder_layer(
    hidden: Tensor, vision: Tensor, alive: Tensor, memory: dict[str, Tensor], budget: int, index: int, total: int
) -> DecoderLayer:
    """What the method sees of a layer; it reads no attention of the decoder."""
    nothing, last = hidden[:, :, :0], hidden.shape[1] - 1
    text = torch.tensor([place for place in range(last + 1) if place < vision[0] or place > vision[-1]])
    return DecoderLayer(
        nothing, nothing, nothing, vision, last, 1.0, total, alive, budget, index, index + 2, text, memory
    )
