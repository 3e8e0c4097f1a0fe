"""gamma-MoD: against a slow reference on every model, and through the properties that all methods share."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vtprune
from tests.flop_helper import measured_flops
from tests.matrix import GATED, label
from tests.models import IMAGE, MODELS, PAST, ROWS, TEXT, Row, make, prompt
from tests.oracle import STEPS, TOLERANCE, compare, run_wrapped
from tests.pruners.slow_gamma_mod import above, best_of_each_image, run_slow
from tests.test_oracle import BATCHES
from tests.test_properties import _kept, _traces
from vtprune.pruners.gamma_mod import GammaMoD

every_model = pytest.mark.parametrize("kind", MODELS)
every_setting = pytest.mark.parametrize("pruner", GATED, ids=label)
# Of five decoder layers, with the tokens of an image that a routed one computes.
SETTINGS = [
    (GammaMoD(), (1, 2, 3), lambda n: n // 2),
    (GammaMoD(keep=0.6), (1, 2, 3), lambda n: min(n, (round(0.6 * n) * 5 - 2 * n) // 3)),
    (GammaMoD(layers=(2, 4), skip=0.75), (2, 4), lambda n: n // 4),
    (GammaMoD(keep=1.0), (1, 2, 3), lambda n: n),
]
RELEASED = GammaMoD(variant="released", threshold=0.45)


def wrapped(model: Any, pruner: Any) -> Any:
    """The model under a pruner whose router is the same each time, and as sure as a trained one."""
    torch.manual_seed(5)
    vtprune.wrap(model, pruner)
    with torch.no_grad():
        router(model).mul_(3)
    return model


def router(model: Any) -> Tensor:
    found: nn.Parameter = model.vtprune_weights["0"].weight
    return found


def inputs_of(kind: str, batch: str) -> dict[str, Tensor]:
    rows, padding = BATCHES[batch]
    return prompt(kind, [ROWS[kind][row] for row in rows], padding)


@every_model
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("pruner", "layers", "count"), SETTINGS, ids=lambda one: None if callable(one) else str(one))
def test_prefill_and_decode_are_what_the_slow_reference_makes(
    kind: str, attention: str, batch: str, pruner: Any, layers: tuple[int, ...], count: Any
) -> None:
    inputs = inputs_of(kind, batch)
    model = wrapped(make(kind, attention), pruner)
    logits, report, _ = run_wrapped(kind, model, inputs)
    weight = router(model).clone()
    expected, found = run_slow(kind, vtprune.unwrap(model), inputs, weight, layers, best_of_each_image(count))
    assert compare(logits, expected, inputs) < TOLERANCE
    for layer in range(5):
        for row, tokens in enumerate(report.tokens_per_layer[layer]):
            image = inputs["input_ids"][row] == IMAGE
            whole = found[layer][row, :-STEPS][image] if layer in layers else image[image]
            assert tokens == int(whole.sum())


@every_model
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", BATCHES)
def test_the_released_rule_skips_prompt_tokens_and_decode_steps(kind: str, attention: str, batch: str) -> None:
    inputs = inputs_of(kind, batch)
    model = wrapped(make(kind, attention), RELEASED)
    logits, report, cache = run_wrapped(kind, model, inputs)
    weight, compact = router(model).clone(), not kind.startswith("qwen")
    expected, found = run_slow(
        kind, vtprune.unwrap(model), inputs, weight, (1, 2, 3), above(0.45, 0.5), compact=compact
    )
    assert compare(logits, expected, inputs) < TOLERANCE
    steps = torch.stack([one[:, -STEPS:] for one in found.values()])
    assert int(steps.sum()) < steps.numel()
    assert batch == "alone" or bool(steps.any())
    # A cache holds what its layer computed, and nothing else.
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    now = vtprune.report(cache)
    for layer, kept in found.items():
        assert now.kv_tokens_per_layer[layer] == kept.sum(dim=1).tolist()
        assert report.kv_tokens_per_layer[layer] == (kept[:, :-STEPS] & real).sum(dim=1).tolist()
        for row in range(len(kept)):
            slots = cache.layers[layer].slots
            held = slots[row][slots[row] >= 0].tolist()
            places = kept[row].nonzero().flatten().tolist()
            assert [place for place in held if place >= real.shape[1] or real[row, place]] == places


@every_model
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_whole_budget_is_the_base_with_each_mlp_weighed(kind: str, attention: str) -> None:
    inputs = prompt(kind, ROWS[kind])
    model = wrapped(make(kind, attention), GammaMoD(keep=1.0))
    with torch.no_grad():
        actual = model(**inputs).logits
        report = vtprune.report(model)
        weight = router(model).clone()
        vtprune.unwrap(model)
        states: dict[int, Tensor] = {}
        for index in (1, 2, 3):
            layer = model.model.language_model.layers[index]
            layer.input_layernorm.register_forward_hook(
                lambda module, args, output, index=index: states.__setitem__(index, output)
            )
            layer.mlp.register_forward_hook(
                lambda module, args, output, index=index: output * (states[index] @ weight.T).softmax(-1)[..., 1:]
            )
        assert torch.equal(actual, model(**inputs).logits)
    assert report.achieved_keep == 1.0
    assert all(image.kept_per_layer[2] == list(range(image.tokens)) for one in report.samples for image in one.images)


@every_model
@pytest.mark.parametrize("pruner", [*GATED, RELEASED], ids=label)
def test_a_ragged_batch_equals_each_row_alone(kind: str, pruner: Any) -> None:
    model = wrapped(make(kind), pruner)
    inputs = prompt(kind, ROWS[kind])
    logits, report, _ = run_wrapped(kind, model, inputs)
    for index, row in enumerate(ROWS[kind]):
        own = prompt(kind, [row])
        with torch.no_grad():
            alone = model(**own)
        length = own["input_ids"].shape[1]
        text = own["input_ids"][0] < 90
        assert _kept(vtprune.report(model)) == [image.kept_per_layer for image in report.samples[index].images]
        assert float((alone.logits[0] - logits[index, :-STEPS][-length:])[text].abs().max()) < TOLERANCE


@every_model
@pytest.mark.parametrize("pruner", [*GATED, RELEASED], ids=label)
def test_runs_repeat_and_unwrapping_leaves_nothing_behind(kind: str, pruner: Any, tmp_path: Path) -> None:
    inputs = prompt(kind, ROWS[kind])
    model = make(kind)
    with torch.no_grad():
        plain = model(**inputs).logits
        before = _traces(model)
        first = wrapped(model, pruner)(**inputs).logits
        kept = _kept(vtprune.report(model))
        assert torch.equal(first, model(**inputs).logits)
        assert not torch.equal(first, plain)
        vtprune.save(model, tmp_path)
        assert vtprune.load_config(tmp_path) == pruner
        vtprune.unwrap(model)
        assert _traces(model) == before
        assert torch.equal(model(**inputs).logits, plain)
        vtprune.wrap(model, tmp_path)
        assert torch.equal(model(**inputs).logits, first)
    assert _kept(vtprune.report(model)) == kept


@every_model
@pytest.mark.parametrize("pruner", [*GATED, GammaMoD(keep=1.0), RELEASED], ids=label)
@pytest.mark.parametrize("row", [ROWS["llava-clip"][0], ROWS["llava-clip"][2], TEXT], ids=["one", "two", "text"])
def test_analytic_flops_are_within_one_percent_of_torchs_counter(kind: str, pruner: Any, row: Row) -> None:
    inputs = prompt(kind, [row])
    model = wrapped(make(kind, "eager"), pruner)
    measured = measured_flops(model, inputs)
    assert vtprune.report(model).flops == pytest.approx(measured, rel=0.01)


@every_model
@pytest.mark.parametrize("pruner", [*GATED, RELEASED], ids=label)
def test_kv_bytes_are_the_caches(kind: str, pruner: Any) -> None:
    model = wrapped(make(kind), pruner)
    _, _, cache = run_wrapped(kind, model, prompt(kind, ROWS[kind][:1]))
    report = vtprune.report(cache)
    held = sum(one.numel() * one.element_size() for layer in cache.layers for one in (layer.keys, layer.values))
    assert report.kv_bytes == report.kv_bytes_allocated == held
    assert report.kv_bytes < report.kv_bytes_full
    assert report.steps == STEPS


@every_model
def test_text_is_weighed_with_and_without_a_cache(kind: str) -> None:
    inputs = {"input_ids": prompt(kind, [TEXT])["input_ids"]}
    model = make(kind)
    with torch.no_grad():
        plain = model(**inputs).logits
        wrapped(model, GammaMoD())
        cached = model(**inputs, use_cache=True).logits
        assert torch.equal(cached, model(**inputs, use_cache=False).logits)
    assert not torch.allclose(cached, plain, atol=1e-3)
    report = vtprune.report(model)
    assert report.samples[0].images == []
    assert report.flops_breakdown.decoder == report.flops_full - report.flops_breakdown.head


@every_model
@pytest.mark.parametrize("rows", [[TEXT], None], ids=["text", "images"])
def test_a_layer_that_computes_nothing_is_passed_by(kind: str, rows: Any) -> None:
    inputs = prompt(kind, rows or ROWS[kind])
    model = make(kind)
    # Nothing is added behind this layer, whatever the family.
    wrapped(model, GammaMoD(variant="released", threshold=0.999, layers=(3,)))
    with torch.no_grad():
        router(model).zero_()
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=True)
        cache = model(**inputs, use_cache=True).past_key_values
        actual = model(**inputs).logits
    padding = inputs["input_ids"] == 0
    assert out.shape[1] == inputs["input_ids"].shape[1] + 4
    assert [vtprune.report(cache).kv_tokens_per_layer[3][row] for row in range(len(padding))] == [0] * len(padding)
    vtprune.unwrap(model)
    del model.model.language_model.layers[3]
    model.model.language_model.config.num_hidden_layers = 4
    for index, layer in enumerate(model.model.language_model.layers):
        layer.self_attn.layer_idx = index
    with torch.no_grad():
        expected = model(**inputs).logits
    real = ~padding & (inputs["input_ids"] < 90)
    assert float((actual - expected)[real].abs().max()) < TOLERANCE


def test_beams_and_crops_follow_a_layer_that_computed_nothing() -> None:
    model = wrapped(make("llava-clip"), GammaMoD(variant="released", threshold=0.999, layers=(2,)))
    inputs = prompt("llava-clip", ROWS["llava-clip"][:1])
    with torch.no_grad():
        router(model).zero_()
        # p is a half everywhere: no token of the prompt is computed, each later one is.
        out = model.generate(**inputs, max_new_tokens=4, num_beams=3, do_sample=False)
        assert out.shape == (1, inputs["input_ids"].shape[1] + 4)
        cache = model(**inputs, use_cache=True).past_key_values
        cache.reorder_cache(torch.tensor([0]))
        cache.crop(-3)
        assert cache.get_seq_length() == inputs["input_ids"].shape[1] - 3
        assert {layer.length for layer in cache.layers} == {inputs["input_ids"].shape[1] - 3}
        again = model(input_ids=inputs["input_ids"][:, -3:], **{PAST: cache}).logits
    assert again.isfinite().all()
    assert vtprune.report(cache).kv_tokens_per_layer[2] == [3]


@every_model
@pytest.mark.parametrize("pruner", [GammaMoD(), RELEASED], ids=label)
def test_a_second_turn_read_at_once_equals_one_read_token_by_token(kind: str, pruner: Any) -> None:
    model = wrapped(make(kind), pruner)
    inputs, new = prompt(kind, ROWS[kind]), torch.randint(3, 80, (3, 6), generator=torch.Generator().manual_seed(2))
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(new)], dim=1)
    length = inputs["input_ids"].shape[1]
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        whole = model(input_ids=new, **{PAST: cache}, attention_mask=mask).logits
        held = vtprune.report(cache).kv_tokens_per_layer
        cache = model(**inputs, use_cache=True).past_key_values
        steps = [
            model(input_ids=new[:, at : at + 1], **{PAST: cache}, attention_mask=mask[:, : length + at + 1]).logits
            for at in range(6)
        ]
    assert float((whole - torch.cat(steps, dim=1)).abs().max()) < TOLERANCE
    assert vtprune.report(cache).kv_tokens_per_layer == held


def test_a_static_cache_is_refused_where_tokens_may_be_skipped() -> None:
    inputs = {"input_ids": prompt("llava-clip", [TEXT])["input_ids"]}
    model = wrapped(make("llava-clip"), RELEASED)
    with pytest.raises(vtprune.UnsupportedCacheError, match="StaticCache"):
        model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
    vtprune.unwrap(model)
    wrapped(model, GammaMoD(keep=1.0))
    whole = prompt("llava-clip", ROWS["llava-clip"][:1])
    tokens = model.generate(**whole, max_new_tokens=4, do_sample=False)
    static = model.generate(**whole, max_new_tokens=4, do_sample=False, cache_implementation="static")
    assert torch.equal(tokens, static)


@every_model
@pytest.mark.parametrize("keep", [17, 0.5, 0.7, 10_000])
def test_what_was_kept_is_at_most_what_was_asked(kind: str, keep: float) -> None:
    model = wrapped(make(kind), GammaMoD(keep=keep, layers=(1, 2, 3, 4)))
    rows = ROWS[kind] if not kind.startswith("qwen") else [Row([3, 4], [(6, 6)]), Row([2, 2], [(5, 6)])]
    with torch.no_grad():
        model(**prompt(kind, rows))
    for sample in vtprune.report(model).samples:
        for image in sample.images:
            asked = min(keep, image.tokens) if isinstance(keep, int) else max(1, round(keep * image.tokens))
            assert asked - 1 < image.achieved_tokens <= asked


def test_images_cut_before_the_decoder_are_routed_further() -> None:
    model = make("llava-clip")
    torch.manual_seed(5)
    vtprune.wrap(model, [vtprune.DivPrune(keep=12), GammaMoD()])
    inputs = prompt("llava-clip", ROWS["llava-clip"])
    with torch.no_grad():
        model(**inputs)
    report = vtprune.report(model)
    assert [tokens[0] for tokens in report.tokens_per_layer] == [12, 6, 6, 6, 12]
    measured = measured_flops(model, prompt("llava-clip", ROWS["llava-clip"][:1]))
    assert vtprune.report(model).flops == pytest.approx(measured, rel=0.01)


def test_the_router_learns_from_the_answer_and_from_its_own_loss() -> None:
    inputs = prompt("llava-clip", ROWS["llava-clip"][:2])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= 90, -100)
    model = wrapped(make("llava-clip"), GammaMoD()).train()
    with_loss = model(**inputs, labels=labels, use_cache=False).loss
    auxiliary = vtprune.auxiliary_loss(model)
    assert auxiliary is not None
    assert float(auxiliary.detach()) > 0
    with_loss.backward()
    assert router(model).grad is not None
    assert bool((router(model).grad.abs() > 0).all())
    model.eval()
    with torch.no_grad():
        plain = model(**inputs, labels=labels, use_cache=False).loss
    assert vtprune.auxiliary_loss(model) is None
    assert float(with_loss.detach()) == pytest.approx(float(plain) + float(auxiliary.detach()), rel=1e-5)


@every_model
@pytest.mark.parametrize(
    "pruner", [GammaMoD(loss_weight=0.5), GammaMoD(variant="released", loss_weight=0.5)], ids=label
)
def test_gradients_are_the_same_through_checkpoints(kind: str, pruner: Any) -> None:
    inputs = prompt(kind, ROWS[kind])
    labels = inputs["input_ids"].masked_fill((inputs["input_ids"] >= 90) | (inputs["input_ids"] == 0), -100)
    gradients, losses = [], []
    for checkpointing in (False, True):
        model = wrapped(make(kind), pruner).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-5, rtol=1e-4), name


def test_released_training_counts_by_row_whatever_the_padding() -> None:
    inputs = prompt("llava-clip", ROWS["llava-clip"][:2])
    model = wrapped(make("llava-clip"), GammaMoD(variant="released")).train()
    with torch.no_grad():
        model(**inputs)
    # Of the 36 tokens of an image and the 3 and 2 before it, half skip each routed layer.
    expected = [math.ceil(46 * (1 - 0.5 * 39 / 46)), math.ceil(42 * (1 - 0.5 * 38 / 42))]
    for layer, tokens in enumerate(vtprune.report(model).kv_tokens_per_layer):
        assert tokens == (expected if layer in (1, 2, 3) else [46, 42])


def test_bfloat16_models_compute_nearly_the_same_tokens() -> None:
    inputs = prompt("llava-clip", ROWS["llava-clip"])
    kept = []
    for dtype in (torch.float32, torch.bfloat16):
        model = wrapped(make("llava-clip").to(dtype), GammaMoD(layers=(1,)))
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
            out = model(
                **{name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
            )
        assert out.logits.isfinite().all()
        kept.append([set(image[1]) for image in _kept(vtprune.report(model))])
    for first, second in zip(*kept, strict=True):
        assert len(first) == len(second)
        assert len(first & second) >= len(first) - 3
