"""PyramidDrop's cases: the prefill with every drop, positions renumbered after each, and a decode step."""

from __future__ import annotations

import torch

from tests.golden.case import Case, Mismatch, UnknownCase, expect_close, expect_equal
from tests.golden.prefill import HIDDEN, Prefill, decoder
from vtprune.method.facts import ModelFacts
from vtprune.pruners.pyramid_drop import PyramidDrop


@torch.no_grad()
def run(case: Case) -> None:
    """Raises Mismatch where a result differs, UnknownCase for another kind of case."""
    for name in ("x", "layer_list", "ratios", "n_img", "img_start", "last_hidden"):
        _ = case[name]
    model, hidden = decoder(case), case["x"]
    start, tokens = int(case["img_start"]), int(case["n_img"])
    if hidden.shape[0] != 1:
        raise UnknownCase(f"a prefill of {hidden.shape[0]} rows")
    if "prompt_len" in case and int(case["prompt_len"]) + tokens != hidden.shape[1]:
        raise UnknownCase(f"{int(case['prompt_len'])} + {tokens} tokens in a prompt of {hidden.shape[1]}")
    layers, ratios = case["layer_list"].flatten().tolist(), case["ratios"].flatten().tolist()
    if len(layers) != len(ratios):
        raise UnknownCase(f"{len(ratios)} ratios for drops before {len(layers)} layers")
    depth = len(model.layers)
    pruner = PyramidDrop(layers=tuple(layers), variant="released").bind(ModelFacts(True, 1, depth, 1))
    asked = pruner.drop_layers()
    if asked != tuple(layer - 1 for layer in layers):
        raise Mismatch(f"acts after layers {asked}, recorded before {tuple(layers)}")
    # The reference rounds down.
    budgets = {layer: int(tokens * ratio) for layer, ratio in zip(asked, ratios, strict=True)}
    prefill = Prefill(model, pruner, hidden, (start, tokens), compact=pruner.renumbers)
    states = prefill.run(budgets)
    expect_close("last_hidden", states, case["last_hidden"], **HIDDEN)
    if "cache_lens" in case:
        expect_equal("cache_lens", prefill.lengths(), case["cache_lens"])
    if "decode_in" in case:
        expect_close("decode_out", prefill.decode(case["decode_in"]), case["decode_out"], **HIDDEN)
