"""FastV's cases: scores and kept tokens before layer K, the prefill, and a decode step."""

from __future__ import annotations

import torch

from tests.golden.case import Case, UnknownCase, expect_close, expect_equal
from tests.golden.prefill import HIDDEN, Prefill, decoder
from vtprune.method.facts import ModelFacts
from vtprune.pruners.fastv import FastV


@torch.no_grad()
def run(case: Case) -> None:
    """Raises Mismatch where a result differs, UnknownCase for another kind of case."""
    for name in ("x", "sys_len", "n_img", "K", "last_hidden"):
        _ = case[name]
    model, hidden = decoder(case), case["x"]
    if hidden.shape[0] != 1:
        raise UnknownCase(f"a prefill of {hidden.shape[0]} rows")
    start, tokens, place = int(case["sys_len"]), int(case["n_img"]), int(case["K"])
    # The reference rounds down.
    count = int(tokens * float(case["ratio_keep"]))
    depth = len(model.layers)
    pruner = FastV(layers=(place,)).bind(ModelFacts(True, 1, depth, 1))
    prefill = Prefill(model, pruner, hidden, (start, tokens))
    states = prefill.run(dict.fromkeys(pruner.drop_layers(), count))
    if "score" in case:
        expect_close("score", pruner.scores(prefill.seen[place - 1]), case["score"].flatten(), atol=1e-6, rtol=1e-4)
    if "keep_img_index" in case:
        image = prefill.places[(prefill.places >= start) & (prefill.places < start + tokens)]
        expect_equal("keep_img_index", image, case["keep_img_index"].flatten().sort().values)
    expect_close("last_hidden", states, case["last_hidden"], **HIDDEN)
    if "cache_lens" in case:
        lengths = prefill.lengths()
        # The reference runs layer K - 1 twice, both times into the cache, which changes no weighted mean.
        lengths[place - 1] *= 2
        expect_equal("cache_lens", lengths, case["cache_lens"])
    if "decode_in" in case:
        expect_close("decode_out", prefill.decode(case["decode_in"]), case["decode_out"], **HIDDEN)
