"""Where few decoder layers have attention, published layers move on to these; others that are given are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import vtprune
from tests.models import ROWS, make, prompt
from vtprune.errors import UnsupportedModelError, VTPruneError
from vtprune.evals.arank.ranks import rank_layers
from vtprune.method import schedules
from vtprune.method.facts import PUBLISHED
from vtprune.method.pruner import Pruner
from vtprune.method.stages import drop_layers, evict_layers, probe_layer
from vtprune.pruners.parts.attending import snapped

# Attention in every fourth of 32 layers, as published.
HYBRID = replace(PUBLISHED, has_cls=False, attention_layers=tuple(range(3, 32, 4)))


def test_layers_move_on_to_one_that_no_earlier_one_took() -> None:
    assert snapped((1, 2, 9), None) == (1, 2, 9)
    assert snapped((1, 2, 9), (3, 7, 11)) == (3, 7, 11)
    assert snapped((3, 8, 12), (3, 7, 11)) == (3, 11)
    assert snapped((12,), (3, 7, 11)) == (11,)
    assert snapped((1,), ()) == ()


@pytest.mark.parametrize(
    ("pruner", "after"),
    [
        (vtprune.FastV(), (3,)),
        (vtprune.FastV(keep=0.4, schedule="steps"), (3,)),
        (vtprune.SparseVLM(), (3, 7, 15)),
        # The next layer ranks: 11, 19 and 27.
        (vtprune.PyramidDrop(), (10, 18, 26)),
        (vtprune.MustDrop(), (3, 7, 11, 15)),
        (vtprune.FlowCut(), (3,)),
        # By what it remembers of the encoder.
        (vtprune.VFlowOpt(), (9, 20)),
    ],
    ids=repr,
)
def test_published_layers_at_the_published_depth(pruner: Pruner, after: tuple[int, ...]) -> None:
    assert drop_layers(pruner.bind(HYBRID)) == after


def test_a_probe_a_guide_and_caches_too() -> None:
    assert probe_layer(vtprune.GemFilter().bind(HYBRID)) == 15
    assert vtprune.CoViPAL(stage="guide").bind(HYBRID).learns_from() in HYBRID.readable
    assert evict_layers(vtprune.D2O().bind(HYBRID)) == (3, 7, 11, 15, 19, 23, 27)
    assert vtprune.D2O(variant="released").bind(HYBRID).density_layers() == HYBRID.readable


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.3, 0.2])
def test_a_budget_is_met_with_fewer_layers_to_drop_at(keep: float) -> None:
    pruner = vtprune.PyramidDrop(keep=keep).bind(HYBRID)
    counts = pruner.counts(576, 576)
    assert sum(counts) <= round(keep * 576) * 32
    assert sum(counts) > (round(keep * 576) - 2) * 32
    assert {layer for layer in range(1, 32) if counts[layer] < counts[layer - 1]} <= set(HYBRID.readable)


def test_a_search_is_offered_no_schedule_that_needs_every_layer() -> None:
    found = vtprune.FastV(keep=0.5).bind(HYBRID).search_space(576)["schedule"].choices
    assert set(found) == set(schedules.NAMES) - set(schedules.EVERY_LAYER)
    with pytest.raises(UnsupportedModelError, match="fastv: schedule 'shifted_cosine' ranks tokens before every"):
        vtprune.FastV(keep=0.5, schedule="shifted_cosine").bind(HYBRID)


def test_a_decoder_without_a_layer_to_read_is_refused() -> None:
    alone = replace(HYBRID, attention_layers=(31,))
    for pruner in (vtprune.FastV(), vtprune.MustDrop()):
        with pytest.raises(VTPruneError, match=f"{pruner.name}.*(none that it could read|has none)"):
            pruner.bind(alone)
    with pytest.raises(VTPruneError, match="flowcut's second stage drops tokens after decoder layer 1, by its"):
        vtprune.FlowCut(stages=2).bind(alone)
    with pytest.raises(UnsupportedModelError, match="d2o cuts the caches of decoder layers 2"):
        vtprune.D2O().bind(alone)


def test_no_bias_is_learned_where_layers_have_no_logits() -> None:
    kind = "qwen3.5"
    model, inputs = vtprune.wrap(make(kind), "covipal:keep=9,width=16,heads=2").train(), prompt(kind, ROWS[kind])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= 90, -100)
    with pytest.raises(VTPruneError, match="no attention logits that a bias could be learned by"):
        model(**inputs, labels=labels)
    vtprune.wrap(vtprune.unwrap(model), "covipal:keep=9,width=16,heads=2,stage=guide")
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert any(part.grad is not None and bool(part.grad.any()) for part in model.vtprune_weights.parameters())


def test_layers_without_maps_are_not_ranked() -> None:
    with pytest.raises(VTPruneError, match="ranks are of attention maps"):
        rank_layers(make("qwen3.5"), iter(()), lambda rows: None)
