"""MustDrop's cases: merged windows, key sets, single filters, and the whole prefill with a decode step."""

from __future__ import annotations

import math

import torch

from tests.golden import towers
from tests.golden.case import Case, Mismatch, UnknownCase, expect_close, expect_equal
from tests.golden.prefill import HIDDEN, Cached, decode, decoder
from vtprune.encoder.merging import flow_together
from vtprune.method.views import DecoderLayer
from vtprune.pruners.mustdrop.filters import key_set, passes
from vtprune.pruners.mustdrop.mustdrop import MustDrop
from vtprune.pruners.mustdrop.windows import (
    alike_windows,
    batch_windows,
    merge_windows,
    window_similarity,
)

SUMS = {"atol": 1e-6, "rtol": 1e-5}


@torch.no_grad()
def run(case: Case) -> None:
    """Raises Mismatch where a result differs, UnknownCase for another kind of case."""
    kinds = {
        frozenset({"x", "threshold", "window", "out", "size"}): check_windows,
        frozenset({"cls_row", "keep_rate", "index"}): check_key_set,
        frozenset({"attn_text_to_vis", "global_thr", "individual_thr", "keep"}): check_filter,
        frozenset({"x", "v_start", "n_vis", "key_set", "last_hidden"}): check_prefill,
    }
    for needed, check in kinds.items():
        if needed <= set(case.tensors):
            return check(case)
    shown = ", ".join(sorted(name for name in case.tensors if not name.startswith("w.")))
    raise UnknownCase(f"no MustDrop case has tensors {shown}")


def check_windows(case: Case) -> None:
    """Vectors and sizes in the reference's order: CLS, merged by falling similarity, the others in raster order."""
    states, threshold = case["x"], float(case["threshold"])
    batch, tokens = states.shape[0], states.shape[1] - 1
    side = math.isqrt(tokens)
    if side**2 != tokens or case["window"].numel() != 2:
        raise UnknownCase(f"{tokens} tokens, which are no square grid, in windows {case['window'].tolist()}")
    rows, cols = case["window"].tolist()
    windows = batch_windows(((1, side, side),) * batch, (rows, cols), ragged=False)
    similarity = window_similarity(states[:, 1:], windows)
    chosen = alike_windows(similarity, windows, threshold, torch.full((batch,), tokens), shared=True)
    selection = merge_windows(windows, chosen, torch.ones(batch, tokens, dtype=torch.bool))
    outs, sizes = [], []
    for row in range(batch):
        vectors = flow_together(states[row, 1:], selection.into[row], selection.weights[row])
        count = torch.zeros(tokens).index_add(0, selection.into[row], torch.ones(tokens))
        best = similarity[row].masked_fill(~chosen[row], float("-inf")).argsort(descending=True, stable=True)
        merged = windows.members[row, best[: int(chosen[row].sum())], 0]
        single = (selection.keep[row] & (selection.weights[row] == 1)).nonzero().flatten()
        order = torch.cat([merged, single])
        outs.append(torch.cat([states[row, :1], vectors[order]]))
        sizes.append(torch.cat([torch.ones(1), count[order]]))
    expect_equal("sizes", torch.stack(sizes), case["size"].flatten(1))
    expect_close("merged sequence", torch.stack(outs), case["out"], **SUMS)


def check_key_set(case: Case) -> None:
    """The tokens with the most CLS attention, best first."""
    scores = case["cls_row"].float().mean(dim=1)[:, 0, 1:]
    best = key_set(scores, float(case["keep_rate"]))
    if "n_keep" in case and int(best.sum(dim=1)[0]) != int(case["n_keep"]):
        raise Mismatch(f"{int(best.sum(dim=1)[0])} key tokens, recorded {int(case['n_keep'])}")
    recorded = torch.zeros_like(best).scatter(1, case["index"].reshape(best.shape[0], -1), True)
    expect_equal("key set", best, recorded)


def check_filter(case: Case) -> None:
    """What the thresholds leave of one recorded map."""
    attention = case["attn_text_to_vis"].float().mean(dim=1)
    if attention.shape[0] != 1:
        raise UnknownCase(f"a filter of {attention.shape[0]} rows at once")
    kept = passes(attention[0], float(case["global_thr"]), float(case["individual_thr"]))
    expect_equal("kept", kept.nonzero().flatten(), case["keep"].flatten())


def check_prefill(case: Case) -> None:
    """Hidden states, cache lengths and keys after a prefill with every filter, and one decode step."""
    given, model = case.setting("cfg"), decoder(case)
    method = MustDrop(
        variant="released", layers=tuple(given["prune_layers"]), global_threshold=float(case["global_thr"]),
        individual_threshold=float(case["individual_thr"]),
    )  # fmt: skip
    hidden, start, tokens = case["x"], int(case["v_start"]), int(case["n_vis"])
    if hidden.shape[0] != 1:
        raise UnknownCase(f"a prefill of {hidden.shape[0]} rows")
    depth, alive = len(model.layers), torch.arange(hidden.shape[1])
    caches: list[Cached] = []
    for index in range(depth):
        hidden = towers.run_decoder_layer(model, index, hidden, torch.arange(hidden.shape[1])[None])
        query, key, value = (states[0] for states in towers.RECORDER.take())
        caches.append(Cached(alive, key, value))
        if index in method.drop_layers():
            span = ((alive >= start) & (alive < start + tokens)).nonzero().flatten()
            image = alive[span] - start
            layer = DecoderLayer(
                query=query, key=key, value=value, vision=span, last=alive.numel() - 1,
                scale=query.shape[-1] ** -0.5, total=tokens, indices=image, budget=tokens, index=index, depth=depth,
                text=torch.cat([torch.arange(start), torch.arange(int(span[-1]) + 1, alive.numel())]),
                memory={"key": torch.isin(image, case["key_set"])},
            )  # fmt: skip
            selection = method.prune_decoder(layer)
            assert selection is not None
            left = torch.ones_like(alive, dtype=torch.bool)
            left[span] = False
            left[span[selection.kept]] = True
            hidden, alive = hidden[:, left], alive[left]
    expect_close("last_hidden", model.norm(hidden), case["last_hidden"], **HIDDEN)
    for index in method.cut_caches():
        held = caches[index]
        left = torch.isin(held.places, alive)
        caches[index] = Cached(held.places[left], held.key[:, left], held.value[:, left])
    lengths = [len(held.places) for held in caches]
    if "cache_lens" in case:
        expect_equal("cache_lens", torch.tensor(lengths), case["cache_lens"])
    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    for name in case.tensors:
        if name.startswith("k_cache_layer"):
            keys = caches[int(name.removeprefix("k_cache_layer"))].key[::groups]
            expect_close(name, keys[None], case[name], **HIDDEN)
    if "decode_in" in case:
        # Its position in each layer is the length of that layer's own cache.
        decoded = decode(model, case["decode_in"], caches, lengths)
        expect_close("decode_out", decoded, case["decode_out"], **HIDDEN)
