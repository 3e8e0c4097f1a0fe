"""DivPrune's cases: the chosen tokens in order, or as directions where too few are distinct."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.golden.case import Case, Mismatch, UnknownCase, expect_equal
from vtprune.pruners.divprune import max_min_diverse

# Cosines that fp32 cannot tell from 1.
SAME = 1 - 1e-6


def run(case: Case) -> None:
    """Raises Mismatch where a choice differs, UnknownCase for another kind of case.

    features: (N, D), or (B, N, D) with a leading B in what is compared.
    """
    if not {"features", "selected_in_order"} <= set(case.tensors):
        raise UnknownCase(f"no DivPrune case has tensors {', '.join(case.tensors)}")
    features = case["features"]
    if features.ndim not in (2, 3):
        raise UnknownCase(f"features of shape {tuple(features.shape)}")
    images = features.reshape(-1, *features.shape[-2:])
    orders = case["selected_in_order"].reshape(images.shape[0], -1)
    recorded = case["keep_sorted"].reshape(images.shape[0], -1) if "keep_sorted" in case else None
    tokens = images.shape[1]
    count = max(1, round(float(case.setting("ratio")) * tokens))
    if count != orders.shape[1]:
        raise Mismatch(f"{count} tokens of {tokens}, recorded {orders.shape[1]}")
    for index, (image, order) in enumerate(zip(images, orders, strict=True)):
        got = max_min_diverse(image, count)
        if got.unique().numel() != count:
            raise Mismatch("a token was chosen twice")
        same = directions(image)
        distinct = same.unique().numel()
        if distinct < count:
            # What the reference does once distances are about 0 is rounding noise.
            wanted, found = same[order[:distinct]], same[got[:distinct]]
            expect_equal("directions chosen first", found.sort().values, wanted.sort().values)
            continue
        expect_equal("directions chosen, in order", same[got], same[order])
        if recorded is not None and distinct == tokens:
            expect_equal("kept", got.sort().values, recorded[index])


def directions(features: Tensor) -> Tensor:
    """(N,) for each token the first one of the same direction."""
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    return (unit @ unit.T > SAME).int().argmax(dim=1)
