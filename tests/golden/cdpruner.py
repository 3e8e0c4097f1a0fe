"""CDPruner's cases: relevance, kept tokens, and the gains that are left after the last choice."""

from __future__ import annotations

import torch

from tests.golden.case import Case, UnknownCase, expect_close, expect_equal
from vtprune.pruners.cdpruner.dpp import (
    greedy_dpp,
    mean_cosine,
    min_max,
    sharpen,
)

NEEDED = {"projected_features", "image_embeds", "text_embeds", "keep_sorted"}


def run(case: Case) -> None:
    """Raises Mismatch where a result differs, UnknownCase for another kind of case.

    projected_features: (B, N, D); image_embeds: (B, N, E); text_embeds: (M, E); B crops share one range.
    """
    if not set(case.tensors) >= NEEDED:
        raise UnknownCase(f"no CDPruner case has tensors {', '.join(case.tensors)}")
    features, images, texts = case["projected_features"], case["image_embeds"], case["text_embeds"]
    if features.ndim != 3 or images.shape[:2] != features.shape[:2] or texts.ndim != 2:
        raise UnknownCase(
            f"features {tuple(features.shape)}, images {tuple(images.shape)}, texts {tuple(texts.shape)}"
        )
    count = min(int(case.setting("visual_token_num")), features.shape[1])
    relevance = min_max(-mean_cosine(images, texts), shared=True)
    if "theta" in case.metadata and case.setting("theta") is not None:
        relevance = sharpen(relevance, float(case.setting("theta")))
    elif "relevance" in case:
        expect_close("relevance", relevance, case["relevance"])
    kept, gains = zip(*(greedy_dpp(f, r, count) for f, r in zip(features, relevance, strict=True)), strict=True)
    wanted = case["keep_sorted"].reshape(features.shape[0], -1)
    expect_equal("kept", torch.stack([order.sort().values for order in kept]), wanted)
    if "final_di2s" in case and "theta" not in case.metadata:
        left = case["final_di2s"].reshape(relevance.shape)
        chosen = left < -1e20
        expect_equal("chosen, by the gains", torch.stack(gains) == -torch.inf, chosen)
        expect_close("gains left", torch.stack(gains)[~chosen], left[~chosen], atol=1e-5)
