"""Gradients of wrapped models: those of the loss that they compute, whatever drops, merges, waits or is routed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vtprune
from tests.differences import disagreements, doubles, generation_loss, shake, text_labels
from tests.matrix import CACHE, DROPS, GATED, PRUNERS, RELEASED, Drops, label
from tests.models import MODELS, ROWS, make, prompt
from vtprune.method.pruner import Pruner

# What fp64 leaves of a central difference is a thousand times less.
TOLERANCE = 1e-4
# One of each way in which vectors flow together, wait, or are weighed.
SAMPLE = [
    ("llava-clip", vtprune.VisionZip(keep=0.25)),
    ("qwen2.5-vl", vtprune.Turbo(keep=0.5)),
    ("llava-siglip", vtprune.VFlowOpt(keep=0.25)),
    ("llava-clip", vtprune.PruMerge()),
    ("llava-clip", vtprune.SparseVLM()),
    ("llava-siglip", Drops(layers=(0, 2), first=True, merge=True)),
    ("qwen2.5-vl", vtprune.D2O()),
    ("qwen3-vl", vtprune.Turbo(keep=0.5)),
    ("qwen3-vl", vtprune.VFlowOpt(keep=0.25)),
    ("llava-clip", vtprune.LazyLLM(keep=14)),
    ("llava-clip", vtprune.PMoD(keep=0.6, layers=(2,), schedule="linear")),
    ("llava-siglip", vtprune.PMoD(keep=0.5, reads_skipped=True)),
]
TRAINED = [
    vtprune.PMoD(),
    vtprune.GammaMoD(keep=0.6),
    vtprune.CoViPAL(keep=9, width=16, heads=2, relaxation="soft"),
    vtprune.IARED2(),
]


def _doubled(kind: str, pruner: Pruner) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    inputs = prompt(kind, ROWS[kind])
    inputs["pixel_values"] = inputs["pixel_values"].double()
    model = vtprune.wrap(make(kind).double(), pruner)
    shake(model)
    return model, inputs


def _check(kind: str, pruner: Pruner) -> None:
    with doubles():
        model, inputs = _doubled(kind, pruner)
        found = disagreements(model, generation_loss(model, inputs, steps=3))
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize(("kind", "pruner"), SAMPLE, ids=lambda one: one if isinstance(one, str) else label(one))
def test_gradients_are_those_of_the_loss(kind: str, pruner: Pruner) -> None:
    _check(kind, pruner)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("pruner", PRUNERS + CACHE + GATED + RELEASED + DROPS, ids=label)
def test_gradients_of_every_method_are_those_of_the_loss(kind: str, pruner: Pruner) -> None:
    _check(kind, pruner)


@pytest.mark.parametrize("pruner", TRAINED, ids=label)
def test_gradients_in_training_are_those_of_the_loss_with_what_the_method_adds(pruner: Pruner) -> None:
    with doubles():
        model, inputs = _doubled("llava-clip", pruner)
        labels = text_labels(inputs)
        model.train()
        found = disagreements(model, lambda: model(**inputs, labels=labels).loss)
        weights = [weight for name, weight in model.named_parameters() if "vtprune" in name]
    assert any(weight.grad is not None and bool((weight.grad != 0).any()) for weight in weights)
    assert max(found.values()) < TOLERANCE, found
