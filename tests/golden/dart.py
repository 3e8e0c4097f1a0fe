"""DART's cases: pivots by the norms of keys, and what stays where they choose in the order that was recorded."""

from __future__ import annotations

import torch

from tests.golden.case import Case, UnknownCase, expect_equal
from vtprune.pruners.dart import choose_pivots, even_takes, key_norms, least_alike
from vtprune.pruners.parts.cosines import unit_vectors

PIVOTS = 4


def run(case: Case) -> None:
    """Raises Mismatch where a choice differs, UnknownCase for another kind of case."""
    states, key = case["states"], case["keys"]
    if states.shape[0] != 1 or key.shape[0] != 1:
        raise UnknownCase(f"a batch of {states.shape[0]} rows")
    start, tokens, target = (int(case[name]) for name in ("start", "image_tokens", "target"))
    end, length, norms = start + tokens, states.shape[1], key_norms(key[0])
    image, after = torch.arange(start, end), torch.arange(end, length)
    own, words = choose_pivots(norms[image], image, PIVOTS), choose_pivots(norms[after], after, PIVOTS)
    expect_equal("image pivots", own, case["image_pivots"].sort().values)
    expect_equal("text pivots", words, case["text_pivots"].sort().values)
    order = case["pivot_order"]
    expect_equal("pivots", torch.cat([own, words]).sort().values, order.sort().values)
    # What each of them takes: by the share where no target is given, which leaves the image's own pivots out.
    wanted = int(tokens * (1 - float(case["reduction_ratio"]))) if target < 0 else min(target, tokens - PIVOTS)
    takes = even_takes(wanted // len(order) * len(order), len(order))
    unit = unit_vectors(states[0], "dart")
    taken = least_alike(unit[order] @ unit[image].T, torch.isin(image, own), takes)
    expect_equal("kept", image[taken], case["kept"].sort().values)
