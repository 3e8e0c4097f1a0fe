"""GemFilter: scores against a plain reference, edges of the prompt, later turns, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import vtprune
from tests.matrix import at_depth
from tests.models import IMAGE, MODELS, PAST, ROWS, Row, make, prompt
from tests.oracle import TOLERANCE, compare, run_masked, run_wrapped
from tests.streams import stream
from vtprune.method.facts import ModelFacts
from vtprune.method.views import DecoderLayer, VisionStream
from vtprune.pruners.gemfilter import pool_grid, pool_sequence

every_model = pytest.mark.parametrize("kind", MODELS)


def _stream(before: int, tokens: int, after: int, *, padding: int = 0, budget: int = 4, seed: int = 0) -> VisionStream:
    """A stream of one row: padding, text, an image of one line, text, and padding again."""
    generator = torch.Generator().manual_seed(seed)
    length = 2 * padding + before + tokens + after
    query, key = (torch.randn(3, n, 4, generator=generator) for n in (1, length))
    start, end = padding + before, padding + before + tokens
    vision = torch.arange(start, end)
    text = torch.cat([torch.arange(padding, start), torch.arange(end, length - padding)])
    last = length - padding - 1
    probe = DecoderLayer(
        query, key, key[:, :0], vision, last, 0.5, tokens, torch.arange(tokens), budget, 2, 5, text, {}, first=padding
    )
    return replace(stream((1, 1, tokens), budget), probe=probe)


def _reference(given: VisionStream) -> list[float]:
    """The score of each vision token, summed number by number."""
    layer = given.probe
    assert layer is not None
    real = sorted([*layer.text.tolist(), *layer.vision.tolist()])
    logits = {}
    for place in real:
        logits[place] = sum(
            float(layer.query[head, 0, one] * layer.key[head, place, one]) for head in range(3) for one in range(4)
        )
    return [sum(logits.get(place + step, 0.0) for step in range(-2, 3)) / 5 for place in layer.vision.tolist()]


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("shape", [(3, 9, 4), (0, 9, 4), (3, 9, 0), (0, 1, 1), (0, 2, 0)], ids=str)
def test_scores_are_the_pooled_logits_of_the_last_token(shape: tuple[int, int, int], padding: int) -> None:
    given = _stream(*shape, padding=padding)
    expected = _reference(given)
    assert torch.allclose(vtprune.GemFilter().scores(given), torch.tensor(expected), atol=1e-5)
    budget = min(4, shape[1])
    best = sorted(range(shape[1]), key=lambda token: -expected[token])[:budget]
    assert vtprune.GemFilter().select(given).kept.tolist() == sorted(best)


def test_what_stands_in_padding_is_not_read() -> None:
    given = _stream(0, 6, 0, padding=3)
    assert given.probe is not None
    key = given.probe.key.clone()
    key[:, :3], key[:, -3:] = float("nan"), float("inf")
    dirty = replace(given, probe=replace(given.probe, key=key))
    assert torch.equal(vtprune.GemFilter().scores(dirty), vtprune.GemFilter().scores(given))


def test_the_ends_of_a_sequence_are_damped() -> None:
    assert pool_sequence(torch.ones(7)).tolist() == pytest.approx([0.6, 0.8, 1, 1, 1, 0.8, 0.6])
    assert pool_sequence(torch.ones(1)).tolist() == pytest.approx([0.2])


@pytest.mark.parametrize("grid", [(1, 4, 5), (2, 3, 3), (1, 1, 1)], ids=str)
def test_grid_pooling_is_the_mean_over_the_neighbours_that_are_there(grid: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    total = grid[0] * grid[1] * grid[2]
    indices = torch.randperm(total, generator=generator)[: max(1, total - 4)].sort().values
    scores = torch.randn(indices.numel(), generator=generator)
    place = [(i // (grid[1] * grid[2]), i // grid[2] % grid[1], i % grid[2]) for i in indices.tolist()]
    expected = []
    for frame, row, column in place:
        near = [
            float(score)
            for score, (f, r, c) in zip(scores, place, strict=True)
            if f == frame and abs(r - row) <= 1 and abs(c - column) <= 1
        ]
        expected.append(sum(near) / len(near))
    assert torch.allclose(pool_grid(scores, indices, grid), torch.tensor(expected), atol=1e-6)


def test_grid_pooling_reads_no_text() -> None:
    given = _stream(3, 9, 4)
    assert given.probe is not None
    key = given.probe.key.clone()
    key[:, given.probe.text] += 50
    loud = replace(given, probe=replace(given.probe, key=key))
    pruner = vtprune.GemFilter(pooling="grid")
    assert torch.equal(pruner.scores(loud), pruner.scores(given))
    assert not torch.equal(vtprune.GemFilter().scores(loud), vtprune.GemFilter().scores(given))


@pytest.mark.parametrize("pooling", ["sequence", "grid"])
def test_nan_scores_are_refused(pooling: str) -> None:
    given = _stream(3, 9, 4)
    assert given.probe is not None
    key = given.probe.key.clone()
    key[0, 5, 0] = float("nan")
    with pytest.raises(vtprune.ScoreError, match="gemfilter"):
        vtprune.GemFilter(pooling=pooling).select(replace(given, probe=replace(given.probe, key=key)))


@pytest.mark.parametrize(("depth", "layer"), [(32, 13), (40, 16), (28, 11), (5, 2), (2, 1), (1, 0)])
def test_the_published_layer_is_a_fraction_of_the_depth(depth: int, layer: int) -> None:
    assert at_depth(vtprune.GemFilter(), depth).probe_layer() == layer
    assert at_depth(vtprune.GemFilter(layer=0), depth).probe_layer() == 0


@pytest.mark.parametrize(
    "options",
    [
        {"layer": -1}, {"layer": 1.0}, {"layer": True}, {"layer": "2"}, {"layer": (2,)}, {"pooling": "max"},
        {"pooling": None}, {"pooling": 5}, {"variant": "v2"}, {"keep": 0}, {"keep": 1.5}, {"keep": True},
        {"keep": float("nan")},
    ],
    ids=str,
)  # fmt: skip
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(vtprune.VTPruneError, match=next(iter(options))):
        vtprune.GemFilter(**options)


def test_a_layer_that_the_decoder_does_not_have_is_refused() -> None:
    facts = ModelFacts(True, 5, 5, 1)
    assert vtprune.GemFilter(layer=4).bind(facts).probe_layer() == 4
    with pytest.raises(vtprune.VTPruneError, match="the decoder's layers are 0 to 4, got layer=5"):
        vtprune.wrap(make("llava-clip"), vtprune.GemFilter(layer=5))


@every_model
@pytest.mark.parametrize("pooling", ["sequence", "grid"])
@pytest.mark.parametrize("texts", [[0, 3], [3, 0], [0, 2, 3]], ids=str)
def test_an_image_at_an_end_of_the_prompt_is_pruned_exactly(kind: str, pooling: str, texts: list[int]) -> None:
    grid = (4, 3) if kind.startswith("qwen") else (6, 6)
    inputs = prompt(kind, [Row(texts, [grid] * (len(texts) - 1), 6)])
    model = vtprune.wrap(make(kind), vtprune.GemFilter(keep=1, pooling=pooling))
    logits, report, _ = run_wrapped(kind, model, inputs)
    assert all(len(image.kept) == 1 for image in report.samples[0].images)
    expected = run_masked(kind, vtprune.unwrap(model), inputs, report)
    if texts[-1] == 0 and not kind.startswith("qwen"):
        # The last place of the prompt is a vision token: compare the decode steps after it.
        assert float((logits - expected)[:, -8:].abs().max()) < TOLERANCE
    else:
        assert compare(logits, expected, inputs) < TOLERANCE


def test_an_image_of_one_token_is_kept_beside_one_that_is_pruned() -> None:
    kind = "qwen2.5-vl"
    inputs = prompt(kind, [Row([2, 3, 4], [(1, 1), (4, 4)], 8), Row([2, 4], [(1, 1)], 9)])
    model = vtprune.wrap(make(kind), vtprune.GemFilter(keep=5))
    logits, report, _ = run_wrapped(kind, model, inputs)
    assert [[len(image.kept) for image in sample.images] for sample in report.samples] == [[1, 5], [1]]
    expected = run_masked(kind, vtprune.unwrap(model), inputs, report)
    assert compare(logits, expected, inputs) < TOLERANCE


@every_model
def test_a_later_turn_with_an_image_equals_the_whole_conversation_masked(kind: str) -> None:
    grid = (4, 4) if kind.startswith("qwen") else (6, 6)
    first, second = prompt(kind, [Row([3, 4], [grid], 11)]), prompt(kind, [Row([2, 5], [grid], 12)])
    whole = {
        name: torch.cat([first[name], second[name]], dim=int(name in ("input_ids", "mm_token_type_ids")))
        for name in first
    }
    model = vtprune.wrap(make(kind), vtprune.GemFilter(keep=5))
    start = first["input_ids"].shape[1]
    with torch.no_grad():
        cache = model(**first).past_key_values
        mask = torch.ones_like(whole["input_ids"])
        logits = model(**second, attention_mask=mask, **{PAST: cache}).logits
    report = vtprune.report(cache)
    assert [len(image.kept) for image in report.samples[0].images] == [5, 5]
    expected = run_masked(kind, vtprune.unwrap(model), whole, report)[:, start : start + second["input_ids"].shape[1]]
    text = second["input_ids"][0] != IMAGE
    assert float((logits - expected)[0, text].abs().max()) < TOLERANCE


@pytest.mark.parametrize("kind", MODELS[:2])
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_a_later_turn_of_a_padded_batch_keeps_what_each_row_keeps_alone(kind: str, positions: str) -> None:
    turns = [Row([4, 2], [(6, 6)], 21), Row([1, 5], [(6, 6)], 22), Row([2, 2], [(6, 6)], 23)]
    model = vtprune.wrap(make(kind), vtprune.GemFilter(keep=5), positions=positions)
    first, then = prompt(kind, ROWS[kind]), prompt(kind, turns)
    mask = torch.cat([first["attention_mask"], then["attention_mask"]], dim=1)
    both, start = (mask.cumsum(dim=1) - 1).clamp(min=0), first["input_ids"].shape[1]
    with torch.no_grad():
        cache = model(**first, position_ids=both[:, :start]).past_key_values
        given = {**then, "attention_mask": mask, "position_ids": both[:, start:]}
        logits = model(**given, **{PAST: cache}).logits
        together = vtprune.report(cache).samples
        for row, (one, two) in enumerate(zip(ROWS[kind], turns, strict=True)):
            alone = model(**prompt(kind, [one])).past_key_values
            own = prompt(kind, [two])
            expected = model(**own, **{PAST: alone}).logits[0]
            assert [image.kept for image in vtprune.report(alone).samples[0].images] == [
                image.kept for image in together[row].images
            ]
            text = own["input_ids"][0] != IMAGE
            assert float((logits[row, -text.numel() :] - expected)[text].abs().max()) < TOLERANCE


@every_model
def test_every_layers_cache_is_short(kind: str) -> None:
    model = vtprune.wrap(make(kind), vtprune.GemFilter(keep=4))
    with torch.no_grad():
        cache = model(**prompt(kind, ROWS[kind][:1])).past_key_values
    report = vtprune.report(cache)
    assert {layer.keys.shape[2] for layer in cache.layers} == {report.samples[0].text_tokens + 4}
    assert report.flops_breakdown.scoring > 0
    assert report.achieved_keep <= 4 / report.samples[0].images[0].tokens
