"""Wrapped models under training, PEFT, gradient checkpointing, offloading, half precision and compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

import vtprune
from tests.matrix import CACHE, PRUNERS, Drops, label
from tests.models import IMAGE, MODELS, ROWS, make, prompt
from tests.oracle import STEPS, run_masked
from vtprune.method.pruner import Pruner
from vtprune.method.views import LayerSignals

EVERYWHERE = Drops(encoder=(0, 2), first=True, layers=(0, 2))
every_model = pytest.mark.parametrize("kind", MODELS)


def _labels(inputs: dict[str, torch.Tensor], *, after_image: bool) -> torch.Tensor:
    """Labels on the text; with or without the first text token after an image."""
    ids = inputs["input_ids"]
    labels = ids.masked_fill(ids == IMAGE, -100)
    if "attention_mask" in inputs:
        mask = inputs["attention_mask"]
        # A padding position predicts the first token of a left-padded row: no model is asked for that.
        labels = labels.masked_fill((mask == 0) | (mask.cumsum(dim=1) == 1), -100)
    if not after_image:
        follows = torch.zeros_like(ids, dtype=torch.bool)
        follows[:, 1:] = (ids == IMAGE)[:, :-1]
        labels = labels.masked_fill(follows, -100)
    return labels


def _features(model: Any, inputs: dict[str, torch.Tensor]) -> Any:
    grids = {"image_grid_thw": inputs["image_grid_thw"]} if "image_grid_thw" in inputs else {}
    with torch.no_grad():
        return [one.clone() for one in model.model.get_image_features(inputs["pixel_values"], **grids).pooler_output]


@every_model
@pytest.mark.parametrize("padding", ["left", "right"])
def test_the_loss_is_that_of_the_masked_model(kind: str, padding: str) -> None:
    inputs = prompt(kind, ROWS[kind], padding)
    positions = {}
    if not kind.startswith("qwen"):
        positions = {"position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    model = vtprune.wrap(make(kind), EVERYWHERE)
    labels = _labels(inputs, after_image=False)
    loss = model(**inputs, **positions, labels=labels).loss
    report, features = vtprune.report(model), _features(model, inputs)
    logits = run_masked(kind, vtprune.unwrap(model), inputs, report, features)[:, :-STEPS]
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert abs(loss.item() - expected.item()) < 2e-5


@every_model
def test_a_target_after_a_dropped_token_is_predicted_by_the_last_kept_one(kind: str) -> None:
    inputs = prompt(kind, ROWS[kind][:1])
    model = vtprune.wrap(make(kind), "grid", keep=4)
    logits = model(**inputs).logits[0]
    ids = inputs["input_ids"][0]
    places = (ids == IMAGE).nonzero().flatten()
    kept = places[vtprune.report(model).samples[0].images[0].kept]
    dropped_after = [place for place in places.tolist() if place > int(kept[-1])]
    assert dropped_after
    for place in dropped_after:
        assert torch.equal(logits[place], logits[kept[-1]])


@every_model
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(kind: str, reentrant: bool) -> None:
    inputs = prompt(kind, ROWS[kind])
    labels = _labels(inputs, after_image=True)
    gradients = []
    for checkpointing in (False, True):
        model = vtprune.wrap(make(kind), Drops(encoder=(0, 2), first=True, layers=(0, 2))).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model(**inputs, labels=labels).loss.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    assert sum(grad is not None for grad in gradients[0].values()) > 100
    for name, grad in gradients[0].items():
        other = gradients[1][name]
        assert (grad is None) == (other is None)
        assert grad is None or torch.allclose(grad, other, atol=1e-6)


@every_model
def test_lora_before_and_after_wrapping_reads_the_adapted_projections(kind: str) -> None:
    from peft import LoraConfig, get_peft_model

    inputs = prompt(kind, ROWS[kind])
    config = LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "qkv"], init_lora_weights=False)
    pruner = vtprune.FlowCut(keep=9, stages=2)
    torch.manual_seed(3)
    after = get_peft_model(make(kind), config).eval()
    weights = after.state_dict()
    assert vtprune.wrap(after, pruner) is after
    before = get_peft_model(vtprune.wrap(make(kind), pruner), config).eval()
    before.load_state_dict(weights)
    plain = vtprune.wrap(make(kind), pruner)
    logits, kept = [], []
    for model in (after, before, plain):
        with torch.no_grad():
            logits.append(model(**inputs).logits)
        kept.append([image.kept_per_layer for sample in vtprune.report(model).samples for image in sample.images])
    assert kept[0] == kept[1] != kept[2]
    assert torch.allclose(logits[0], logits[1], atol=1e-6)
    assert torch.equal(after.generate(**inputs, max_new_tokens=3), before.generate(**inputs, max_new_tokens=3))
    vtprune.unwrap(after)


@every_model
def test_offloaded_weights_give_the_same_answer(kind: str) -> None:
    from accelerate import cpu_offload

    inputs = prompt(kind, ROWS[kind])
    plain = vtprune.wrap(make(kind), EVERYWHERE)
    late, early = make(kind), vtprune.wrap(make(kind), EVERYWHERE)
    # SigLIP's pooling head reads its weights without calling their module, so it is loaded as one piece.
    options = {"execution_device": "cpu", "preload_module_classes": ["SiglipMultiheadAttentionPoolingHead"]}
    cpu_offload(late, **options)
    vtprune.wrap(late, EVERYWHERE)
    cpu_offload(early, **options)
    with torch.no_grad():
        expected = plain(**inputs).logits
        assert torch.equal(late(**inputs).logits, expected)
        assert torch.equal(early(**inputs).logits, expected)
    assert torch.equal(late.generate(**inputs, max_new_tokens=3), plain.generate(**inputs, max_new_tokens=3))


@pytest.mark.lean
@every_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pruner", PRUNERS + CACHE, ids=label)
def test_half_precision_models_prune_and_generate(kind: str, dtype: torch.dtype, pruner: Pruner) -> None:
    inputs = prompt(kind, ROWS[kind])
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    model = vtprune.wrap(make(kind).to(dtype), pruner)
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
    assert model.generate(**inputs, max_new_tokens=3).shape[0] == len(ROWS[kind])
    sizes = [len(image.kept) for sample in vtprune.report(model).samples for image in sample.images]
    single = vtprune.wrap(make(kind), pruner)
    single(**prompt(kind, ROWS[kind]))
    assert sizes == [len(image.kept) for sample in vtprune.report(single).samples for image in sample.images]


def test_scores_of_half_precision_states_are_computed_in_single_precision() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(4, 37, 8, generator=generator).bfloat16() for _ in range(3))
    half = LayerSignals(query, key, value, 0.35, 1, 1)
    single = LayerSignals(query.float(), key.float(), value.float(), 0.35, 1, 1)
    assert torch.equal(half.cls_attention(), single.cls_attention())
    assert torch.equal(half.received_attention(), single.received_attention())


@pytest.mark.slow
@every_model
def test_a_compiled_model_gives_the_same_logits(kind: str) -> None:
    inputs = prompt(kind, ROWS[kind])
    model = vtprune.wrap(make(kind), EVERYWHERE)
    with torch.no_grad():
        expected = model(**inputs).logits
        torch.compiler.reset()
        compiled = torch.compile(model, backend="eager")
        assert torch.allclose(compiled(**inputs).logits, expected, atol=2e-5)
