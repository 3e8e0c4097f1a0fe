"""CoViPAL's module and its soft choice as functions, and the settings that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtprune
from tests.matrix import at_depth
from tests.models import DECODER_LAYERS, make
from vtprune import CoViPAL
from vtprune.method.facts import ModelFacts
from vtprune.pruners.covipal.module import log_soft_top, new_module, scores_of
from vtprune.tensors.compaction import biased_mask


def test_half_precision_weights_score_in_single_precision() -> None:
    module = new_module(12, 16, 2, 1)
    generator = torch.Generator().manual_seed(0)
    vision, text = torch.randn(9, 12, generator=generator), torch.randn(4, 12, generator=generator)
    half = new_module(12, 16, 2, 1).bfloat16()
    rounded = new_module(12, 16, 2, 1)
    rounded.load_state_dict(half.state_dict())
    assert torch.equal(scores_of(half, vision, text), scores_of(rounded, vision, text))
    assert scores_of(half, vision.bfloat16(), text).dtype == torch.float32
    assert torch.allclose(scores_of(half, vision, text), scores_of(module, vision, text), atol=0.05)


def test_scores_depend_on_the_text_and_on_each_other() -> None:
    module = new_module(12, 16, 2, 1)
    vision, text = torch.randn(9, 12), torch.randn(4, 12)
    scores = scores_of(module, vision, text)
    assert not torch.allclose(scores, scores_of(module, vision, text[:2]))
    assert not torch.allclose(scores[:5], scores_of(module, vision[:5], text))
    order = torch.randperm(9)
    assert torch.allclose(scores[order], scores_of(module, vision[order], text.flip(0)), atol=1e-5)
    assert scores_of(module, vision[:1], text[:0]).isfinite().all()


@pytest.mark.parametrize("count", [1, 3, 11])
@pytest.mark.parametrize("scale", [0.0, 1.0, 50.0])
def test_soft_shares_sum_to_the_budget_and_follow_the_scores(count: int, scale: float) -> None:
    scores = scale * torch.randn(12, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    shares = log_soft_top(scores, count, 1.0).exp()
    assert float(shares.sum()) == pytest.approx(count, rel=1e-3)
    assert torch.equal(shares.argsort(stable=True), scores.argsort(stable=True)) or scale != 1.0
    if scale == 50.0:
        assert set(shares.topk(count).indices.tolist()) == set(scores.topk(count).indices.tolist())


def test_soft_shares_have_the_derivative_of_what_they_solve() -> None:
    scores = torch.randn(7, generator=torch.Generator().manual_seed(2), requires_grad=True)
    found = torch.autograd.functional.jacobian(lambda one: log_soft_top(one, 3, 0.7), scores)
    step, expected = 1e-2, torch.empty(7, 7)
    with torch.no_grad():
        for token in range(7):
            move = torch.zeros(7).index_fill(0, torch.tensor([token]), step)
            more, less = (log_soft_top(scores + way * move, 3, 0.7) for way in (1, -1))
            expected[:, token] = (more - less) / (2 * step)
    assert torch.allclose(found, expected, atol=2e-3)


def test_an_untrained_module_is_always_the_same() -> None:
    torch.manual_seed(5)
    first = new_module(12, 16, 2, 1).state_dict()
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)
    second = new_module(12, 16, 2, 1).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_flash_attention_cannot_learn_by_the_task() -> None:
    mask = torch.ones(1, 4)
    with pytest.raises(vtprune.VTPruneError, match="sdpa"):
        biased_mask(mask, torch.zeros(1, 4), None, None, 0, torch.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": "both"}, "stage is one of"),
        ({"relaxation": None}, "relaxation is one of"),
        ({"queries": "first"}, "queries is one of"),
        ({"guide": 0}, "deeper than the pruning"),
        ({"guide": True}, "deeper than the pruning"),
        ({"guide": 2.0}, "deeper than the pruning"),
        ({"width": 0}, "width is an int"),
        ({"heads": 1.5}, "heads is an int"),
        ({"blocks": False}, "blocks is an int"),
        ({"width": 30, "heads": 4}, "multiple of heads"),
        ({"temperature": 0}, "temperature is"),
        ({"temperature": float("nan")}, "temperature is"),
        ({"temperature": True}, "temperature is"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(vtprune.VTPruneError, match=message):
        CoViPAL(**options)


@pytest.mark.parametrize("stage", ["guide", "task"])
def test_a_guide_beyond_the_decoder_is_refused(stage: str) -> None:
    with pytest.raises(vtprune.VTPruneError, match=f"layers 1 to {DECODER_LAYERS - 1}, got 5"):
        vtprune.wrap(make("llava-clip"), CoViPAL(guide=5, stage=stage))
    vtprune.unwrap(vtprune.wrap(make("llava-clip"), CoViPAL(guide=4, stage=stage)))
    one = ModelFacts(True, 23, 1, 1)
    with pytest.raises(vtprune.VTPruneError, match="guide"):
        CoViPAL(stage="guide").bind(one)
    assert CoViPAL().bind(one).to_dict() == CoViPAL().to_dict()


def test_the_default_guide_is_a_fraction_of_the_depth() -> None:
    guides = {32: 18, 40: 23, 6: 3, 2: 1}
    assert {depth: at_depth(CoViPAL(stage="guide"), depth).learns_from() for depth in guides} == guides
    assert CoViPAL().learns_from() is None
