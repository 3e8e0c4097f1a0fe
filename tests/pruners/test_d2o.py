"""D2O against a reference by hand, head by head; and what a cache goes through before and after it is cut."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vtprune
from tests.models import HYBRIDS, IMAGE, MODELS, PAST, ROWS, Row, make, prompt
from tests.oracle import STEPS, TOLERANCE, next_tokens, run_wrapped
from tests.pruners.cache_reference import Reference, Rule
from tests.streams import few
from vtprune.adapters import adapter_for
from vtprune.method.facts import ModelFacts
from vtprune.method.views import CachedRow, CacheEntries
from vtprune.pruners.d2o import (
    D2O,
    best_of,
    flatness,
    merge_evicted,
    shares_out,
    skew_of_heads,
    spread_of_columns,
)
from vtprune.tensors.attention import CausalSight, SightByPlaces, attention_sums

every_model = pytest.mark.parametrize("kind", MODELS)
RULES = {
    "default": Rule(),
    "count": Rule(keep=9),
    "one entry": Rule(keep=1),
    "plain eviction": Rule(keep=0.4, merge=False),
    "released": Rule(keep=0.3, released=True),
    "text": Rule(keep=0.4, text=True),
    "text, released": Rule(keep=0.4, text=True, released=True),
    "text, plain eviction": Rule(keep=0.5, text=True, merge=False),
}
BATCHES = {"alone": ([0], "left"), "ragged-left": ([0, 1, 2], "left"), "ragged-right": ([0, 1, 2], "right")}


def pruner(rule: Rule) -> vtprune.D2O:
    variant = "released" if rule.released else "paper"
    return vtprune.D2O(keep=rule.keep, merge=rule.merge, text=rule.text, variant=variant)


def own_logits(logits: torch.Tensor, inputs: dict[str, torch.Tensor], row: int) -> torch.Tensor:
    """The logits of one row without padding."""
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))[row].bool()
    return logits[row, torch.cat([mask, torch.ones(STEPS, dtype=torch.bool)])]


CASES = [("sdpa", rule) for rule in RULES] + [("eager", rule) for rule in ("default", "text")]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("attention", "rule"), CASES)
@pytest.mark.lean
@every_model
def test_prefill_and_decoding_equal_the_reference_by_hand(kind: str, attention: str, rule: str, batch: str) -> None:
    _check_by_hand(kind, attention, rule, batch)


@pytest.mark.parametrize("batch", ["alone", "ragged-left"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.lean
@pytest.mark.parametrize("kind", HYBRIDS)
def test_of_a_hybrid_layers_with_entries_alone_are_cut(kind: str, rule: str, batch: str) -> None:
    _check_by_hand(kind, "sdpa", rule, batch)


def _check_by_hand(kind: str, attention: str, rule: str, batch: str) -> None:
    """Compares the logits and what every head holds in the end."""
    rows, padding = BATCHES[batch]
    inputs = prompt(kind, [ROWS[kind][row] for row in rows], padding)
    model = vtprune.wrap(make(kind, attention), pruner(RULES[rule]))
    logits, prefill, cache = run_wrapped(kind, model, inputs)
    report = vtprune.report(cache)
    plain = make(kind, "eager")
    for row, which in enumerate(rows):
        own = prompt(kind, [ROWS[kind][which]])
        reference = Reference(kind, plain, RULES[rule])
        expected = reference.run(own, next_tokens(len(rows))[row : row + 1])
        text = torch.cat([own["input_ids"][0] != IMAGE, torch.ones(STEPS, dtype=torch.bool)])
        difference = (own_logits(logits, inputs, row) - expected)[text]
        assert float(difference.abs().max()) < TOLERANCE
        for layer, heads in enumerate(reference.sets[-1]):
            assert {len(places) for places in heads} == {report.kv_tokens_per_layer[layer][row]}
        assert held(report, row, own) == [
            [[place for place in head if place < own["input_ids"].shape[1] and own["input_ids"][0, place] == IMAGE]
             for head in heads] if layer in reference.cut else [] for layer, heads in enumerate(reference.sets[-1])
        ]  # fmt: skip
    assert prefill.achieved_keep == 1.0


def held(report: vtprune.Report, row: int, own: dict[str, torch.Tensor]) -> list[list[list[int]]]:
    """The places of the image entries that each head of each layer holds, by the report."""
    places = (own["input_ids"][0] == IMAGE).nonzero().flatten()
    found: list[list[list[int]]] = []
    for layer in range(len(report.kv_tokens_per_layer)):
        heads: list[list[int]] = []
        first = 0
        for image in report.samples[row].images:
            for head, tokens in enumerate(image.cached_per_head[layer]):
                if len(heads) <= head:
                    heads.append([])
                heads[head] += places[first : first + image.tokens][tokens].tolist()
            first += image.tokens
        found.append(heads)
    return found


@every_model
def test_the_reference_notices_a_wrong_merge(kind: str) -> None:
    inputs = prompt(kind, ROWS[kind][:1])
    model = vtprune.wrap(make(kind), vtprune.D2O(merge=False))
    logits, _, _ = run_wrapped(kind, model, inputs)
    expected = Reference(kind, make(kind, "eager"), Rule()).run(inputs, next_tokens(1))
    difference = (logits[0] - expected)[-STEPS:].abs().amax(dim=1)
    # The first step still attends to all entries.
    assert float(difference[0]) < TOLERANCE
    assert float(difference[1:].max()) > 100 * TOLERANCE


@pytest.mark.parametrize("text", [False, True])
@every_model
def test_several_new_tokens_at_once_decide_together(kind: str, text: bool) -> None:
    rule = Rule(keep=0.3, text=text)
    inputs = prompt(kind, ROWS[kind][:1])
    model = vtprune.wrap(make(kind), pruner(rule))
    tokens = next_tokens(1)
    expected = Reference(kind, make(kind, "eager"), rule).run(inputs, tokens, first=3)
    with torch.no_grad():
        out = model(**inputs)
        found = [out.logits[0], model(input_ids=tokens[:, :3], **{PAST: out.past_key_values}).logits[0]]
        for step in range(3, STEPS):
            found.append(model(input_ids=tokens[:, step : step + 1], **{PAST: out.past_key_values}).logits[0])
    own = torch.cat([inputs["input_ids"][0] != IMAGE, torch.ones(STEPS, dtype=torch.bool)])
    assert float((torch.cat(found) - expected)[own].abs().max()) < TOLERANCE


@pytest.mark.parametrize("texts", [[0, 4], [3, 0], [0, 0]], ids=["nothing before", "nothing after", "image alone"])
@pytest.mark.parametrize("rule", ["default", "text"])
@every_model
def test_an_image_may_stand_anywhere(kind: str, rule: str, texts: list[int]) -> None:
    inputs = prompt(kind, [Row(texts, [(6, 6)], 5)])
    model = vtprune.wrap(make(kind), pruner(RULES[rule]))
    logits, _, _ = run_wrapped(kind, model, inputs)
    expected = Reference(kind, make(kind, "eager"), RULES[rule]).run(inputs, next_tokens(1))
    assert float((logits[0] - expected)[-STEPS:].abs().max()) < TOLERANCE


@every_model
def test_an_image_of_one_token_is_left_alone(kind: str) -> None:
    if not kind.startswith("qwen"):
        pytest.skip("images have one size")
    inputs = prompt(kind, [Row([3, 4], [(1, 1)], 5)])
    model = make(kind)
    expected, _, _ = run_wrapped(kind, vtprune.wrap(model, "none"), inputs)
    vtprune.unwrap(model)
    logits, _, cache = run_wrapped(kind, vtprune.wrap(model, "d2o"), inputs)
    assert torch.equal(logits, expected)
    assert vtprune.report(cache).samples[0].images[0].cached_per_head == [[]] * 5


@every_model
def test_a_row_without_images_is_left_alone(kind: str) -> None:
    rows = [ROWS[kind][0], Row([12], [], 8)]
    inputs = prompt(kind, rows)
    model = make(kind)
    expected, _, _ = run_wrapped(kind, vtprune.wrap(model, "none"), inputs)
    vtprune.unwrap(model)
    for text in (False, True):
        logits, _, cache = run_wrapped(kind, vtprune.wrap(model, vtprune.D2O(keep=0.3, text=text)), inputs)
        vtprune.unwrap(model)
        assert float((own_logits(logits, inputs, 1) - own_logits(expected, inputs, 1)).abs().max()) < TOLERANCE
        assert [layer[1] for layer in vtprune.report(cache).kv_tokens_per_layer] == [12 + STEPS] * 5


@every_model
@pytest.mark.parametrize("keep", [1, 7, 20, 0.1, 0.33, 0.9])
def test_keep_is_met_exactly_by_the_mean_over_the_cut_layers(kind: str, keep: int | float) -> None:
    model = vtprune.wrap(make(kind), "d2o", keep=keep)
    _, before, cache = run_wrapped(kind, model, prompt(kind, ROWS[kind]))
    after = vtprune.report(cache)
    shares = []
    for sample in after.samples:
        for image in sample.images:
            budget = min(keep, image.tokens) if isinstance(keep, int) else max(1, round(keep * image.tokens))
            counts = [len(heads[0]) if heads else image.tokens for heads in image.cached_per_head[2:4]]
            assert sum(counts) == 2 * budget
            assert image.kept_per_layer == [list(range(image.tokens))] * 5
            shares.append(budget / image.tokens)
    assert before.achieved_keep == 1.0
    assert after.achieved_keep == pytest.approx(sum(shares) / len(shares))
    assert after.stages[0].tokens_left == pytest.approx(after.kept_tokens)
    assert after.stages[0].stage == "caches of layers 2, 3"


@given(st.lists(st.tuples(st.floats(0.001, 1), st.integers(1, 60)), min_size=1, max_size=30), st.floats(0, 1))
@few
def test_a_budget_is_shared_out_to_the_last_entry(layers: list[tuple[float, int]], share: float) -> None:
    weights, most = [weight for weight, _ in layers], [cap for _, cap in layers]
    total = len(layers) + int(share * (sum(most) - len(layers)))
    counts = shares_out(weights, most, total)
    assert sum(counts) == total
    assert all(1 <= count <= cap for count, cap in zip(counts, most, strict=True))
    for one, first in enumerate(counts):
        for other, second in enumerate(counts):
            # A flatter layer never gets less, unless it is full; whole numbers cannot be nearer than that.
            if weights[one] > weights[other] and first < most[one]:
                assert first >= second - 1


def test_flat_layers_keep_more_and_the_variance_is_a_share_of_the_largest() -> None:
    flat, peaked = torch.ones(2, 3, 50), torch.zeros(2, 3, 50)
    peaked[..., 7] = 50
    assert spread_of_columns(flat) == 0
    assert spread_of_columns(peaked) == pytest.approx(1)
    assert spread_of_columns(torch.ones(2, 1, 1)) == skew_of_heads(torch.ones(2, 1, 1)) == 0
    # The released code sees the difference between heads alone.
    assert skew_of_heads(flat) == skew_of_heads(peaked) == 0
    assert skew_of_heads(torch.cat([flat, peaked])) == pytest.approx(0.5)
    low, high = flatness([0.9, 0.1])
    assert high / low == pytest.approx(math.exp(0.8))


def test_ties_keep_the_lowest_entries() -> None:
    kept, evicted = best_of(torch.tensor([[1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 5.0]]), 2)
    assert kept.tolist() == [[1, 2], [0, 3]]
    assert evicted.tolist() == [[0, 3], [1, 2]]


def test_column_sums_are_those_of_the_whole_map_however_small_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    query, key = torch.randn(4, 11, 6, generator=generator), torch.randn(2, 15, 6, generator=generator)
    asked, places = torch.arange(4, 15), torch.arange(15)
    logits = query @ key.repeat_interleave(2, dim=0).mT * 0.4
    expected = logits.masked_fill(places > asked[:, None], -math.inf).softmax(dim=-1).sum(dim=1)
    for chunk in (1, 500, 2**20):
        monkeypatch.setattr("vtprune.tensors.attention.CPU_BYTES", chunk)
        assert torch.allclose(attention_sums(query, key, SightByPlaces(asked, places), 0.4), expected, atol=1e-6)
        assert torch.allclose(
            attention_sums(query, key, SightByPlaces(asked, places, range(5, 16)), 0.4), expected, atol=1e-6
        )


def test_queries_that_see_themselves_and_all_before_are_summed_up_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = torch.randn(2, 3, 13, 6, generator=torch.Generator().manual_seed(4)).unbind()
    places = torch.arange(13)
    expected = attention_sums(query, key, SightByPlaces(places, places), 0.4)
    for chunk, short in itertools.product((1, 400, 2**20), (0, 5, 512)):
        monkeypatch.setattr("vtprune.tensors.attention.CPU_BYTES", chunk)
        monkeypatch.setattr("vtprune.tensors.attention.SHORT", short)
        sums = attention_sums(query, key, CausalSight(query.device), 0.4)
        assert torch.allclose(sums, expected, atol=1e-6)


def test_merging_takes_the_mean_of_what_is_alike_enough() -> None:
    key = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 0.1], [0.1, 1.0], [-1.0, 0.0]]])
    value = torch.arange(10.0).view(1, 5, 2)
    kept, evicted = torch.tensor([[0, 1]]), torch.tensor([[2, 3, 4]])
    keys, values, merged, tau = merge_evicted(key, value, kept, evicted, None)
    first, second = 2 / math.hypot(2, 0.1), 1 / math.hypot(1, 0.1)
    assert tau == pytest.approx((first + second + 0) / 3)
    assert merged.tolist() == [[1, 1]]
    assert torch.allclose(keys[0, 0], (key[0, 0] + first * key[0, 2]) / 2)
    assert torch.allclose(values[0, 1], (value[0, 1] + second * value[0, 3]) / 2)
    _, _, none, later = merge_evicted(key, value, kept, evicted, 2.0)
    assert later == pytest.approx((2.0 + tau) / 2)
    assert none.sum() == 0


@pytest.mark.parametrize("options", [{}, {"merge": False}, {"variant": "released"}])
def test_text_that_stands_among_an_images_entries_changes_nothing_of_them(options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(5)
    key, value = (torch.randn(2, 12, 4, generator=generator) for _ in range(2))
    scores = torch.rand(2, 12, generator=generator)
    images = np.array([0, 0, *[1] * 8, 0, 0])
    # The same entries, with the two last ones of text among those of the image.
    order = np.array([0, 1, 2, 3, 10, 4, 5, 6, 11, 7, 8, 9])
    answers = []
    for columns in (np.arange(12), order):
        entries = CacheEntries(key[:, columns], value[:, columns], scores[:, columns], images[columns], 2, {})
        row = CachedRow((entries,), {2: 0.1}, {1: 8}, first=True)
        (found,) = D2O(keep=3, **options).evict(row)
        assert found is not None
        replace(found, sound=False).check(12)
        stood = torch.from_numpy(columns)[found.kept]
        back = stood.argsort(dim=1)
        wide = back[..., None].expand(-1, -1, 4)
        parts = found.key.gather(1, wide), found.value.gather(1, wide), found.merged.gather(1, back)
        answers.append((stood.gather(1, back), *parts))
    for one, other in zip(*answers, strict=True):
        assert torch.allclose(one.double(), other.double(), atol=1e-6)
    assert answers[0][0].shape == (2, 7)


@every_model
def test_nan_in_attention_is_named(kind: str) -> None:
    inputs = prompt(kind, ROWS[kind][:1])
    model = vtprune.wrap(make(kind), "d2o")
    with torch.no_grad():
        expected = model(**inputs).logits
        with pytest.raises(vtprune.ScoreError, match=r"d2o.*NaN"):
            model(**{**inputs, "pixel_values": torch.full_like(inputs["pixel_values"], math.nan)})
        assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"keep": 0}, {"keep": True}, {"keep": math.nan}, {"keep": 1.5}, {"merge": 1}, {"merge": "mean"},
        {"text": None}, {"variant": "newest"}, {"keep": 7, "text": True},
    ],
    ids=str,
)  # fmt: skip
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(vtprune.VTPruneError):
        vtprune.D2O(**options)


def test_a_decoder_without_layers_to_cut_is_refused() -> None:
    facts = ModelFacts(has_cls=True, encoder_depth=5, decoder_depth=3, group=1)
    with pytest.raises(vtprune.VTPruneError, match="at least 4 layers, got 3"):
        vtprune.D2O().bind(facts)
    assert vtprune.D2O().evict_layers() == tuple(range(2, 31))


@every_model
def test_scoring_is_one_product_of_queries_and_keys_a_watched_layer(kind: str) -> None:
    inputs = prompt(kind, ROWS[kind][2:])
    sizes, length = adapter_for(make(kind)).decoder_sizes, inputs["input_ids"].shape[1]
    width = sizes.heads * sizes.head_size
    for variant, layers in (("paper", 2), ("released", 5)):
        model = vtprune.wrap(make(kind), vtprune.D2O(variant=variant))
        with torch.no_grad():
            model(**inputs)
            scoring = vtprune.report(model).flops_breakdown.scoring
            assert scoring == pytest.approx(layers * 2 * length * length * width, abs=2)
            model(**inputs, use_cache=False)
        assert vtprune.report(model).flops_breakdown.scoring == 0
