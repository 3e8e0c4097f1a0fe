"""SpAtten's cases: which tokens a layer's attention keeps, and how many the released workloads leave to each layer.

The chat demo's cases (`raw_scores`) cut a cache between turns by logits, which is no part of the paper, nor of
vtprune: the checker redoes it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.golden.case import Case, UnknownCase, expect_close, expect_equal
from vtprune.method.choosing import top
from vtprune.pruners.spatten import HEADS, TABLES, ramp, whole_layers
from vtprune.tensors.attention import SightByPlaces, attention_sums


@torch.no_grad()
def run(case: Case) -> None:
    """Raises Mismatch where a result differs, UnknownCase for another kind of case."""
    if "keep_rate_per_layer" in case:
        check_layer(case)
    elif "topk_after_layer" in case:
        check_workload(case)
    elif "raw_scores" in case:
        check_chat(case)
    else:
        raise UnknownCase("neither a layer's attention, nor a workload, nor a chat's cache")


def check_layer(case: Case) -> None:
    """The rule of layers, and the tokens (B, n) kept by the attention that each one gets in one layer."""
    depth, layer = int(case["layers"]), int(case["layer"])
    rates = ramp(depth, whole_layers(depth), float(case["final_keep_rate"]))
    expect_close("keep_rate_per_layer", torch.tensor(rates), case["keep_rate_per_layer"], atol=1e-6)
    kept = torch.zeros_like(case["kept"])
    for row, (probs, length) in enumerate(zip(case["probs"], case["lengths"].tolist(), strict=True)):
        count = round(length * rates[layer])
        kept[row, top(received(probs[:, :length, :length]), count)] = True
    expect_equal("kept", kept, case["kept"])


def received(probs: Tensor) -> Tensor:
    """(n,) what each token gets of attention (H, n, n) that is given: its logarithms are logits."""
    place = torch.arange(probs.shape[-1])
    logits = probs.clamp(min=torch.finfo(probs.dtype).tiny).log()
    key = torch.eye(len(place)).expand_as(probs)
    last = torch.full_like(place, len(place))
    return attention_sums(logits, key, SightByPlaces(last, place), 1.0).sum(dim=0)


def check_workload(case: Case) -> None:
    """The keys that each layer reads in each step behind the first, and after which layers how many stay; the heads
    that each layer has."""
    keys, window = case["keys_read"], int(case["context"].max())
    table = next((one for one in TABLES.values() if len(one) == keys.shape[1]), None)
    if table is None:
        raise UnknownCase(f"a workload of {keys.shape[1]} layers")
    shares = next((one for one in HEADS.values() if len(one) == keys.shape[1]), (1.0,) * keys.shape[1])
    heads = torch.tensor([math.floor(share * int(case["heads"].max())) for share in shares])
    expect_equal("heads", heads.expand_as(case["heads"]), case["heads"])
    for step in range(1, len(keys)):
        # The last layer's ranking is for the next step's first one, which the last step does not have.
        alive = min(window, int(case["context"][step]))
        counts = [min(alive, math.floor(ratio * window)) for ratio in table]
        expect_equal("keys_read", torch.tensor(counts), keys[step])
        following = [*counts[1:], counts[0] if step + 1 < len(keys) and table[0] < 1 else counts[-1]]
        ranked = [after if after != own else -1 for own, after in zip(counts, following, strict=True)]
        expect_equal("topk_after_layer", torch.tensor(ranked), case["topk_after_layer"][step])


def check_chat(case: Case) -> None:
    """The entries (L, H, m) of a cache that stay (the first, the best of the middle, the last) and their values."""
    scores, values = case["raw_scores"].sum(dim=(1, 3)), case["values"]
    entries = scores.shape[-1]
    start, recent, best, coming = (
        int(case[name]) for name in ("start_size", "recent_size", "important_size", "num_coming")
    )
    middle = entries - recent + coming
    own = top_each(scores[..., start:middle], best) + start
    first = torch.arange(start).expand(*own.shape[:-1], -1)
    last = torch.arange(middle, entries).expand(*own.shape[:-1], -1)
    kept = torch.cat([first, own, last], dim=-1)
    expect_equal("kept", kept, case["kept"])
    index = kept[:, None, :, :, None].expand(-1, values.shape[1], -1, -1, values.shape[-1])
    expect_close("out_values", values.gather(3, index), case["out_values"], atol=0, rtol=0)


def top_each(scores: Tensor, count: int) -> Tensor:
    """The best `count` of the last dimension, ascending."""
    return scores.topk(count, dim=-1).indices.sort(dim=-1).values
