"""What each method keeps, on cases small enough to check by hand and on properties of all of them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vtprune.errors import ScoreError, VTPruneError
from vtprune.pruner import ModelFacts, Pruner, ScoringWork
from vtprune.pruners import FlowCut, FoPru, Grid, HoloV, NoPruning, Pool, Random
from vtprune.pruners.anyres import restore_crops, unpad_mask
from vtprune.pruners.cells import cell_grid, cut
from vtprune.pruners.crops import capped_quotas, crops_of, diversity, holistic_score
from vtprune.pruners.flow import flow_score, prune_count, top_mask
from vtprune.pruners.fopru import focal_significance, top_rows
from vtprune.pruners.holov import select_crops, select_strips
from vtprune.signals import LayerSignals
from vtprune.stream import DecoderLayer, EncoderLayer, VisionStream

few = settings(max_examples=40, deadline=None)
grids = st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 9))

SELECTING: list[Pruner] = [
    Random(),
    Grid(),
    Pool(),
    FoPru(),
    FoPru(softmax=False),
    FoPru(strategy="row"),
    HoloV(),
    HoloV(crops=3, tau=2.0, alpha=0.5),
    HoloV(variant="released"),
]


def stream(
    grid: tuple[int, int, int] = (1, 6, 6), budget: int = 9, *, seed: int = 0, prefix: int = 1, group: int = 1
) -> VisionStream:
    """A stream of random vectors with the signals of a random layer of 2 heads."""
    generator = torch.Generator().manual_seed(seed)
    total = math.prod(grid)
    states = torch.randn(3, 2, prefix + total * group, 4, generator=generator)
    return VisionStream(
        features=torch.randn(total, 5, generator=generator),
        grid=grid,
        indices=torch.arange(total),
        total=total,
        budget=budget,
        signals=LayerSignals(*states.unbind(), scale=0.5, prefix=prefix, group=group),
        pixels=torch.randn(3, 8, 8, generator=generator),
        text=torch.zeros(2, 5),
    )


def with_nan(whole: VisionStream) -> VisionStream:
    """The stream with one NaN in a key."""
    assert whole.signals is not None
    key = whole.signals.key.clone()
    key[0, -1, 0] = float("nan")
    return replace(whole, signals=replace(whole.signals, key=key))


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
    work = ScoringWork(
        patches=576,
        tokens=576,
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
    flops = pruner.scoring_flops(work)
    assert isinstance(flops, int)
    assert flops == 0 if isinstance(pruner, NoPruning | Random | Grid | Pool) else 10**6 < flops < 10**10
    if pruner == FoPru():
        assert flops == 2 * 576 * (576 + has_cls) * 1024


# Baselines


def test_none_keeps_all():
    pruner = NoPruning(keep=3)
    assert pruner.budget(100) == 100
    assert not pruner.selects
    assert pruner.asked_keep == 3
    assert NoPruning().asked_keep == 1.0


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
    assert [merge.members for merge in selection.merges] == [(0, 1, 4, 5), (2, 3, 6, 7)]
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
    for merge in selection.merges:
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
    assert focal_significance(flat, steep) is steep
    assert focal_significance(steep, flat) is steep
    assert focal_significance(flat, flat + 1) is flat


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


# FlowCut


def test_flowcut_score_by_hand():
    attention, semantic = torch.tensor([[0.2, 0.2]]), torch.tensor([[0.1, 0.3]])
    density = torch.tensor([[2.0, 4.0]])
    assert torch.allclose(flow_score(attention, semantic, density), torch.tensor([[1.5, 5.0]]))
    assert torch.allclose(flow_score(attention, None, density), torch.tensor([[0.4, 0.8]]))


def test_flowcut_prunes_more_where_attention_is_focused():
    even, focused = torch.full((16,), 1 / 16), torch.zeros(16)
    focused[3] = 0.7
    alive, budget = torch.tensor([16, 16]), torch.tensor([4, 4])
    assert prune_count(torch.stack([even, focused]), alive, budget, 4).tolist() == [0, 6]
    assert prune_count(torch.stack([even, focused]), alive, alive + 1, 4).tolist() == [0, 0]


def test_flowcut_prune_count_ignores_padding():
    attention = torch.tensor([[0.5, 0.25, 0.125, 0.125]])
    alone = prune_count(attention, torch.tensor([4]), torch.tensor([1]), 1)
    padded = torch.nn.functional.pad(attention, (0, 9))
    assert torch.equal(prune_count(padded, torch.tensor([4]), torch.tensor([1]), 1), alone)


def test_top_mask_skips_padding_and_prefers_low_indices():
    scores = torch.tensor([[1.0, 5, 5, 9], [float("nan"), 0, 0, 0]])
    valid = torch.tensor([[True, True, True, False], [False, True, True, True]])
    mask = top_mask(scores, torch.tensor([2, 2]), valid)
    assert mask.tolist() == [[False, True, True, False], [False, True, True, False]]


def encode(
    pruner: FlowCut, images: list[Tensor], budgets: list[int], *, prefix: int, group: int, depth: int
) -> list[list[int]]:
    """The tokens of each image that survive an encoder whose layers are given, with padding and compaction.

    images: (depth, 3, H, prefix + N * group, d) queries, keys and values of each image.
    """
    totals = [(image.shape[-2] - prefix) // group for image in images]
    alive = [torch.arange(total) for total in totals]
    memory: dict[str, Tensor] = {}
    for index in range(depth):
        longest = max(map(len, alive))
        states = torch.full((len(images), *images[0].shape[1:3], prefix + longest * group, images[0].shape[-1]), 7.0)
        valid = torch.zeros(len(images), longest, dtype=torch.bool)
        for row, (image, left) in enumerate(zip(images, alive, strict=True)):
            patches = (left[:, None] * group + torch.arange(group)).flatten() + prefix
            places = torch.cat([torch.arange(prefix), patches])
            states[row, :, :, : len(places)] = image[index][:, :, places]
            valid[row, : len(left)] = True
        query, key, value = states.unbind(1)
        layer = EncoderLayer(
            query, key, value, valid, torch.tensor(totals), torch.tensor(budgets), index, depth, 0.5, prefix,
            group, memory,
        )  # fmt: skip
        mask = pruner.prune_encoder(layer)
        if mask is None:
            continue
        assert not bool((mask & ~valid).any())
        alive = [left[mask[row, : len(left)]] for row, left in enumerate(alive)]
        longest = max(map(len, alive))
        for name, scores in memory.items():
            compacted = torch.full((len(images), longest), float("nan"))
            for row, left in enumerate(alive):
                compacted[row, : len(left)] = scores[row][mask[row]]
            memory[name] = compacted
    return [left.tolist() for left in alive]


def towers(sizes: list[int], *, prefix: int, group: int, depth: int, seed: int) -> list[Tensor]:
    """Random layers for images of these many tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(depth, 3, 2, prefix + size * group, 4, generator=generator) for size in sizes]


@few
@given(
    sizes=st.lists(st.integers(2, 24), min_size=1, max_size=4),
    keep=st.sampled_from([1, 5, 0.2, 0.5, 0.9]),
    layout=st.sampled_from([(1, 1), (0, 1), (0, 4)]),
    depth=st.integers(2, 7),
    seed=st.integers(0, 99),
)
def test_flowcut_in_a_ragged_batch_is_flowcut_alone(sizes, keep, layout, depth, seed):
    prefix, group = layout
    options = {"prefix": prefix, "group": group, "depth": depth}
    images = towers(sizes, seed=seed, **options)
    pruner = FlowCut(keep=keep)
    budgets = [pruner.budget(size) for size in sizes]
    together = encode(pruner, images, budgets, **options)
    alone = [encode(pruner, [i], [b], **options)[0] for i, b in zip(images, budgets, strict=True)]
    assert together == alone
    assert [len(kept) for kept in together] == budgets
    assert all(kept == sorted(set(kept)) for kept in together)


def test_released_flowcut_shares_the_prune_count():
    options = {"prefix": 1, "group": 1, "depth": 6}
    images = towers([20, 20, 20], seed=3, **options)
    images[0][:, 1, :, 5] *= 9
    shared = FlowCut(variant="released")
    layer_counts = {len(kept) for kept in encode(shared, images, [4, 4, 4], **options)}
    assert layer_counts == {4}
    assert shared.compact_positions
    assert not FlowCut().compact_positions


def test_flowcut_prunes_at_every_second_layer_and_last_to_the_budget():
    for prefix, depth, layers in ((1, 7, [1, 3, 5]), (0, 6, [1, 3, 5]), (1, 6, [0, 2, 4]), (0, 1, [0])):
        image = towers([16], prefix=prefix, group=1, depth=depth, seed=1)[0]
        memory: dict[str, Tensor] = {}
        acted = []
        for index in range(depth):
            query, key, value = image[index][:, None].unbind(0)
            layer = EncoderLayer(
                query, key, value, torch.ones(1, 16, dtype=torch.bool), torch.tensor([16]), torch.tensor([4]),
                index, depth, 0.5, prefix, 1, memory,
            )  # fmt: skip
            mask = FlowCut().prune_encoder(layer)
            if mask is not None:
                acted.append(index)
                left = int(mask.sum())
        assert acted == layers
        assert left == 4


def test_flowcut_nan_raises_but_nan_padding_does_not():
    valid = torch.tensor([[True, True, True, False]])
    states = torch.randn(3, 1, 2, 5, 4)
    states[:, :, :, -1] = float("nan")
    for prefix in (0, 1):
        query, key, value = states[..., 1 - prefix :, :].unbind(0)
        layer = EncoderLayer(
            query, key, value, valid, torch.tensor([4]), torch.tensor([1]), 0, 2 + prefix, 0.5, prefix, 1, {}
        )
        mask = FlowCut().prune_encoder(layer)
        assert mask is None or not mask[0, 3]
        with pytest.raises(ScoreError, match="flowcut"):
            FlowCut().prune_encoder(replace(layer, valid=torch.ones_like(valid), memory={}))


def test_flowcut_stages_follow_the_model():
    facts = ModelFacts(has_cls=True, encoder_depth=23, decoder_depth=32, group=1)
    one = FlowCut(keep=64).for_model(facts)
    two = FlowCut(keep=64).for_model(replace(facts, has_cls=False))
    assert (one.stages, two.stages) == (1, 2)
    assert (one.encoder_budget(576), one.input_budget(576), one.budget(576)) == (64, 64, 64)
    assert (two.encoder_budget(576), two.input_budget(576), two.budget(576)) == (128, 128, 64)
    assert two.encoder_budget(100) == 100
    assert (one.decoder_layers(32), two.decoder_layers(32)) == ((), (1,))
    assert FlowCut(stages=1).for_model(replace(facts, has_cls=False)).stages == 1


def test_flowcut_says_where_a_model_is_too_shallow():
    facts = ModelFacts(has_cls=False, encoder_depth=4, decoder_depth=2, group=1)
    with pytest.raises(VTPruneError, match="at least 3 decoder layers, got 2; stages=1 works"):
        FlowCut().for_model(facts)
    assert FlowCut(stages=1).for_model(facts).stages == 1
    with pytest.raises(VTPruneError, match="at least 2 encoder layers"):
        FlowCut().for_model(replace(facts, has_cls=True, encoder_depth=1))


def decoder_layer(budget: int) -> DecoderLayer:
    """A layer where tokens 3 and 1 of four match the last prompt token best."""
    key = torch.zeros(1, 6, 2)
    key[0, 1:5, 0] = torch.tensor([0.0, 2.0, 1.0, 3.0])
    query, value = torch.zeros(1, 6, 2), torch.ones(1, 6, 2)
    query[0, 5, 0] = 1.0
    vision = torch.arange(1, 5)
    return DecoderLayer(query, key, value, vision, 5, 1.0, 4, torch.arange(4), budget, 1, 4)


def test_flowcut_second_stage_by_hand():
    assert FlowCut(stages=2).prune_decoder(decoder_layer(2)).kept.tolist() == [1, 3]
    assert FlowCut(stages=2).prune_decoder(decoder_layer(4)) is None
    layer = decoder_layer(2)
    layer.key[0, 2, 0] = float("inf")
    with pytest.raises(ScoreError, match="flowcut"):
        FlowCut(stages=2).prune_decoder(layer)


# HoloV


def test_holov_diversity_by_hand():
    features = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    assert torch.allclose(diversity(features), torch.tensor([0.375, 0.375, 0.0]), atol=1e-5)
    assert diversity(features[:1]).tolist() == [0.0]
    score = holistic_score(features, torch.tensor([1.0, 2.0, 3.0]), 1.0)
    assert torch.allclose(score, torch.tensor([4.0, 5.0, 3.0]), atol=1e-3)


@pytest.mark.parametrize(
    ("weights", "sizes", "budget", "quotas"),
    [
        ([1.0, 1.0], [4, 4], 4, [2, 2]),
        ([0.6, 0.4], [9, 9], 7, [5, 2]),
        ([0.9, 0.05, 0.05], [4, 10, 10], 12, [4, 5, 3]),
        ([0.8, 0.2, 0.0], [2, 2, 9], 6, [2, 2, 2]),
        ([0.0, 0.0], [3, 3], 2, [1, 1]),
        ([1.0], [3], 9, [3]),
    ],
)
def test_holov_quotas_by_hand(weights, sizes, budget, quotas):
    assert capped_quotas(weights, sizes, budget) == quotas


@few
@given(crops=st.lists(st.tuples(st.floats(0, 1e3), st.integers(0, 40)), min_size=1, max_size=20), data=st.data())
def test_holov_quotas_sum_to_the_budget_and_fit_their_crops(crops, data):
    weights, sizes = [list(values) for values in zip(*crops, strict=True)]
    budget = data.draw(st.integers(0, sum(sizes)))
    quotas = capped_quotas(weights, sizes, budget)
    assert sum(quotas) == budget
    assert all(0 <= quota <= size for quota, size in zip(quotas, sizes, strict=True))


def test_holov_crops_are_windows():
    crops = crops_of((1, 4, 4), 2).reshape(4, 4)
    assert crops.tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    assert crops_of((1, 5, 3), 4).reshape(5, 3)[:, 0].tolist() == [0, 0, 4, 8, 12]
    assert crops_of((2, 4, 4), 4).unique().numel() == 32
    assert crops_of((1, 24, 24), 4).bincount().tolist() == [36] * 16


def test_holov_gives_every_crop_its_share():
    attention = torch.full((16,), 0.01)
    attention[[2, 3, 6, 7]] = 0.019
    crops = crops_of((1, 4, 4), 2)
    kept = select_crops(torch.eye(16), attention, crops, 5)
    assert crops[kept].bincount().tolist() == [1, 2, 1, 1]
    sharper = select_crops(torch.eye(16), attention, crops, 5, tau=9.0)
    assert crops[sharper].bincount().tolist() == [1, 4]


def test_holov_keeps_an_even_spread_where_attention_does_not_differ():
    kept = select_crops(torch.eye(16), torch.full((16,), 0.25), crops_of((1, 4, 4), 2), 4)
    assert kept.tolist() == [0, 2, 8, 10]


def test_released_holov_by_hand():
    attention = torch.tensor([0.1, 0.4, 0.1, 0.2, 0.1, 0.1])
    got = select_strips(torch.eye(6), attention, 2, 3)
    assert got.quotas.tolist() == [2, 1]
    assert got.positions.tolist() == [1, 0, 3]
    whole = select_strips(torch.eye(6), torch.tensor([1.0, 1, 1, 0, 0, 0]), 2, 5)
    assert whole.positions.tolist()[:3] == [0, 1, 2]
    assert whole.positions.tolist()[-1] == -1


def test_released_holov_drops_the_padding():
    attention = torch.tensor([0.9, 0.9, 0.01, 0.01, 0.01, 0.01])
    positions = select_strips(torch.eye(6), attention, 3, 5).positions
    assert int((positions < 0).sum()) > 0
    assert HoloV(variant="released").compact_positions
    assert [HoloV().strips(576, budget) for budget in (64, 128, 192)] == [16, 8, 5]


@few
@given(tokens=st.integers(2, 60), strips=st.integers(1, 70), data=st.data())
def test_released_holov_positions_are_distinct(tokens, strips, data):
    budget = data.draw(st.integers(1, tokens))
    whole = stream((1, 1, tokens), budget, seed=tokens)
    got = select_strips(whole.features, whole.signals.saliency(), strips, budget)
    real = got.positions[got.positions >= 0].tolist()
    assert len(real) == len(set(real)) > 0
    assert got.positions.numel() == budget


def test_holov_follows_a_stage_that_dropped_tokens():
    whole = stream((1, 6, 6), 6)
    left = torch.arange(0, 36, 2)
    places = torch.cat([torch.zeros(1, dtype=torch.long), left + 1])
    query, key, value = (states[:, places] for states in (whole.signals.query, whole.signals.key, whole.signals.value))
    signals = replace(whole.signals, query=query, key=key, value=value)
    part = replace(whole, indices=left, features=whole.features[left], signals=signals)
    selection = HoloV().select(part)
    selection.check(18)
    assert selection.kept.numel() == 6


# Crops of large images


def test_crops_are_read_in_the_order_of_the_whole_image():
    keep = torch.tensor([[0, 3], [1, 2]])
    mask, order = restore_crops(keep, (1, 2), 2)
    assert mask.tolist() == [[True, False, False, True], [False, True, True, False]]
    assert order.tolist() == [0, 2, 1, 3]
    mask, order = restore_crops(keep, (1, 2), 2, original=(40, 10))
    assert (mask.tolist()[1], order.tolist()) == ([False, True, True, False], [0, 2, 1, 3])


def test_padding_of_a_wide_and_a_tall_image():
    assert unpad_mask(4, 4, (40, 20)).any(dim=1).tolist() == [False, True, True, False]
    assert unpad_mask(4, 4, (20, 40)).any(dim=0).tolist() == [False, True, True, False]
