"""SpAtten: what a token's score sums up, which layers drop how many, and what a table of the authors says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtprune
from tests.matrix import at_depth
from tests.models import IMAGE, ROWS, make, prompt
from vtprune.method import schedules
from vtprune.method.views import DecoderLayer
from vtprune.pruners import SpAtten
from vtprune.pruners.spatten import TABLES, ramp

KIND = "llava-clip"


def slow_sums(layer: DecoderLayer) -> list[float]:
    """What each token of the image gets from each row of the prompt in each head, one number at a time."""
    heads, place = range(layer.key.shape[0]), layer.vision.tolist()
    found = [0.0] * len(place)
    for head in heads:
        for row in range(layer.first, layer.last + 1):
            logits = (layer.query[head, row] @ layer.key[head, layer.first : row + 1].T) * layer.scale
            weights = logits.softmax(dim=0)
            for token, at in enumerate(place):
                found[token] += float(weights[at - layer.first]) if at <= row else 0.0
    return found


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[DecoderLayer, Tensor]]:
    """Each layer that was scored, with its scores."""
    found: list[tuple[DecoderLayer, Tensor]] = []
    original = SpAtten.scores

    def noting(self: SpAtten, layer: DecoderLayer) -> Tensor:
        scores = original(self, layer)
        found.append((layer, scores.clone()))
        return scores

    monkeypatch.setattr(SpAtten, "scores", noting)
    return found


def forward(pruner: SpAtten, kind: str = KIND, **options: Any) -> vtprune.Report:
    with torch.no_grad():
        model = vtprune.wrap(make(kind, "eager"), pruner)
        model(**prompt(kind, ROWS[kind]), **options)
    return vtprune.report(model)


@pytest.mark.parametrize("kind", [KIND, "qwen2.5-vl"])
def test_a_score_is_the_sum_over_layers_heads_and_rows_of_what_was_alive(kind: str, seen: list[Any]) -> None:
    forward(SpAtten(keep=0.4), kind)
    by_layer: dict[int, list[Any]] = {}
    for layer, scores in seen:
        by_layer.setdefault(layer.index, []).append((layer, scores))
    assert sorted(by_layer) == list(range(max(by_layer) + 1))
    images = len(by_layer[0])
    running: list[dict[int, float]] = [{} for _ in range(images)]
    for index in sorted(by_layer):
        assert len(by_layer[index]) == images
        for (layer, scores), sums_of in zip(by_layer[index], running, strict=True):
            for token, value in zip(layer.indices.tolist(), slow_sums(layer), strict=True):
                sums_of[token] = sums_of.get(token, 0.0) + value
            expected = torch.tensor([sums_of[token] for token in layer.indices.tolist()])
            torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
            assert layer.memory["received"].shape == layer.indices.shape


def test_what_layers_say_before_anything_drops_is_the_models_own_attention(seen: list[Any]) -> None:
    inputs = {name: states[:1] for name, states in prompt(KIND, ROWS[KIND][:1]).items()}
    with torch.no_grad():
        maps = make(KIND, "eager")(**inputs, output_attentions=True).attentions
        vtprune.wrap(make(KIND, "eager"), SpAtten(layers=(3,), keep=0.7))(**inputs)
    own = (inputs["input_ids"][0] == IMAGE).nonzero().flatten()
    expected = torch.zeros(len(own))
    for layer, scores in seen[:3]:
        expected = expected + maps[layer.index][0].sum(dim=(0, 1))[own]
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)


def test_without_sums_the_layer_that_ran_ranks_alone(seen: list[Any]) -> None:
    pruner = SpAtten(keep=0.4, accumulate=False)
    forward(pruner)
    assert seen
    for layer, scores in seen:
        torch.testing.assert_close(scores, torch.tensor(slow_sums(layer)), atol=1e-5, rtol=1e-5)
        assert layer.budget < layer.vision.numel()


def test_the_tokens_with_the_highest_sums_stay() -> None:
    pruner = at_depth(SpAtten(keep=0.4), 6)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, 2, 9, 4, generator=generator)
    memory = {"received": torch.tensor([0.0, 50.0, 0.0, 50.0])}
    layer = DecoderLayer(
        *states.unbind(), vision=torch.arange(2, 6), last=8, scale=0.5, total=4, indices=torch.arange(4), budget=2,
        index=2, depth=6, text=torch.tensor([0, 1, 6, 7, 8]), memory=memory,
    )  # fmt: skip
    selection = pruner.prune_decoder(layer)
    assert selection is not None
    assert selection.kept.tolist() == [1, 3]


def test_without_a_keep_the_share_falls_in_a_straight_line_behind_the_first_layers() -> None:
    pruner = at_depth(SpAtten(), 32)
    counts = pruner.counts(576, 576)
    assert counts[:5] == (576,) * 5
    assert list(counts) == [int(ratio * 576 + 1e-6) for ratio in ramp(32, 5, 0.3)]
    assert counts[-1] == int(0.3 * 576)
    assert at_depth(SpAtten(last=0.1), 32).counts(1000, 1000)[-1] == 100


@pytest.mark.parametrize(("table", "depth"), [("gpt2_small", 12), ("gpt2_medium", 24), ("gpt2_medium", 6)])
def test_a_table_says_how_many_of_the_image_each_layer_reads(table: str, depth: int) -> None:
    shares, pruner = TABLES[table], at_depth(SpAtten(schedule=table), depth)
    expected = [int(shares[layer * len(shares) // depth] * 1024 + 1e-6) for layer in range(depth)]
    assert list(pruner.counts(1024, 1024)) == [1024, *expected[1:]]
    assert pruner.default_keep == pytest.approx(schedules.mean(pruner.ratios()))
    half = at_depth(SpAtten(schedule=table, keep=0.5), depth).ratios(0.5)
    assert schedules.mean(half) == pytest.approx(0.5, abs=1e-6)


def test_a_low_keep_begins_to_drop_earlier() -> None:
    for keep in (0.15, 0.3, 0.9):
        counts = at_depth(SpAtten(keep=keep), 32).counts(576, 576)
        assert sum(counts) / 32 <= keep * 576
        assert sum(counts) / 32 > keep * 576 - 1
    assert at_depth(SpAtten(keep=0.15), 32).counts(576, 576)[2] < 576


def test_layers_behind_the_last_drop_are_not_looked_at(seen: list[Any]) -> None:
    report = forward(SpAtten(keep=0.8, schedule="constant", layers=(2,)))
    assert {layer.index for layer, _ in seen} == {0, 1}
    assert all(image.kept_per_layer[1] != image.kept_per_layer[2] for s in report.samples for image in s.images)


def test_images_of_a_prompt_share_a_budget_by_their_sums() -> None:
    inputs = prompt("qwen2.5-vl", ROWS["qwen2.5-vl"])
    model = vtprune.wrap(make("qwen2.5-vl"), SpAtten(), keep_prompt=0.5, share="importance")
    with torch.no_grad():
        model(**inputs)
    report = vtprune.report(model)
    for sample in report.samples:
        entered = [len(image.kept_per_layer[0]) for image in sample.images]
        assert entered == [image.tokens for image in sample.images]
    assert report.achieved_keep <= 0.5 + 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"last": 0.2, "keep": 0.5}, "keep and last contradict each other"),
        ({"schedule": "gpt2_small", "last": 0.5}, "says what the last layer keeps, so last=0.5 contradicts it"),
        ({"last": 1.5}, "last is a number between 0 and 1"),
        ({"accumulate": 1}, "accumulate is one of True, False"),
        ({"schedule": "entropy"}, "schedule is one of"),
    ],
)
def test_what_contradicts_itself_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(vtprune.VTPruneError, match=message):
        SpAtten(**options)
