"""What each method keeps, on cases small enough to check by hand and on properties of all of them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.streams import SELECTING, few, grids, stream, with_nan
from vtprune.errors import ScoreError, VTPruneError
from vtprune.method.facts import Work
from vtprune.method.pruner import asked
from vtprune.pruners import (
    FlowCut,
    FoPru,
    Grid,
    HoloV,
    NoPruning,
    Pool,
    Random,
)
from vtprune.pruners.fopru import focal_significance, top_rows
from vtprune.pruners.parts.cells import cell_grid, cut
from vtprune.pruners.random import pixel_seed

# All methods that act between encoder and decoder


@few
@given(
    grid=grids,
    data=st.data(),
    pruner=st.sampled_from(SELECTING),
    seed=st.integers(0, 9),
    layout=st.sampled_from([(1, 1), (0, 1), (0, 4)]),
)
def test_selections_are_valid_and_within_the_budget(grid, data, pruner, seed, layout):
    total = math.prod(grid)
    smallest = grid[-1] if getattr(pruner, "strategy", None) == "row" else 1
    budget = data.draw(st.integers(smallest, total))
    selection = pruner.select(stream(grid, budget, seed=seed, prefix=layout[0], group=layout[1]))
    selection.check(total)
    count = selection.kept.numel()
    assert count <= budget
    exact = isinstance(pruner, Random | FoPru | HoloV) and smallest == 1 and pruner != HoloV(variant="released")
    assert count == budget or not exact
    assert count == (budget // smallest) * smallest or smallest == 1


@pytest.mark.parametrize("pruner", [FoPru(), FoPru(softmax=False), HoloV(), HoloV(variant="released")], ids=repr)
@pytest.mark.parametrize("prefix", [0, 1])
def test_nan_scores_raise(pruner, prefix):
    with pytest.raises(ScoreError, match=pruner.name):
        pruner.select(with_nan(stream(prefix=prefix)))


@pytest.mark.parametrize("pruner", SELECTING, ids=repr)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_are_computed_in_fp32(pruner, dtype):
    whole = stream()
    parts = (whole.signals.query, whole.signals.key, whole.signals.value)
    query, key, value = (states.to(dtype) for states in parts)
    low = replace(
        whole,
        features=whole.features.to(dtype),
        signals=replace(whole.signals, query=query, key=key, value=value),
    )
    high = replace(
        low,
        features=low.features.float(),
        signals=replace(whole.signals, query=query.float(), key=key.float(), value=value.float()),
    )
    assert torch.equal(pruner.select(low).kept, pruner.select(high).kept)


def test_nan_features_raise():
    whole = stream()
    whole.features[3, 0] = float("nan")
    for pruner in (HoloV(), HoloV(variant="released")):
        with pytest.raises(ScoreError, match="holov"):
            pruner.select(whole)


@pytest.mark.parametrize("pruner", [Grid(), Pool(), FoPru(strategy="row")], ids=repr)
def test_whole_grids_are_needed(pruner):
    part = stream()
    part = replace(part, indices=part.indices[1:], features=part.features[1:])
    with pytest.raises(VTPruneError, match="needs all 36 tokens"):
        pruner.select(part)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FoPru(strategy="column"), "strategy is one of 'rank', 'row', got 'column'"),
        (lambda: FoPru(softmax=1), "softmax is one of True, False, got 1"),
        (lambda: FlowCut(stages=3), "stages is one of None, 1, 2, got 3"),
        (lambda: FlowCut(stages=True), "stages"),
        (lambda: FlowCut(variant="fast"), "variant is one of 'paper', 'released', got 'fast'"),
        (lambda: HoloV(variant="qwen"), "variant"),
        (lambda: HoloV(crops=0), "crops is an int of at least 1, got 0"),
        (lambda: HoloV(crops=4.0), "crops"),
        (lambda: HoloV(alpha=-1), "alpha is a finite number of at least 0, got -1"),
        (lambda: HoloV(tau=float("nan")), "tau"),
        (lambda: HoloV(tau="1"), "tau"),
        (lambda: HoloV(variant="released", tau=2.0), "released.*no tau"),
        (lambda: Random(seed=True), "seed"),
        (lambda: Random(seed=2**64), "seed"),
        (lambda: Pool(keep=0), "keep"),
    ],
)
def test_bad_options_raise(make, message):
    with pytest.raises(VTPruneError, match=message):
        make()


@pytest.mark.parametrize("pruner", [*SELECTING, FlowCut(stages=2), NoPruning()], ids=repr)
@pytest.mark.parametrize("has_cls", [True, False])
def test_scoring_flops_are_whole_numbers(pruner, has_cls):
    work = Work(
        patches=576,
        tokens=576,
        shown=576,
        kept=64,
        encoder_width=1024,
        encoder_heads=16,
        decoder_width=4096,
        decoder_heads=32,
        prompt=100,
        text=36,
        encoder_patches=(576,) * 23,
        encoder_layers=tuple(range(23)) if isinstance(pruner, FlowCut) else (),
        decoder_layers=(1,) if isinstance(pruner, FlowCut) else (),
        has_cls=has_cls,
    )
    flops = pruner.flops(work)
    assert isinstance(flops, int)
    assert flops == 0 if isinstance(pruner, NoPruning | Random | Grid | Pool) else 10**6 < flops < 10**10
    if pruner == FoPru():
        assert flops == 2 * 576 * (576 + has_cls) * 1024


# Baselines


def test_none_keeps_all():
    pruner = NoPruning(keep=3)
    assert pruner.budget(100) == 100
    assert pruner.info.stage == "none"
    assert asked(pruner) == 3
    assert asked(NoPruning()) == 1.0


def test_random_depends_on_the_pixels_and_the_seed_alone():
    one, other = stream(seed=1), stream(seed=2)
    kept = Random().select(one).kept
    same = replace(one, features=other.features, text=other.text)
    torch.manual_seed(99)
    assert torch.equal(Random().select(same).kept, kept)
    assert not torch.equal(Random().select(other).kept, kept)
    assert not torch.equal(Random(seed=1).select(one).kept, kept)
    rounded = replace(one, pixels=one.pixels.bfloat16())
    assert torch.equal(Random().select(rounded).kept, kept)


def test_random_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    Random().select(stream())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_smaller_random_budget_keeps_a_subset():
    more, fewer = (Random().select(stream(budget=budget)).kept for budget in (20, 7))
    assert set(fewer.tolist()) < set(more.tolist())


@pytest.mark.parametrize(
    ("grid", "budget", "cells"),
    [
        ((1, 24, 24), 64, (1, 8, 8)),
        ((1, 24, 24), 60, (1, 8, 7)),
        ((1, 12, 24), 72, (1, 6, 12)),
        ((1, 3, 3), 1, (1, 1, 1)),
        ((1, 1, 9), 4, (1, 1, 4)),
        ((2, 6, 6), 18, (2, 3, 3)),
        ((4, 6, 6), 3, (3, 1, 1)),
        ((1, 5, 5), 25, (1, 5, 5)),
    ],
)
def test_cells_have_the_aspect_of_the_grid(grid, budget, cells):
    assert cell_grid(grid, budget) == cells


def test_grid_keeps_the_centres():
    kept = Grid().select(stream((1, 6, 6), 4)).kept
    assert kept.tolist() == [7, 10, 25, 28]


def test_pool_by_hand():
    whole = stream((1, 2, 4), 2)
    selection = Pool().select(whole)
    assert selection.kept.tolist() == [0, 2]
    assert [merge.members for merge in selection.merged()] == [(0, 1, 4, 5), (2, 3, 6, 7)]
    assert torch.allclose(selection.vectors[1], whole.features[[2, 3, 6, 7]].mean(dim=0))


@few
@given(grid=grids, data=st.data())
def test_pooled_vectors_are_the_weighted_members(grid, data):
    total = math.prod(grid)
    budget = data.draw(st.integers(1, total))
    whole = stream(grid, budget)
    selection = Pool().select(whole)
    assert torch.equal(selection.kept, Grid().select(whole).kept)
    expected = whole.features[selection.kept]
    row = {int(token): place for place, token in enumerate(selection.kept)}
    for merge in selection.merged():
        assert merge.into in merge.members
        assert sum(merge.weights) == pytest.approx(1)
        assert list(merge.members) == sorted(set(merge.members))
        weights = torch.tensor(merge.weights)
        expected[row[merge.into]] = weights @ whole.features[list(merge.members)]
    assert torch.allclose(selection.vectors, expected, atol=1e-5)
    covered = {member for cell in cut(grid, cell_grid(grid, budget)) for member in cell.members}
    assert covered == set(range(total))


def test_pooled_vectors_keep_their_dtype():
    whole = stream()
    selection = Pool().select(replace(whole, features=whole.features.bfloat16()))
    assert selection.vectors.dtype == torch.bfloat16


# FoPru


def test_fopru_takes_the_significance_that_varies_more():
    flat, steep = torch.tensor([1.0, 1.1, 1.0]), torch.tensor([0.0, 5.0, 1.0])
    assert torch.equal(focal_significance(flat, steep), steep)
    assert torch.equal(focal_significance(steep, flat), steep)
    assert torch.equal(focal_significance(flat, flat + 1), flat)


def test_fopru_rows_by_hand():
    significance = torch.tensor([0.0, 9, 0, 3, 3, 4, 1, 1, 1, 5, 5, 5])
    assert top_rows(significance, 3, 8).tolist() == [3, 4, 5, 9, 10, 11]
    with pytest.raises(VTPruneError, match="smallest that works is 3 tokens"):
        top_rows(significance, 3, 2)


@pytest.mark.parametrize("prefix", [0, 1])
def test_fopru_is_the_mean_of_the_full_map(prefix):
    whole = stream(prefix=prefix)
    weights = (whole.signals.query @ whole.signals.key.transpose(-1, -2) * 0.5).softmax(dim=-1)
    weights = weights[:, prefix:, prefix:].mean(dim=0)
    received, given = weights.mean(dim=0), weights.mean(dim=1)
    expected = received if received.var() > given.var() else given
    assert torch.allclose(FoPru().significance(whole), expected, atol=1e-7)


def test_fopru_averages_over_merge_groups():
    whole = stream((1, 4, 4), prefix=0, group=4)
    per_patch = FoPru().significance(replace(whole, signals=replace(whole.signals, group=1)))
    assert torch.allclose(FoPru().significance(whole), per_patch.reshape(16, 4).mean(dim=1))


def test_random_tokens_do_not_depend_on_the_pixels_dtype() -> None:
    generator = torch.Generator().manual_seed(0)
    seeds = set()
    for image in range(1000):
        pixels = torch.randn(3, 12, 12, generator=generator)
        if image % 2:
            # Levels of a byte, as processors normalise them.
            pixels = (torch.randint(0, 256, pixels.shape, generator=generator) / 255 - 0.4578275) / 0.26130258
        found = {
            pixel_seed(one, 0)
            for one in (pixels, pixels.half(), pixels.bfloat16(), pixels.half().bfloat16(), pixels.bfloat16().half())
        }
        assert len(found) == 1
        seeds |= found
    assert len(seeds) == 1000
