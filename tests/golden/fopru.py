"""FoPru's cases: attention maps, and the tokens kept by either strategy."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.golden.case import Case, UnknownCase, expect_close, expect_equal
from vtprune.method.views import LayerSignals, VisionStream
from vtprune.pruners import FoPru
from vtprune.pruners.fopru import focal_significance
from vtprune.tensors.attention import attention_received_and_given

TINY = 1e-30
TIE = 5e-7


def run(case: Case) -> None:
    """Raises Mismatch where the kept tokens of an image differ, UnknownCase for another kind of case."""
    if "attn" not in case or not ("rank_keep" in case or "row_keep" in case):
        raise UnknownCase(f"no FoPru case has tensors {', '.join(case.tensors)}")
    for index, attention in enumerate(case["attn"]):
        check_image(case, index, attention)


def check_image(case: Case, index: int, attention: Tensor) -> None:
    """Compares significances and both strategies on one (H, N, N) map."""
    softmax = is_softmaxed(attention)
    signals = signals_of(attention, softmax)
    received, given = attention_received_and_given(
        signals.query, signals.key, signals.scale, skip=signals.prefix, softmax=softmax
    )
    for name, mean in (("col_mean_received", received), ("row_mean_given", given)):
        if name in case:
            expect_close(name, mean, case[name][index], atol=1e-6)
    tokens = attention.shape[-1]
    if "rank_keep" in case:
        budget = case.setting("n_output_tokens_rank")
        kept = FoPru(softmax=softmax).select(stream_of(signals, (1, 1, tokens), budget)).kept
        expect_kept(f"kept by rank, image {index}", kept, case["rank_keep"][index], received, given)
    if "row_keep" in case:
        side = math.isqrt(tokens)
        if side**2 != tokens:
            raise UnknownCase(f"row_keep of {tokens} tokens, which are no square grid")
        budget = math.floor(side * case.setting("row_ratio")) * side
        pruner = FoPru(strategy="row", softmax=softmax)
        kept = pruner.select(stream_of(signals, (1, side, side), budget)).kept
        expect_equal(f"kept by row, image {index}", kept, case["row_keep"][index])


def expect_kept(what: str, got: Tensor, want: Tensor, *means: Tensor) -> None:
    """Raises Mismatch unless the same tokens are kept, those apart whose scores fp32 cannot tell from each other."""
    significance = focal_significance(*means)
    apart = torch.tensor(sorted(set(got.tolist()) ^ set(want.tolist())), dtype=torch.long)
    if got.shape == want.shape and apart.numel() and int(apart[-1]) < significance.numel():
        scores = significance[apart]
        if float(scores.max() - scores.min()) <= TIE * float(significance.abs().max()):
            return
    expect_equal(what, got, want)


def is_softmaxed(attention: Tensor) -> bool:
    """Whether the rows are softmaxed (they may lack a CLS column), not logits."""
    return bool((attention >= 0).all()) and bool((attention.sum(dim=-1) <= 1 + 1e-4).all())


def signals_of(attention: Tensor, softmax: bool) -> LayerSignals:
    """Queries and keys whose attention is the given (H, N, N) map; CLS takes what a row lacks of 1."""
    if not softmax:
        return LayerSignals(attention, identity_like(attention), attention, 1.0, 0, 1)
    lacking = (1 - attention.sum(dim=-1, keepdim=True)).clamp(min=0)
    rows = torch.cat([lacking, attention], dim=-1).clamp(min=TINY).log()
    rows = torch.cat([torch.zeros_like(rows[:, :1]), rows], dim=1)
    return LayerSignals(rows, identity_like(rows), rows, 1.0, 1, 1)


def identity_like(states: Tensor) -> Tensor:
    """Keys (H, d, d) that leave the queries as they are."""
    return torch.eye(states.shape[-1]).expand(states.shape[0], -1, -1)


def stream_of(signals: LayerSignals, grid: tuple[int, int, int], budget: int) -> VisionStream:
    """A stream with nothing but signals."""
    total = math.prod(grid)
    empty = torch.zeros(total, 1)
    return VisionStream(empty, grid, torch.arange(total), total, budget, signals, empty, empty[:0])
