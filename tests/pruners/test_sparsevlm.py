"""SparseVLM: raters, recycling, both versions' scores, budgets between the published settings, and the rank."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vtprune
from tests.golden.runner import run_case
from tests.models import IMAGE, MODELS, PAST, ROWS, Row, make, prompt, text_positions
from tests.pruners.test_dual_attention import decoder_layer, naive_attention
from tests.streams import few, stream
from vtprune.errors import ScoreError, VTPruneError
from vtprune.evals.bench.sweep import summarise
from vtprune.evals.bench.tables import cost_columns
from vtprune.evals.lmms.efficiency import row_costs
from vtprune.method.facts import ModelFacts
from vtprune.method.views import DecoderLayer
from vtprune.pruners import SparseVLM
from vtprune.pruners.sparsevlm.raters import choose_raters, debiased_scores, relevance
from vtprune.pruners.sparsevlm.recycling import direct_count
from vtprune.pruners.sparsevlm.sparsevlm import PUBLISHED_STAGES, stage_shares

CASES = Path(__file__).parents[1] / "golden" / "cases" / "sparsevlm"
PUBLISHED = ModelFacts(True, 23, 32, 1)
every_model = pytest.mark.parametrize("kind", MODELS)


def layer_of(raters: tuple[int, ...] = (-4, -1), **options: Any) -> DecoderLayer:
    """A random layer with hidden states, rotary tables and chosen raters."""
    layer = decoder_layer(**options)
    generator = torch.Generator().manual_seed(options.get("seed", 0) + 50)
    angles = 3 * torch.rand(layer.key.shape[1], 2, generator=generator).repeat(1, 2)
    hidden = torch.randn(layer.key.shape[1], 6, generator=generator)
    tokens = layer.vision.numel()
    return replace(
        layer, hidden=hidden, rotary=(angles.cos(), angles.sin()), memory={"raters": raters}, entered=tokens, index=2,
        processed=3 * tokens,
    )  # fmt: skip


def run_forward(kind: str, pruner: Any, rows: list[Row]) -> vtprune.Report:
    model = vtprune.wrap(make(kind), pruner)
    with torch.no_grad():
        model(**prompt(kind, rows))
    return vtprune.report(model)


# Raters.


def test_raters_are_the_words_that_get_more_than_the_mean_of_the_images_attention() -> None:
    whole = stream(seed=3)
    text = torch.randn(9, 5, generator=torch.Generator().manual_seed(1))
    found = SparseVLM().remember(replace(whole, text=text, text_after=7))["raters"]
    words, shares = text[2:].double(), []
    for word in range(7):
        each = [float((words @ vector).softmax(0)[word]) for vector in whole.features.double()]
        shares.append(sum(each) / len(each))
    expected = tuple(word - 7 for word in range(7) if shares[word] > sum(shares) / 7)
    assert found == expected
    assert 0 < len(found) < 7
    assert relevance(whole.features, text[2:]).tolist() == pytest.approx(shares, abs=1e-6)


def test_words_that_none_is_above_are_all_raters() -> None:
    assert choose_raters(torch.ones(1)) == (0,)
    assert choose_raters(torch.full((4,), 0.25)) == (0, 1, 2, 3)


def test_without_text_after_the_image_the_last_prompt_token_rates() -> None:
    memory = SparseVLM().remember(replace(stream(), text_after=0))
    layer = replace(layer_of(after=0), memory=memory)
    assert SparseVLM().rows(layer).tolist() == [layer.last]
    assert SparseVLM().rows(layer_of((-4, -1))).tolist() == [11, 14]


def test_nan_in_embeddings_or_attention_is_named() -> None:
    text = torch.full((2, 5), float("nan"))
    with pytest.raises(ScoreError, match="sparsevlm: "):
        SparseVLM().remember(replace(stream(), text=text, text_after=2))
    layer = layer_of()
    for pruner in (SparseVLM(), SparseVLM(version=2), SparseVLM(adaptive_rank=True)):
        with pytest.raises(ScoreError, match="sparsevlm: "):
            pruner.prune_decoder(replace(layer, query=layer.query * float("nan"), budget=3))


# Scores.


def test_version_1_scores_by_the_raters_mean_attention() -> None:
    layer = layer_of()
    want = naive_attention(layer, [11, 14], 0).mean(dim=0)
    assert torch.allclose(SparseVLM().scores(layer).double(), want, atol=1e-6)


@pytest.mark.parametrize("heads", [1, 2, 14])
def test_version_2_divides_by_what_rotated_ones_would_give_and_keeps_the_best_heads(
    heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vtprune.pruners.sparsevlm.raters.HEADS", heads)
    layer = layer_of(seed=5)
    assert layer.rotary is not None
    cos, sin = (part.double() for part in layer.rotary)
    ones = torch.stack([c + torch.tensor([-1.0, -1, 1, 1]).double() * s for c, s in zip(cos, sin, strict=True)])
    maps = []
    for head in range(2):
        only = replace(layer, query=layer.query[head : head + 1], key=layer.key[head : head + 1])
        attention = naive_attention(only, [11, 14], 0)
        kernel = [[float(ones[row] @ ones[at]) * layer.scale for at in layer.vision] for row in (11, 14)]
        maps.append(attention / torch.tensor(kernel).double())
    best = sorted(range(2), key=lambda head: -float(maps[head].sum()))[:heads]
    want = torch.stack([maps[head] for head in best]).mean(dim=(0, 1))
    found = debiased_scores(layer, torch.tensor([11, 14]))
    assert torch.allclose(found.double(), want, rtol=1e-4, atol=1e-5)


def test_a_positional_kernel_of_zero_leaves_scores_finite() -> None:
    layer = layer_of()
    zero = torch.zeros_like(layer.rotary[0])  # type: ignore[index]
    assert debiased_scores(replace(layer, rotary=(zero, zero)), torch.tensor([14])).isfinite().all()


@every_model
def test_methods_see_the_rotary_tables_of_the_tokens_that_are_left(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[DecoderLayer] = []
    original = SparseVLM.prune_decoder
    monkeypatch.setattr(SparseVLM, "prune_decoder", lambda self, layer: (seen.append(layer), original(self, layer))[1])
    inputs = prompt(kind, ROWS[kind][:2])
    model = make(kind)
    positions = text_positions(inputs)
    if kind.startswith("qwen"):
        positions, _ = model.model.get_rope_index(
            inputs["input_ids"], mm_token_type_ids=inputs["mm_token_type_ids"],
            image_grid_thw=inputs["image_grid_thw"], attention_mask=inputs["attention_mask"],
        )  # fmt: skip
    vtprune.wrap(model, SparseVLM(keep=0.5, version=2))
    with torch.no_grad():
        if kind.startswith("qwen"):
            model(**inputs)
        else:
            model(**inputs, position_ids=positions)
        tables = model.model.language_model.rotary_emb(torch.zeros(1), positions)
    assert len(seen) == 6
    for number, layer in enumerate(seen):
        row = number % 2
        image = (inputs["input_ids"][row] == IMAGE).nonzero().flatten()[layer.indices]
        assert layer.rotary is not None
        for own, whole in zip(layer.rotary, tables, strict=True):
            assert own.shape[0] == layer.key.shape[1]
            assert torch.allclose(own[layer.vision], whole[row, image], atol=1e-6)


@every_model
def test_recycling_changes_what_is_computed_and_not_what_is_counted(kind: str) -> None:
    reports = [run_forward(kind, SparseVLM(keep=0.5, recycle=one), ROWS[kind]) for one in (True, False)]
    merged = [[image.merged for sample in report.samples for image in sample.images] for report in reports]
    assert all(merged[0])
    assert not any(merged[1])
    assert reports[0].samples[0].images[0].kept_per_layer[1] != reports[1].samples[0].images[0].kept_per_layer[1]
    assert reports[0].achieved_keep == pytest.approx(reports[1].achieved_keep, abs=0.03)


# Budgets.


@pytest.mark.parametrize("setting", range(4))
def test_published_settings_follow_from_what_each_stage_leaves(setting: int) -> None:
    stages = PUBLISHED_STAGES[1][setting]
    alive, found = 576, []
    for share in stage_shares(stages, recycles=True):
        left = round(share * 576)
        found.append(direct_count(alive, left))
        alive = left
    assert tuple(found) == stages


@pytest.mark.parametrize(
    ("version", "published", "processed"),
    [
        (1, (192.03, 128.62, 96.94, 64.81), (206.5, 145.4, 114.1, 82.3)),
        (2, (192.44, 128.0, 96.81, 64.44), (206.75, 144.1, 113.9, 81.8)),
    ],
)
def test_both_counts_of_the_published_settings(
    version: int, published: tuple[float, ...], processed: tuple[float, ...]
) -> None:
    method = SparseVLM(version=version)
    for setting in range(4):
        shares = stage_shares(PUBLISHED_STAGES[version][setting], recycles=version == 1)
        stages = [576, *(round(share * 576) for share in shares)]
        counts = [n for n, layers in zip(stages, (3, 4, 9, 16), strict=True) for _ in range(layers)]
        assert method.counted.of(counts) == pytest.approx(processed[setting], abs=0.06)
        assert method.published.of(counts) == pytest.approx(published[setting], abs=0.005)
        # Asked for that mean, these are the counts.
        fitted = SparseVLM(keep=sum(counts) / 32 / 576, version=version).bind(PUBLISHED)
        assert sum(abs(a - b) for a, b in zip(fitted.counts(576, 576), counts, strict=True)) <= 32
    own = SparseVLM(version=version).bind(PUBLISHED)
    assert own.counts(576, 576)[2::5] == (
        (576, 204, 204, 113, 113, 113) if version == 1 else (576, 200, 200, *3 * (118,))
    )
    assert own.default_keep * 576 == pytest.approx(processed[0], abs=0.06)


@few
@given(
    tokens=st.integers(40, 700), depth=st.integers(4, 40), keep=st.floats(0.35, 0.99), version=st.sampled_from([1, 2])
)
def test_a_budget_is_met_and_spent_at_any_size_and_depth(tokens: int, depth: int, keep: float, version: int) -> None:
    method = SparseVLM(keep=keep, version=version).bind(ModelFacts(True, 5, depth, 1))
    counts, budget = method.counts(tokens, tokens), max(1, round(keep * tokens))
    assert budget - 1.01 <= sum(counts) / depth <= budget
    assert list(counts) == sorted(counts, reverse=True)
    assert counts[0] == tokens


def test_a_budget_that_the_first_layers_exceed_is_refused() -> None:
    with pytest.raises(VTPruneError, match=r"sparsevlm: .*the 3 of 32 layers before the first drop alone make 0\.09"):
        SparseVLM(keep=0.05).bind(PUBLISHED)
    # Of a count of tokens that depends on the image, which is kept whole where it is too low.
    report = run_forward("qwen2.5-vl", SparseVLM(keep=1), [Row([2, 3], [(2, 2)])])
    image = report.samples[0].images[0]
    assert image.kept_per_layer == [[0, 1, 2, 3]] * 5
    assert "of 4 tokens cannot be cut to a mean of 1" in image.notes[0]


@every_model
def test_the_report_has_both_counts(kind: str) -> None:
    image = run_forward(kind, SparseVLM(), ROWS[kind][:1]).samples[0].images[0]
    counts = [len(kept) for kept in image.kept_per_layer]
    published, processed = sum(counts[1:] + counts[-1:]) / 5, sum(counts) / 5
    assert image.published_tokens == pytest.approx(published)
    assert image.notes == [f"sparsevlm: {published:.1f} tokens as its paper counts, {processed:.1f} processed"]
    assert run_forward(kind, SparseVLM(keep=1.0), ROWS[kind][:1]).samples[0].images[0].notes == []
    other = run_forward(kind, vtprune.FastV(), ROWS[kind][:1]).samples[0].images[0]
    assert (other.notes, other.published_tokens) == ([], None)


def test_the_benchmark_shows_both_counts() -> None:
    pruner = SparseVLM(keep=0.5)
    report = run_forward("llava-clip", pruner, ROWS["llava-clip"])
    costs = [cost.to_dict() for cost in row_costs(report, 0.1)]
    published = [sum(image.published_tokens or 0 for image in sample.images) for sample in report.samples]
    found = summarise(costs)["tokens"]
    assert found["published"] == pytest.approx(sum(published) / 3)
    shown = next(column for column in cost_columns([]) if column.heading == "tokens kept").cell({"tokens": found})
    assert shown == f"{found['kept']:.1f} of 48.0 (in its paper: {sum(published) / 3:.1f})"
    plain = row_costs(run_forward("llava-clip", "grid", ROWS["llava-clip"]), 0.1)
    assert summarise([cost.to_dict() for cost in plain])["tokens"]["published"] is None


@pytest.mark.parametrize("schedule", ["constant", "steps", "linear", "shifted_cosine", "entropy"])
def test_other_schedules_spread_the_same_budget(schedule: str) -> None:
    report = run_forward("llava-clip", SparseVLM(keep=0.5, schedule=schedule), ROWS["llava-clip"])
    assert 0.4 < report.achieved_keep <= 0.5
    own = SparseVLM(schedule=schedule).bind(PUBLISHED)
    assert own.default_keep == pytest.approx(SparseVLM().bind(PUBLISHED).default_keep, abs=1e-6)


# The rank.


def test_the_rank_of_the_raters_attention_decides_how_many_stay() -> None:
    layer = layer_of((-4, -3, -1), tokens=8)
    attention = naive_attention(layer, [11, 12, 14], 0)
    assert int(torch.linalg.matrix_rank(attention)) == 3
    for scale, bias, want in ((1.0, 0.0, 3), (1.5, 1.2, 5), (13.5, 0.0, 7), (0.0, 0.0, 1)):
        method = SparseVLM(adaptive_rank=True, scale=scale, bias=bias, recycle=False)
        selection = method.prune_decoder(layer)
        assert selection is not None
        assert selection.kept.tolist() == attention.mean(dim=0).topk(want).indices.sort().values.tolist()
    same = attention[:1].repeat(3, 1)
    assert SparseVLM(adaptive_rank=True, scale=2.0).rank_count(same) == 2
    # A rank as high as the tokens are many prunes nothing.
    assert SparseVLM(adaptive_rank=True, scale=1.0).rank_count(torch.eye(3)) == 3


@every_model
def test_the_rank_adapts_within_a_budget(kind: str) -> None:
    tight = run_forward(kind, SparseVLM(keep=0.4, adaptive_rank=True, scale=50.0), ROWS[kind])
    capped = run_forward(kind, SparseVLM(keep=0.4), ROWS[kind])
    assert [i.kept_per_layer for s in tight.samples for i in s.images] == [
        i.kept_per_layer for s in capped.samples for i in s.images
    ]
    loose = run_forward(kind, SparseVLM(keep=0.8, adaptive_rank=True, scale=1.0), ROWS[kind])
    assert loose.achieved_keep < 0.6
    whole = run_forward(kind, SparseVLM(keep=100, adaptive_rank=True, scale=1.0), ROWS[kind])
    assert whole.achieved_keep == 1.0


# Prompts and options.


@every_model
@pytest.mark.parametrize("version", [1, 2])
def test_an_image_may_stand_anywhere_and_be_of_any_size(kind: str, version: int) -> None:
    grids = [(1, 1), (2, 3)] if kind.startswith("qwen") else [(6, 6)]
    for grid in grids:
        for texts in ([0, 4], [3, 0], [0, 0]):
            report = run_forward(kind, SparseVLM(keep=0.5, version=version), [Row(texts, [grid], seed=1)])
            assert report.achieved_keep <= (0.5 if grid != (1, 1) else 1.0)


@every_model
def test_a_second_turns_image_is_rated_by_its_own_text(kind: str) -> None:
    model = vtprune.wrap(make(kind), SparseVLM(keep=0.5))
    first, second = prompt(kind, ROWS[kind][:1]), prompt(kind, [replace(ROWS[kind][1], seed=7)])
    with torch.no_grad():
        cache = model(**first, use_cache=True).past_key_values
        model(**second, **{PAST: cache}, use_cache=True)
    images = vtprune.report(cache).samples[0].images
    assert len(images) == 2
    for image in images:
        assert len(image.kept_per_layer[-1]) < image.tokens / 2
        assert image.merged


def test_released_renumbers_positions_in_version_1_alone() -> None:
    assert SparseVLM(variant="released").renumbers
    assert not SparseVLM(variant="released", version=2).renumbers
    assert not SparseVLM().renumbers


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"version": 3}, "version is one of 1, 2"),
        ({"version": True}, "version is one of 1, 2"),
        ({"recycle": 1}, "recycle is one of None, True, False"),
        ({"adaptive_rank": "yes"}, "adaptive_rank is one of"),
        ({"adaptive_rank": True, "scale": -1.0}, "scale is a finite number"),
        ({"adaptive_rank": True, "bias": float("nan")}, "bias is a finite number"),
        ({"scale": 2.0}, "scale belongs to adaptive_rank"),
        ({"adaptive_rank": True, "version": 2}, "adaptive_rank is the ratio of version 1"),
        ({"adaptive_rank": True, "schedule": "entropy"}, "within schedule 'published' or 'steps'"),
        ({"schedule": "best"}, "schedule is one of 'published', 'constant'"),
        ({"variant": "mine"}, "variant is one of"),
        ({"layers": (0, 3)}, "rising ints of at least 1"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(VTPruneError, match=f"sparsevlm: .*{reason}"):
        SparseVLM(**options)


def test_the_search_space_holds_options_that_it_takes() -> None:
    for method in (SparseVLM(keep=0.5), SparseVLM(keep=0.5, adaptive_rank=True), SparseVLM(version=2)):
        for name, tunable in method.search_space(576).items():
            for value in tunable.choices or (tunable.low, tunable.high):
                replace(method, **{name: value})
    assert set(SparseVLM().search_space(576)) == {"recycle"}
    assert "published" in SparseVLM(keep=0.5).search_space(576)["schedule"].choices


# The authors' cases.


@pytest.mark.parametrize(
    ("case", "name", "reason"),
    [
        ("cluster_s1", "out", "clusters: differs"),
        ("v1_192", "rater_idx", "raters: "),
        ("v1_192", "stage1_score", "stage1_score: differs"),
        ("v1_192", "decode_out", "decode_out: differs"),
    ],
)
def test_a_golden_case_that_differs_fails(case: str, name: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / f"{case}.npz"
    with np.load(CASES / path.name) as file:
        arrays = dict(file)
    arrays[name].flat[-1] += 1
    np.savez(path, **arrays)
    outcome = run_case("sparsevlm", path)
    assert outcome.status == "FAIL"
    assert outcome.reason.startswith(reason)
    shutil.copy(CASES / path.name, path)
    assert run_case("sparsevlm", path).status == "ok"
