"""HoliTom's cases: the windows, what they save, and the tokens of each of them."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.golden.case import Case, UnknownCase, expect_close, expect_equal
from vtprune.pruners.holitom.holitom import Cut


def run(case: Case) -> None:
    """Raises Mismatch where a result differs, UnknownCase for another kind of case."""
    if not {"features", "attention", "out", "windows"} <= set(case.tensors):
        raise UnknownCase(f"no HoliTom case has tensors {', '.join(case.tensors)}")
    features, attention = case["features"], case["attention"]
    frames, places = attention.shape
    alike = torch.nn.functional.cosine_similarity(features[1:], features[:-1], dim=-1)
    cut = Cut.of((alike > float(case["tau"])).numpy(), places)
    wanted = [(window.start, window.stop - 1) for window in cut.windows]
    expect_equal("windows", torch.tensor(wanted), case["windows"])
    expect_equal("places that stand still", torch.from_numpy(cut.still.sum(axis=1)), case["static_count"])
    if float(case["D"]) != 0:
        raise UnknownCase("the released code fails for a D above 0")
    total = float(case["retain_ratio"]) * frames * places
    counts = cut.released(total)
    kept, clusters = cut.chosen(features, attention, counts, float(case["beta"]))
    out = [_of_window(features, kept, window, places) for window in cut.windows]
    if clusters is not None:
        still = clusters.mixed(features.flatten(0, 1)).split(list(clusters.counts))
        own = [cut.windows.index(window) for window in clusters.windows]
        for place, vectors in zip(own, still, strict=True):
            out[place] = torch.cat([vectors, out[place]])
    expect_equal("tokens of each window", torch.tensor([len(one) for one in out]), case["out_count"])
    if "corrected_ratio" in case:
        expect_close("corrected ratio", torch.tensor(min(1.0, total / sum(cut.sizes))), case["corrected_ratio"])
    expect_close("tokens", torch.cat(out), case["out"], atol=1e-4)


def _of_window(features: Tensor, kept: Tensor, window: range, places: int) -> Tensor:
    """The tokens that go on as they are of a window's frames."""
    inside = (kept >= window.start * places) & (kept < window.stop * places)
    return features.flatten(0, 1)[kept[inside]]
