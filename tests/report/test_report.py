"""The report says what happened: tokens, FLOPs as torch counts them, bytes as the cache holds them."""

from __future__ import annotations

import gc
import json
from typing import Any

import pytest
import torch

import vtprune
from tests.flop_helper import measured_flops
from tests.matrix import CACHE, DROPS, PRUNERS, label
from tests.models import MODELS, PAST, ROWS, make, prompt, shown_rows
from tests.oracle import run_wrapped
from vtprune.decoder.prompt import real_tokens
from vtprune.encoder.encoding import EncodedImage
from vtprune.method.pruner import Pruner

every_model = pytest.mark.parametrize("kind", MODELS)
every_pruner = pytest.mark.parametrize("pruner", DROPS + PRUNERS + CACHE, ids=label)


@pytest.mark.lean
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


@pytest.mark.lean(by="stages")
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


def test_what_a_report_keeps_alive_is_small() -> None:
    kind = "qwen2.5-vl"
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


def _masks(mask: torch.Tensor) -> dict[str, Any]:
    """A padding mask (B, L) in every form that a decoder takes it in."""
    length = mask.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril() & mask.bool()[:, None, :]
    seen = (seen | torch.eye(length, dtype=torch.bool))[:, None]
    lowest, infinite = (torch.zeros(seen.shape).masked_fill(~seen, value) for value in (-3.4e38, float("-inf")))
    whole = {"int": mask, "bool": mask.bool(), "float": mask.float(), "half": mask.half()}
    return {**whole, "4-D bool": seen, "4-D float": lowest, "4-D infinite": infinite}


@every_model
@pytest.mark.parametrize("pruner", [vtprune.Grid(keep=9), vtprune.FastV(), vtprune.D2O()], ids=label)
def test_a_report_is_the_same_whatever_the_masks_form(kind: str, pruner: Pruner) -> None:
    inputs = prompt(kind, ROWS[kind])
    positions = {} if kind.startswith("qwen") else {"position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(0)}
    found = []
    for name, mask in _masks(inputs.pop("attention_mask")).items():
        if kind.startswith("qwen") and name.startswith("4-D"):
            continue  # the model itself takes none
        model = vtprune.wrap(make(kind), pruner)
        with torch.no_grad():
            model(**inputs, attention_mask=mask, **positions)
        found.append(vtprune.report(model))
    assert len(found) > 3
    assert all(report == found[0] for report in found)
    assert found[0].kv_tokens_per_layer[0][1] < found[0].kv_tokens_per_layer[0][2]


def test_a_mask_by_layer_type_counts_by_the_layers_without_a_window() -> None:
    mask = torch.tensor([[0, 1, 1]])
    seen, window = torch.tensor([[[[False, True, True]]]]), torch.tensor([[[[False, False, True]]]])
    for given in (mask, seen, {"sliding_attention": window, "full_attention": seen}):
        assert real_tokens(given).tolist() == [[False, True, True]]
    assert real_tokens(None) is real_tokens({}) is None


@every_model
# PEFT hands the prefix in by the cache's old name.
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")
@pytest.mark.parametrize("way", ["PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig"])
def test_virtual_tokens_of_peft_count_as_text(kind: str, way: str) -> None:
    peft = pytest.importorskip("peft")
    if kind.startswith("qwen") and way == "PrefixTuningConfig":
        pytest.skip("the model itself takes no prefix")
    inputs = prompt(kind, ROWS[kind][:1])
    sizes = {"num_virtual_tokens": 4, "token_dim": 32, "num_layers": 5, "num_attention_heads": 4}
    sizes |= {"encoder_hidden_size": 32} if way == "PromptEncoderConfig" else {}
    model = peft.get_peft_model(make(kind), getattr(peft, way)(task_type="CAUSAL_LM", **sizes)).eval()
    vtprune.wrap(model, "grid", keep=9)
    length = inputs["input_ids"].shape[1]
    with torch.no_grad():
        model(**inputs, attention_mask=torch.ones(1, length, dtype=torch.long))
    report = vtprune.report(model)
    image = report.samples[0].images[0]
    assert len(image.kept) == 9
    assert report.samples[0].text_tokens == length - image.tokens + 4 * (way != "PrefixTuningConfig")
    assert report.kv_tokens_per_layer == [[length + 4 - image.tokens + 9]] * 5


@every_model
def test_a_report_prints_as_five_lines(kind: str) -> None:
    model = vtprune.wrap(make(kind), [vtprune.Grid(keep=9), vtprune.FastV(keep=6)])
    with torch.no_grad():
        model(**prompt(kind, ROWS[kind]))
    report = vtprune.report(model)
    lines = str(report).splitlines()
    assert len(lines) == 5
    assert lines[0] == "grid+fastv: before decoder; then after decoder layer 0"
    assert lines[1].startswith(f"kept {report.kept_tokens:.4g} of ")
    assert lines[1].endswith("4 images in 3 rows")
    first, later = (sum(report.tokens_per_layer[layer]) / 3 for layer in (0, 1))
    assert lines[2] == f"decoder layers x vision tokens a row: 1 x {first:.4g}, 4 x {later:.4g}"
    assert f"{report.flops / report.flops_full:.1%}" in lines[3]
    assert f"{report.kv_bytes / report.kv_bytes_full:.1%}" in lines[4]
    assert repr(report).startswith("Report(method='grid+fastv'")


def test_a_report_names_no_share_where_thresholds_decide() -> None:
    deciding = [vtprune.MustDrop(), vtprune.Turbo(r=3), vtprune.SparseVLM(adaptive_rank=True)]
    for pruner in [*deciding, vtprune.GammaMoD(variant="released")]:
        model = vtprune.wrap(make("llava-clip"), pruner)
        with torch.no_grad():
            model(**prompt("llava-clip", ROWS["llava-clip"][:1]))
        report = vtprune.report(model)
        assert report.asked_keep is None
        assert json.loads(json.dumps(report.to_dict()))["stages"][0]["asked_keep"] is None


@pytest.mark.lean
@every_model
@pytest.mark.parametrize("pruner", DROPS + PRUNERS + CACHE, ids=label)
def test_what_rows_cost_is_what_they_cost_alone_and_adds_up(kind: str, pruner: Pruner) -> None:
    model = vtprune.wrap(make(kind), pruner)
    names = ("flops", "flops_full", "kv_bytes_prefill", "kv_bytes_prefill_full", "kv_bytes", "kv_bytes_full")

    def of(rows: list[Any], first: int = 0) -> Any:
        run_wrapped(kind, model, prompt(kind, rows), row=first)
        return vtprune.report(model)

    together = of(ROWS[kind])
    for name in names:
        assert sum(getattr(sample, name) for sample in together.samples) == getattr(together, name), name
    assert sum(sample.scoring_flops for sample in together.samples) == together.flops_breakdown.scoring
    for number, (row, sample) in enumerate(zip(ROWS[kind], together.samples, strict=True)):
        (alone,) = of([row], number).samples
        for name in (*names, "scoring_flops"):
            assert getattr(alone, name) == getattr(sample, name), name


@pytest.mark.parametrize("method", ["grid", "fastv"])
def test_entries_are_counted_by_the_mask_that_comes_later(method: str) -> None:
    rows = ROWS["llava-clip"]
    model = vtprune.wrap(make("llava-clip"), method, keep=0.25)
    inputs = prompt("llava-clip", rows)
    mask = inputs.pop("attention_mask")
    cache = model(**inputs, use_cache=True).past_key_values
    mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    model(input_ids=torch.full((len(rows), 1), 7), **{PAST: cache}, attention_mask=mask)
    entries = vtprune.report(model).kv_tokens_per_layer
    held = [int((cache.layers[-1].slots[row] >= 0).sum()) for row in range(len(rows))]
    hidden = (mask == 0).sum(dim=1).tolist()
    assert entries[-1] == [n - gone for n, gone in zip(held, hidden, strict=True)]


@pytest.mark.parametrize(
    ("kind", "shown", "method"),
    [
        ("llava-next", "an image", "fopru"),
        ("llava-next", "an image", "vispruner"),
        ("llava-onevision", "a video", "fopru"),
        ("llava-next-video", "a video", "holitom:keep=0.4"),
    ],
)
def test_scoring_counts_what_the_encoder_attends_within_where_tokens_are_not_its_patches(
    kind: str, shown: str, method: str
) -> None:
    model = vtprune.wrap(make(kind), method)
    counted = measured_flops(model, prompt(kind, shown_rows(kind, shown)[:1]))
    assert vtprune.report(model).flops == pytest.approx(counted, rel=0.002)
