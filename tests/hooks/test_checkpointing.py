"""Gradient checkpointing of a wrapped model, of either kind: the same loss and the same gradients as without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtprune
from tests.differences import shake, text_labels
from tests.matrix import CACHE, DROPS, GATED, PRUNERS, RELEASED, Drops, label
from tests.models import MODELS, ROWS, make, prompt
from vtprune.hooks.checkpoints import around_hooks
from vtprune.method.pruner import Pruner

Found = tuple[float, dict[str, Tensor]]

TRAINED = [
    vtprune.PMoD(keep=0.6),
    vtprune.GammaMoD(keep=0.6),
    vtprune.CoViPAL(keep=9, width=16, heads=2),
    vtprune.CoViPAL(keep=9, width=16, heads=2, relaxation="soft"),
    vtprune.CoViPAL(keep=9, width=16, heads=2, stage="guide"),
    vtprune.IARED2(keep=0.3),
]
SAMPLE = [
    ("llava-clip", vtprune.Turbo(keep=0.5)),
    ("qwen2.5-vl", vtprune.Turbo(keep=0.5)),
    ("llava-clip", vtprune.VisionZip(keep=0.25)),
    ("qwen2.5-vl", vtprune.VFlowOpt(keep=0.25)),
    ("llava-siglip", vtprune.SparseVLM()),
    ("llava-siglip", Drops(layers=(0, 2), first=True, merge=True)),
    ("qwen2.5-vl", vtprune.PMoD(keep=0.6)),
    ("qwen3-vl", vtprune.Turbo(keep=0.5)),
    ("qwen3-vl", vtprune.VFlowOpt(keep=0.25)),
]
each = pytest.mark.parametrize("pruner", TRAINED, ids=label)


def _gradients(
    kind: str, pruner: Pruner | list[Pruner], reentrant: bool | None, *, training: bool = True, own: bool = False
) -> Found:
    """The loss, and the gradient of every parameter that has one; own: only the method's weights are trained."""
    inputs = prompt(kind, ROWS[kind])
    model: Any = vtprune.wrap(make(kind), pruner).train(training)
    shake(model)
    for name, weight in model.named_parameters():
        weight.requires_grad_("vtprune" in name or not own)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    # Some methods draw anew in each forward of training.
    torch.manual_seed(0)
    loss = model(**inputs, labels=text_labels(inputs), use_cache=False).loss
    loss.backward()
    return float(loss.detach()), {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def _compare(found: Found, expected: Found) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found[1].keys() >= expected[1].keys()
    for name, gradient in found[1].items():
        if name not in expected[1]:
            # What a checkpointed layer puts out beside what is read of it may have zeros in place of no gradient.
            assert not gradient.any(), name
            continue
        error = float((gradient - expected[1][name]).abs().max())
        assert error <= 1e-5 * max(1.0, float(expected[1][name].abs().max())), name


def _check(kind: str, pruner: Pruner | list[Pruner], **options: bool) -> None:
    expected = _gradients(kind, pruner, None, **options)
    for reentrant in (False, True):
        _compare(_gradients(kind, pruner, reentrant, **options), expected)


@pytest.mark.parametrize(("kind", "pruner"), SAMPLE, ids=lambda one: one if isinstance(one, str) else label(one))
def test_checkpointing_gives_the_same_gradients(kind: str, pruner: Pruner) -> None:
    _check(kind, pruner)


@each
def test_a_method_s_own_weights_learn_the_same_under_checkpointing(pruner: Pruner) -> None:
    _check("llava-clip", pruner)


@each
def test_a_method_s_own_weights_learn_the_same_where_the_model_is_frozen(pruner: Pruner) -> None:
    expected = _gradients("llava-clip", pruner, None, own=True)
    assert expected[1]
    assert all(name.startswith("vtprune") for name in expected[1])
    _check("llava-clip", pruner, own=True)


def test_a_list_of_methods_gives_the_same_gradients_under_checkpointing() -> None:
    pruners: list[Pruner] = [vtprune.Turbo(keep=0.6), vtprune.VFlowOpt(keep=0.3)]
    for kind in ("llava-clip", "qwen2.5-vl"):
        _check(kind, pruners)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("pruner", PRUNERS + CACHE + GATED + RELEASED + DROPS, ids=label)
def test_checkpointing_gives_the_same_gradients_with_every_method(kind: str, pruner: Pruner, training: bool) -> None:
    _check(kind, pruner, training=training)


@pytest.mark.parametrize("method", ["fastv", "spatten", "sparsevlm", "lazyllm", "mustdrop", "pyramid_drop", "d2o"])
def test_a_single_layer_that_is_checkpointed_is_seen_as_without(method: str) -> None:
    model, inputs = (
        vtprune.wrap(make("llava-clip"), method, keep=0.5).train(),
        prompt("llava-clip", ROWS["llava-clip"]),
    )
    expected = model(**inputs).logits
    model.gradient_checkpointing_enable()
    decoder = model.model.language_model
    decoder.gradient_checkpointing = False
    for index, layer in enumerate(decoder.layers):
        layer.gradient_checkpointing = index == 1
    assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_that_is_switched_on_and_off_while_wrapped_leaves_the_model_as_it_was(reentrant: bool) -> None:
    model, inputs = (
        vtprune.wrap(make("llava-clip"), vtprune.Turbo(keep=0.5)).train(),
        prompt("llava-clip", ROWS["llava-clip"]),
    )
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    layer = model.model.language_model.layers[0]
    given = layer._gradient_checkpointing_func
    model(**inputs, labels=text_labels(inputs), use_cache=False).loss.backward()
    vtprune.unwrap(model)
    assert layer._gradient_checkpointing_func is given
    model.gradient_checkpointing_disable()
    model(**inputs, labels=text_labels(inputs)).loss.backward()


@pytest.mark.skipif(around_hooks(), reason="these transformers releases drop the cache of a model in training")
@pytest.mark.parametrize("kind", MODELS)
def test_a_checkpointed_model_in_training_generates_what_it_does_otherwise(kind: str) -> None:
    inputs = prompt(kind, ROWS[kind])
    expected = vtprune.wrap(make(kind), "fastv", keep=0.4).generate(**inputs, max_new_tokens=4, do_sample=False)
    model = vtprune.wrap(make(kind), "fastv", keep=0.4).train()
    model.gradient_checkpointing_enable()
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), expected)
