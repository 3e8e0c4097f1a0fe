"""HoloV's cases: crop weights, quotas and kept positions of the released selection."""

from __future__ import annotations

import torch

from tests.golden.case import Case, UnknownCase, expect_close, expect_equal
from vtprune.pruners.holov import select_strips


def run(case: Case) -> None:
    """Raises Mismatch where weights, quotas or positions differ, UnknownCase for another kind of case."""
    if not {"attention", "tokens", "kept_positions"} <= set(case.tensors):
        raise UnknownCase(f"no HoloV case has tensors {', '.join(case.tensors)}")
    strips, budget = case.setting("num_patches"), case.setting("new_image_token_num")
    attention, tokens = case["attention"], case["tokens"]
    images = attention.shape[0]
    wanted = case["kept_positions"].reshape(images, -1)
    for index in range(images):
        got = select_strips(tokens[index], attention[index], strips, budget)
        expect_equal("kept positions, in order", got.positions, wanted[index])
        for name, values in (("patch_scores", got.scores), ("weights", got.weights)):
            if name in case:
                expect_close(name, values, case[name].reshape(images, -1)[index])
        if "allocated" in case:
            expect_equal("quotas", got.quotas, case["allocated"].reshape(images, -1)[index])
        if "kept_tokens" in case:
            padded = torch.cat([tokens[index], torch.zeros_like(tokens[index, :1])])
            expect_close("kept tokens", padded[got.positions], case["kept_tokens"][index])
