"""The report says what happened: tokens, FLOPs as torch counts them, bytes as the cache holds them."""

from __future__ import annotations

import gc
import json
from typing import Any

import pytest
import torch

import vtprune
from tests.flop_helper import measured_flops
from tests.models import MODELS, ROWS, make, prompt
from tests.oracle import run_wrapped
from tests.pruners import CACHE, DROPS, PRUNERS, label
from vtprune.encoding import EncodedImage
from vtprune.pruner import Pruner

every_model = pytest.mark.parametrize("kind", MODELS)
every_pruner = pytest.mark.parametrize("pruner", DROPS + PRUNERS + CACHE, ids=label)


@every_model
@every_pruner
@pytest.mark.parametrize("row", [0, 2], ids=["one image", "two images"])
def test_analytic_flops_are_within_one_percent_of_torchs_counter(kind: str, pruner: Pruner, row: int) -> None:
    inputs = prompt(kind, ROWS[kind][row : row + 1])
    model = make(kind, "eager")
    full = measured_flops(model, inputs)
    vtprune.wrap(model, pruner)
    pruned = measured_flops(model, inputs)
    report = vtprune.report(model)
    assert report.flops_full == pytest.approx(full, rel=0.01)
    assert report.flops == pytest.approx(pruned, rel=0.01)
    assert report.flops == report.flops_breakdown.total


def _logical_bytes(cache: Any, mask: torch.Tensor) -> int:
    """Bytes of the entries that are neither ragged padding nor prompt padding, read off the cache."""
    total = 0
    for layer in cache.layers:
        per_entry = layer.keys[0, :, 0].numel() * layer.keys.element_size() * 2
        slots = layer.slots
        if slots is None:
            total += int(mask.sum()) * per_entry
        else:
            held = (slots >= 0) & mask.bool().gather(1, slots.clamp(min=0))
            total += int(held.sum()) * per_entry
    return total


@every_model
@every_pruner
def test_kv_bytes_are_the_caches(kind: str, pruner: Pruner) -> None:
    for rows in (ROWS[kind][:1], ROWS[kind]):
        inputs = prompt(kind, rows)
        model = vtprune.wrap(make(kind), pruner)
        _, prefill, cache = run_wrapped(kind, model, inputs)
        report = vtprune.report(cache)
        parts = [part for layer in cache.layers for part in (layer.keys, layer.values)]
        tensors = sum(part.numel() * part.element_size() for part in parts)
        ids = inputs["input_ids"]
        mask = torch.cat([inputs.get("attention_mask", torch.ones_like(ids)), ids.new_ones(len(rows), 8)], dim=1)
        assert report.kv_bytes_allocated == tensors
        assert report.kv_bytes == _logical_bytes(cache, mask)
        assert report.kv_bytes_prefill == prefill.kv_bytes
        assert report.kv_bytes_prefill_full == prefill.kv_bytes_full
        assert report.steps == 8
        if len(rows) == 1:
            assert report.kv_bytes == report.kv_bytes_allocated
        full = vtprune.kv_bytes(model.config, 1, torch.float32) * int(mask.sum())
        assert report.kv_bytes_full == full


@every_model
def test_the_report_is_plain_json_and_names_what_was_asked(kind: str) -> None:
    model = vtprune.wrap(make(kind), vtprune.Pool(keep=0.25))
    with torch.no_grad():
        model(**prompt(kind, ROWS[kind]))
    report = vtprune.report(model)
    again = json.loads(json.dumps(report.to_dict()))
    assert again["asked_keep"] == 0.25
    assert 0 < again["achieved_keep"] <= 0.3
    assert again["flops_breakdown"]["decoder"] > 0
    image = report.samples[0].images[0]
    assert image.grid[0] * image.grid[1] * image.grid[2] == image.tokens
    assert [merge.into for merge in image.merged] == image.kept
    for merge in image.merged:
        assert sum(merge.weights) == pytest.approx(1.0)
        assert merge.into in merge.members


@every_model
def test_tokens_per_layer_follow_the_drops(kind: str) -> None:
    inputs = prompt(kind, ROWS[kind])
    model = vtprune.wrap(make(kind), DROPS[3])
    with torch.no_grad():
        model(**inputs)
    report = vtprune.report(model)
    for layer, rows in enumerate(report.tokens_per_layer):
        for row, tokens in enumerate(rows):
            images = report.samples[row].images
            assert tokens == sum(len(image.kept_per_layer[layer]) for image in images)
            assert report.kv_tokens_per_layer[layer][row] == tokens + report.samples[row].text_tokens
    columns = list(zip(*report.tokens_per_layer, strict=True))
    assert all(list(column) == sorted(column, reverse=True) for column in columns)


@every_model
def test_what_a_report_keeps_alive_is_small(kind: str) -> None:
    inputs = prompt(kind, ROWS[kind])
    model = vtprune.wrap(make(kind), vtprune.FlowCut(keep=5, stages=2))
    model.generate(**inputs, max_new_tokens=3)
    gc.collect()
    images = [image for image in gc.get_objects() if type(image) is EncodedImage]
    assert images
    assert all(image.signals is None and image.pixels is None for image in images)


@every_model
def test_a_forward_without_cache_is_reported_without_bytes(kind: str) -> None:
    model = vtprune.wrap(make(kind), "grid", keep=4)
    with torch.no_grad():
        model(**prompt(kind, ROWS[kind]), use_cache=False)
    report = vtprune.report(model)
    assert report.kv_bytes == report.kv_bytes_allocated == 0
    assert report.flops < report.flops_full
