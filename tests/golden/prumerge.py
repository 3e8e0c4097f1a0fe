"""PruMerge's and PruMerge+'s cases: CLS attention, the tokens that are selected, and their merged vectors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tests.golden.case import Case, UnknownCase, expect_close, expect_equal
from vtprune.method.views import LayerSignals
from vtprune.pruners.parts.cosines import unit_vectors
from vtprune.pruners.prumerge import NEIGHBOURS, neighbour_weights, one_head, outliers, selected

MERGED = {"atol": 1e-4, "rtol": 1e-3}


def run(case: Case) -> None:
    """Raises Mismatch where a result differs, UnknownCase for another kind of case.

    features: (1, N, C); q, k: (1, 1 + N, C), CLS first; out: (1, K + 1, C), the tokens by falling attention, then
    those of a grid, then what is left over.
    """
    if not {"features", "q", "k", "adaptive", "ratio", "cls_attention", "out"} <= set(case.tensors):
        raise UnknownCase(f"no PruMerge case has tensors {', '.join(case.tensors)}")
    features, out = case["features"][0].float(), case["out"][0]
    signals = one_head(LayerSignals(case["q"], case["k"], case["k"], scale=1.0, prefix=1, group=1))
    attention = signals.saliency()
    expect_close("cls_attention", attention, case["cls_attention"][0])
    keys = unit_vectors(signals.token_keys(), "prumerge")
    if bool(case["adaptive"]):
        chosen = adaptive(case, attention)
        extended = torch.cat([chosen, others(chosen, len(features))])
    else:
        chosen = trained(attention, float(case["given_ratio"]), count=len(out) - 1)
        # A token that is there twice costs the lowest of the others its place.
        extended = torch.cat([chosen, others(chosen, len(features))[len(chosen) - len(chosen.unique()) :]])
    expect_equal("count", torch.tensor(len(chosen) + 1), torch.tensor(len(out)))
    # The code looks for neighbours among selected tokens, too.
    everything, first = torch.ones(len(extended), dtype=torch.bool), torch.arange(len(chosen))
    own, vectors = attention[extended], features[extended]
    weights = neighbour_weights(own, keys[extended], first, flowing=everything, count=NEIGHBOURS)
    expect_close("selected", vectors[first] + weights @ vectors, out[:-1], **MERGED)
    left = torch.arange(len(extended)) >= len(chosen)
    expect_close("what is left over", (own * left) @ vectors, out[-1], **MERGED)


def adaptive(case: Case, attention: Tensor) -> Tensor:
    """The tokens in the order of the code, where their number follows from the attention."""
    known = attention.numpy()
    best = np.argsort(-known, kind="stable")[: outliers(known)]
    expect_close("ratio", torch.tensor(len(best) / len(known)), case["ratio"])
    # A grid is at least as many tokens again.
    plus = len(case["out"][0]) > len(best) + 1
    grid = np.setdiff1d(selected(known, None, plus=plus), best)
    return torch.from_numpy(np.concatenate([best, grid]))


def trained(attention: Tensor, ratio: float, count: int) -> Tensor:
    """The `count` tokens in the order of the code, with the fixed ratio of its training: those of the grid, if there
    is one, may be there twice."""
    best = attention.argsort(descending=True, stable=True)[: int(len(attention) * ratio)]
    step = int(1 / ratio)
    return torch.cat([best, torch.arange(step // 2, len(attention) - 1, step)])[:count]


def others(chosen: Tensor, tokens: int) -> Tensor:
    """Those of `tokens` that are not chosen, ascending."""
    return torch.from_numpy(np.setdiff1d(np.arange(tokens), chosen.numpy()))
