"""The choice for one image of an engine's batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtprune
from vtprune.method.answers import Selection
from vtprune.method.views import LayerSignals
from vtprune.serving.choosing import Shown, choose


def shown(features: torch.Tensor, count: int) -> Shown:
    """An image of 4 x 4 tokens, of which so many were promised."""
    states = torch.randn(2, 16, 4)
    return Shown(
        features=features,
        grid=(1, 4, 4),
        count=count,
        pixels=torch.zeros(3, 8, 8),
        signals=LayerSignals(states, states, states, scale=1.0, prefix=0, group=1),
        text=torch.zeros(0, 8),
        text_ids=torch.zeros(0, dtype=torch.long),
        source="",
    )


def test_the_choice_is_that_of_select() -> None:
    features = torch.randn(16, 8)
    vectors, kept = choose(vtprune.Pool(keep=4), shown(features, 4))
    wanted = vtprune.select(features, vtprune.Pool(keep=4), grid=(4, 4))
    assert torch.equal(vectors, wanted.features)
    assert torch.equal(kept, wanted.kept)


def test_an_image_that_keeps_everything_is_left_as_it_is() -> None:
    features = torch.randn(16, 8)
    vectors, kept = choose(vtprune.NoPruning(), shown(features, 16))
    assert vectors is features
    assert kept.tolist() == list(range(16))


def test_an_image_whose_features_are_no_numbers_does_not_end_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    _, kept = choose(vtprune.DivPrune(keep=4), shown(torch.full((16, 8), float("nan")), 4))
    assert kept.tolist() == [0, 4, 8, 12]
    assert "divprune" in caplog.text


def test_a_broken_promise_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fewer(self: Any, stream: Any) -> Selection:
        return Selection(torch.arange(stream.budget - 1), sound=True)

    monkeypatch.setattr(vtprune.Grid, "select", fewer)
    with pytest.raises(RuntimeError, match="grid kept 3 tokens of 16 where it promised 4"):
        choose(vtprune.Grid(keep=4), shown(torch.randn(16, 8), 4))
