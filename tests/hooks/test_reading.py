"""Tokens that skip a routed layer and are still read: the unpruned model, but for their states, which stay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import vtprune
from tests.differences import text_labels
from tests.flop_helper import measured_flops
from tests.models import MODELS, PAST, ROWS, make, prompt
from tests.oracle import TOLERANCE, added, compare, next_tokens, run_wrapped, vision
from vtprune.adapters.decoder_side import DecoderSide
from vtprune.method.answers import Routes
from vtprune.method.registry import register
from vtprune.method.stages import InLayers
from vtprune.method.views import RoutedTokens

LAYERS = (1, 2, 4)
# By layer, the columns (B, n) that a method was told to be vision: ends of rows are none.
VISION: dict[int, Tensor] = {}
KINDS = [*MODELS, "llava-onevision"]


def skips(length: int, index: int, every: int) -> Tensor:
    """(length,) which columns skip a layer: other ones in each."""
    return (torch.arange(length) + index) % every != 0


@register("test_reading", needs="nothing")
@dataclass(frozen=True)
class Reading(InLayers):
    """Skips two of three vision tokens in each layer (`every`), or of all tokens (`text`), and reads them."""

    every: int = 3
    text: bool = False
    counted_by: str = "device"
    default_keep = 0.5

    @property
    def skips_text(self) -> bool:
        return self.text

    def routed_layers(self) -> tuple[int, ...]:
        return LAYERS

    def routed_budget(self, tokens: int, layer: int, entered: int) -> int:
        return max(1, entered - 1)

    def route(self, tokens: RoutedTokens) -> Routes:
        if tokens.image.amax() >= 0:
            VISION[tokens.index] = tokens.vision
        skipped = skips(tokens.hidden.shape[1], tokens.index, self.every) & tokens.real
        kept = ~skipped if self.text else ~(skipped & tokens.vision)
        if self.counted_by == "device":
            return Routes(kept, read=True)
        return Routes(columns=kept.nonzero()[:, 1].view(len(kept), -1), read=True)


@contextmanager
def frozen(
    model: Any, inputs: dict[str, Tensor], method: Reading, marks: dict[int, Tensor] | None = None
) -> Iterator[None]:
    """The unwrapped model in which tokens that skip a layer leave it as they came, but for what it adds to vision;
    marks: by layer, where that is, None for all placeholders."""
    ids = inputs["input_ids"]
    planes = added(model, inputs, ids)
    real = inputs.get("attention_mask", torch.ones_like(ids)).bool()

    def hook(index: int) -> Any:
        own = (
            skips(ids.shape[1], index, method.every)
            & real
            & (method.text | (vision(ids) if marks is None else marks[index]))
        )
        plane = planes[index] if index < len(planes) else 0

        def after(module: Any, args: Any, output: Tensor) -> Tensor | None:
            return torch.where(own[..., None], args[0] + plane, output) if output.shape[1] == ids.shape[1] else None

        return after

    layers = model.model.language_model.layers
    handles = [layers[index].register_forward_hook(hook(index)) for index in LAYERS]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", [Reading(), Reading(text=True)], ids=["vision", "text too"])
def test_prefill_and_steps_are_those_of_the_model_with_frozen_states(
    kind: str, padding: str, attention: str, method: Reading
) -> None:
    inputs = prompt(kind, ROWS[kind], padding)
    with vtprune.wrapped(make(kind, attention), method) as model:
        found, report, cache = run_wrapped(kind, model, inputs)
    with frozen(model, inputs, method, VISION):
        expected, _, _ = _run(kind, model, inputs)
    assert compare(found, expected, inputs) < TOLERANCE
    assert sum(report.tokens_per_layer[1]) < sum(report.tokens_per_layer[0])
    held = {layer.keys.shape[-2] for layer in cache.layers}
    assert held == {cache.layers[0].keys.shape[-2]}


def _run(kind: str, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Any, Any]:
    """`run_wrapped` of a model that is not."""
    with vtprune.wrapped(model, "none"):
        return run_wrapped(kind, model, inputs)


@pytest.mark.parametrize("kind", ["llava-clip", "qwen3-vl"])
def test_nothing_skipped_is_the_unpruned_model_bit_for_bit(kind: str) -> None:
    inputs, model = prompt(kind, ROWS[kind]), make(kind)
    with torch.no_grad():
        base = model(**inputs).logits
        with vtprune.wrapped(model, Reading(every=1)):
            assert torch.equal(model(**inputs).logits, base)


@pytest.mark.parametrize("kind", KINDS)
def test_the_report_counts_what_torch_counts_and_the_cache_holds(kind: str) -> None:
    inputs = prompt(kind, ROWS[kind][:1])
    for method in (Reading(), Reading(text=True)):
        model = vtprune.wrap(make(kind), method)
        measured = measured_flops(model, inputs)
        assert vtprune.report(model).flops == measured
        with torch.no_grad():
            cache = model(**inputs).past_key_values
        report = vtprune.report(cache)
        assert report.kv_bytes == report.kv_bytes_full == sum(layer.keys.numel() * 2 * 4 for layer in cache.layers)
        (sample,) = report.samples
        assert all(image.cached_per_layer[1] == list(range(image.tokens)) for image in sample.images)
        assert any(len(image.kept_per_layer[1]) < image.tokens for image in sample.images)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gradients_flow_through_keys_and_values_of_skipped_tokens(reentrant: bool | None) -> None:
    kind, method = "llava-clip", Reading()
    inputs, model = prompt(kind, ROWS[kind]), make(kind)
    labels = text_labels(inputs)
    with frozen(model, inputs, method):
        expected = _gradients(model, inputs, labels)
    vtprune.wrap(model, method)
    if reentrant is not None:
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found = _gradients(model, inputs, labels)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=name)


def _gradients(model: Any, inputs: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs, labels=labels).loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def test_columns_of_the_computed_tokens_say_the_same_as_a_mask() -> None:
    inputs = prompt("llava-clip", [ROWS["llava-clip"][0]] * 2)
    found = []
    for by in ("device", "method"):
        with torch.no_grad(), vtprune.wrapped(make("llava-clip"), Reading(counted_by=by)) as model:
            found.append(model(**inputs).logits)
    torch.testing.assert_close(*found, atol=1e-6, rtol=0)


@pytest.mark.parametrize("use_cache", [False, True])
def test_a_layer_that_computes_nothing_is_read_all_the_same(use_cache: bool) -> None:
    inputs, method = prompt("llava-clip", ROWS["llava-clip"][:1]), Reading(every=10**6, text=True)
    with torch.no_grad(), vtprune.wrapped(make("llava-clip"), method) as model:
        out = model(**inputs, use_cache=use_cache)
        found = out.logits[:, -1:]
        if use_cache:
            step = model(input_ids=next_tokens(1)[:, :1], **{PAST: out.past_key_values}).logits
            found = torch.cat([found, step], dim=1)
    with torch.no_grad(), frozen(model, inputs, method):
        out = model(**inputs, use_cache=use_cache)
        expected = out.logits[:, -1:]
        if use_cache:
            step = model(input_ids=next_tokens(1)[:, :1], **{PAST: out.past_key_values}).logits
            expected = torch.cat([expected, step], dim=1)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_a_later_turn_reads_what_skipped_layers_of_an_earlier_one() -> None:
    kind, method = "llava-clip", Reading()
    inputs = prompt(kind, ROWS[kind][:1])
    length = inputs["input_ids"].shape[1]
    mask = torch.ones(1, 2 * length, dtype=torch.long)
    logits = []
    model = make(kind)
    with torch.no_grad():
        with vtprune.wrapped(model, method):
            cache = model(**inputs).past_key_values
            logits.append(model(**{**inputs, "attention_mask": mask}, **{PAST: cache}).logits)
            measured = vtprune.report(cache)
        with frozen(model, inputs, method):
            cache = model(**inputs).past_key_values
            logits.append(model(**{**inputs, "attention_mask": mask}, **{PAST: cache}).logits)
    text = ~vision(inputs["input_ids"])[0]
    torch.testing.assert_close(logits[0][:, text], logits[1][:, text], atol=TOLERANCE, rtol=0)
    assert {layer[0] for layer in measured.kv_tokens_per_layer} == {2 * length}


def test_renumbered_positions_count_every_token_that_is_read() -> None:
    kind = "llava-clip"
    inputs = prompt(kind, ROWS[kind][:1])
    found = []
    with torch.no_grad():
        for positions in ("original", "compact"):
            with vtprune.wrapped(make(kind), Reading(), positions=positions) as model:
                found.append(model(**inputs).logits)
    torch.testing.assert_close(*found, atol=TOLERANCE, rtol=0)


def test_flash_attention_has_no_mask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = vtprune.wrap(make("llava-clip"), Reading())
    monkeypatch.setattr(DecoderSide, "flash", True)
    with pytest.raises(vtprune.VTPruneError, match="flash attention has no mask"), torch.no_grad():
        model(**prompt("llava-clip", ROWS["llava-clip"][:1]))
