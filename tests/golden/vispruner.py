"""VisPruner's cases: the tokens that stay; with an important_ratio of 1 they are FasterVLM's."""

from __future__ import annotations

import torch

from tests.golden.case import Case, UnknownCase, expect_equal
from vtprune.pruners import VisPruner
from vtprune.pruners.vispruner import important_and_diverse


def run(case: Case) -> None:
    """Raises Mismatch where the tokens of an image differ, UnknownCase for another kind of case.

    features: (B, N, D), cls_attention: (B, H, N), mask: (B, N).
    """
    if not {"features", "cls_attention", "tokens", "important_ratio", "mask"} <= set(case.tensors):
        raise UnknownCase(f"no VisPruner case has tensors {', '.join(case.tensors)}")
    count = int(case["tokens"])
    important = VisPruner(important_ratio=float(case["important_ratio"])).important_count(count)
    scores = case["cls_attention"].float().mean(dim=1)
    for index, (features, own) in enumerate(zip(case["features"], scores, strict=True)):
        chosen = important_and_diverse(own, features, count=count, important=important)
        kept = torch.zeros_like(own, dtype=torch.bool).index_fill_(0, chosen, True)
        expect_equal(f"kept of image {index}", kept, case["mask"][index])
