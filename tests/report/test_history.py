"""The report by step: what every layer processed and what its cache held, after the prefill and each later forward."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import pytest
import torch

import vtprune
from tests.matrix import CACHE, DROPS, PRUNERS, RELEASED, Drops, label
from tests.models import DECODER_LAYERS, MODELS, PAST, ROWS, make, prompt
from tests.oracle import TOLERANCE, full_mask, next_tokens
from vtprune.method.pruner import Pruner
from vtprune.method.stages import revives
from vtprune.report.generation import Generation
from vtprune.report.history import CacheNote

STEPS, ALL = 3, (0, 1, 2)
every_model = pytest.mark.parametrize("kind", MODELS)
every_pruner = pytest.mark.parametrize("pruner", DROPS + PRUNERS + RELEASED + CACHE, ids=label)


def _layer_bytes(cache: Any) -> list[int]:
    """Bytes of the keys and values of each layer, read off the cache's own tensors."""
    both = [(layer.keys, layer.values) for layer in cache.layers]
    return [sum(part.numel() * part.element_size() for part in parts) for parts in both]


@functools.cache
@torch.no_grad()
def _run(kind: str, pruner: Pruner, indices: tuple[int, ...]) -> tuple[vtprune.Report, list[list[int]], Any]:
    """A prefill and STEPS decode steps: the report in the end, and the measured bytes [forward][layer]."""
    rows = [ROWS[kind][index] for index in indices]
    inputs, model = prompt(kind, rows), vtprune.wrap(make(kind), pruner)
    out = model(**inputs, use_cache=True)
    cache, measured = out.past_key_values, [_layer_bytes(out.past_key_values)]
    tokens = next_tokens(len(ROWS[kind]))[list(indices)]
    for step in range(STEPS):
        mask = {"attention_mask": full_mask(inputs, step + 1)} if len(rows) > 1 else {}
        model(input_ids=tokens[:, step : step + 1], **{PAST: cache}, **mask)
        measured.append(_layer_bytes(cache))
    return vtprune.report(cache), measured, model.config


@pytest.mark.lean(by="stages")
@every_model
@every_pruner
def test_bytes_of_one_row_are_the_caches_own_at_every_layer_and_step(kind: str, pruner: Pruner) -> None:
    report, measured, config = _run(kind, pruner, (0,))
    assert len(report.history) == 1 + STEPS
    for step, held in zip(report.history, measured, strict=True):
        layers = [
            vtprune.kv_bytes(config, [row[0] if index == layer else 0 for index in range(DECODER_LAYERS)], "float32")
            for layer, row in enumerate(step.kv_tokens_per_layer)
        ]
        assert layers == held
        assert step.kv_bytes == sum(held)


@pytest.mark.lean(by="stages")
@every_model
@every_pruner
def test_bytes_of_a_ragged_batch_are_the_caches_without_its_padding(kind: str, pruner: Pruner) -> None:
    report, measured, config = _run(kind, pruner, ALL)
    alone = [] if pruner in RELEASED else [_run(kind, pruner, (row,))[0] for row in ALL]
    for number, (step, held) in enumerate(zip(report.history, measured, strict=True)):
        entry = vtprune.kv_bytes(config, 1, "float32") // DECODER_LAYERS
        assert all(entry * sum(layer) <= size for layer, size in zip(step.kv_tokens_per_layer, held, strict=True))
        assert step.kv_bytes == entry * sum(map(sum, step.kv_tokens_per_layer))
        for row, single in enumerate(alone):
            own = [layer[row] for layer in step.kv_tokens_per_layer]
            assert own == [layer[0] for layer in single.history[number].kv_tokens_per_layer]


@pytest.mark.lean
@every_model
@every_pruner
def test_the_steps_begin_with_the_prefill_and_end_with_now(kind: str, pruner: Pruner) -> None:
    report, _, _ = _run(kind, pruner, ALL)
    prefill, *later = report.history
    assert prefill.tokens_per_layer == report.tokens_per_layer
    assert prefill.kv_bytes == report.kv_bytes_prefill
    assert len(later) == report.steps
    for number, step in enumerate(later):
        for row, sample in enumerate(report.samples):
            returned = [0] * DECODER_LAYERS
            if revives(pruner):
                returned = [
                    sum(map(len, layers))
                    for layers in zip(
                        *(image.steps[number].computed_per_layer for image in sample.images), strict=True
                    )
                ]
            assert [layer[row] for layer in step.tokens_per_layer] == returned or not sample.images
    assert later[-1].kv_tokens_per_layer == report.kv_tokens_per_layer
    assert later[-1].kv_bytes == report.kv_bytes
    assert json.loads(json.dumps(report.to_dict()))["history"][0]["kv_bytes"] == prefill.kv_bytes


@every_model
def test_the_past_of_a_reordered_row_is_that_of_the_row_it_came_from(kind: str) -> None:
    model, inputs = vtprune.wrap(make(kind), Drops(layers=(1,), first=True)), prompt(kind, ROWS[kind])
    with torch.no_grad():
        cache = model(**inputs).past_key_values
        before = vtprune.report(cache)
        cache.reorder_cache(torch.tensor([2, 2, 0]))
        model(
            input_ids=next_tokens(3)[:, :1],
            **{PAST: cache},
            attention_mask=full_mask(inputs, 1)[[2, 2, 0]],
        )
    after = vtprune.report(cache)
    for old, first, second in zip(
        before.kv_tokens_per_layer, *(step.kv_tokens_per_layer for step in after.history), strict=True
    ):
        assert first == [old[2], old[2], old[0]]
        assert second == [count + 1 for count in first]
    assert after.history[0].tokens_per_layer == after.tokens_per_layer


@pytest.mark.parametrize("kind", ["llava-clip", "llava-siglip"])
def test_rows_of_one_length_that_keep_different_numbers(kind: str) -> None:
    rows = [dataclasses.replace(ROWS[kind][0], seed=seed) for seed in (1, 3)]
    model = vtprune.wrap(make(kind), vtprune.PyramidDrop(keep=0.5, schedule="entropy", layers=(1, 2, 4)))
    found = []
    for some in (rows, rows[:1], rows[1:]):
        with torch.no_grad():
            cache = model(**prompt(kind, some)).past_key_values
            logits = model(input_ids=torch.full((len(some), 1), 5), **{PAST: cache}).logits
        found.append((logits, vtprune.report(cache).history[-1].kv_tokens_per_layer))
    (together, counts), *alone = found
    assert any(layer[0] != layer[1] for layer in counts)
    for row, (logits, own) in enumerate(alone):
        assert [[layer[row]] for layer in counts] == own
        assert float((together[row] - logits[0]).abs().max()) < TOLERANCE


@every_model
def test_beams_have_a_history_each(kind: str) -> None:
    model = vtprune.wrap(make(kind), vtprune.FastV(keep=0.4))
    model.generate(**prompt(kind, ROWS[kind]), num_beams=2, num_return_sequences=2, max_new_tokens=4, do_sample=False)
    report = vtprune.report(model)
    assert len(report.history) == 1 + report.steps
    for step, report_of_step in enumerate(report.history):
        for layer, counts in enumerate(report_of_step.kv_tokens_per_layer):
            vision = report.history[0].tokens_per_layer[layer]
            texts = [sample.text_tokens for sample in report.samples]
            assert counts == [v + t + step for v, t in zip(vision, texts, strict=True)]


@every_model
def test_a_forward_without_a_cache_has_one_step_without_entries(kind: str) -> None:
    model = vtprune.wrap(make(kind), "fastv")
    with torch.no_grad():
        model(**prompt(kind, ROWS[kind]), use_cache=False)
    (step,) = vtprune.report(model).history
    assert step.tokens_per_layer == vtprune.report(model).tokens_per_layer
    assert (step.kv_tokens_per_layer, step.kv_bytes) == ([], 0)


@every_model
def test_a_second_image_starts_a_history_of_its_own_turn(kind: str) -> None:
    model, inputs = vtprune.wrap(make(kind), "fastv", keep=0.5), prompt(kind, ROWS[kind][:1])
    with torch.no_grad():
        cache = model(**inputs).past_key_values
        first = vtprune.report(cache)
        length = inputs["input_ids"].shape[1]
        model(**{**inputs, "attention_mask": torch.ones(1, 2 * length, dtype=torch.long)}, **{PAST: cache})
    (step,) = vtprune.report(cache).history
    assert step.tokens_per_layer == first.tokens_per_layer
    assert step.kv_tokens_per_layer == [[2 * count for count in layer] for layer in first.kv_tokens_per_layer]


@every_model
def test_a_step_leaves_counts_behind_and_no_copy_of_the_places(kind: str) -> None:
    model = vtprune.wrap(make(kind), Drops(layers=(0, 2)))
    model.generate(**prompt(kind, ROWS[kind]), max_new_tokens=6)
    generation = model.__dict__["_vtprune"].generation
    assert isinstance(generation, Generation)
    assert len(generation._notes) == 6
    for note in generation._notes:
        assert isinstance(note, CacheNote)
        distinct = {tuple(map(id, pair)): pair for pair in note.entries}
        assert len(distinct) == 3
        assert all(isinstance(part, int) or part.shape == (3,) for pair in distinct.values() for part in pair)
