"""VFlowOpt: recycling, the budget over layers, and what becomes of every token."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vtprune
from tests.models import DECODER_LAYERS, MODELS, ROWS, make, prompt
from tests.oracle import TOLERANCE, difference_from_masked
from tests.streams import few, picture_stream
from vtprune.errors import VTPruneError
from vtprune.method.facts import ModelFacts, Work
from vtprune.method.pruner import Tunable, budget_of
from vtprune.pruners import FlowCut, VFlowOpt
from vtprune.pruners.vflowopt.budget import (
    RELEASED,
    last_ratio,
    mean_retention,
    released_settings,
    stage_counts,
    stage_layers,
)
from vtprune.pruners.vflowopt.recycling import cells_of, direct_count, filled_cells, recycle

every_model = pytest.mark.parametrize("kind", MODELS)
SEVEN_B = {"decoder_width": 4096, "decoder_heads": 32, "encoder_width": 1024, "encoder_heads": 16}


def facts(depth: int) -> ModelFacts:
    return ModelFacts(has_cls=True, encoder_depth=23, decoder_depth=depth, group=1)


# Recycling


def test_cells_are_floors_of_rows_and_columns_and_parts_share_none():
    # Cells smaller than a token hold one each, and no others are made.
    assert cells_of([(3, 5)], 1e-9)[1] == 15
    assert cells_of([(3, 5)], 2.5)[0].reshape(3, 5).tolist() == [[0, 0, 0, 1, 1]] * 3
    assert cells_of([(4, 4)], 2.5)[0].reshape(4, 4)[:, ::3].tolist() == [[0, 1]] * 3 + [[2, 3]]
    assert cells_of([(2, 2), (1, 3)], 10)[0].tolist() == [0, 0, 0, 0, 1, 1, 1]
    found, count = cells_of([(2, 3)], 0.5)
    assert found.unique().numel() == 6 <= count


def test_a_recycled_vector_is_the_weighted_mean_and_stands_at_its_heaviest_member():
    features = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    importance = torch.tensor([0.1, 0.9, 0.3, 0.2, 0.2, 0.8])
    selection = recycle(features, importance, torch.tensor([0, 0, 0, 1, 1, 1]), count=2, direct=2, filled=2)
    assert selection.kept.tolist() == [1, 2, 3, 5]
    assert torch.equal(selection.vectors[[0, 3]], features[[1, 5]])
    assert torch.allclose(selection.vectors[1], 0.25 * features[0] + 0.75 * features[2])
    # Ties go to the lowest.
    assert torch.allclose(selection.vectors[2], (features[3] + features[4]) / 2)
    assert [(merge.into, merge.members) for merge in selection.merged()] == [(2, (0, 2)), (3, (3, 4))]
    assert selection.merged()[0].weights == pytest.approx((0.25, 0.75))


def test_negative_importance_weighs_nothing_and_only_negative_ones_weigh_the_same():
    features = torch.eye(4)
    selection = recycle(
        features, torch.tensor([-0.5, 0.1, -0.2, -0.3]), torch.tensor([0, 0, 1, 1]), count=2, direct=0, filled=2
    )
    assert selection.kept.tolist() == [1, 2]
    assert torch.equal(selection.vectors, torch.tensor([[0.0, 1, 0, 0], [0, 0, 0.5, 0.5]]))


def test_a_cell_with_one_token_changes_nothing():
    features = torch.randn(3, 4)
    selection = recycle(features, torch.tensor([0.3, 0.2, 0.1]), torch.tensor([0, 1, 2]), count=3, direct=0, filled=3)
    assert torch.equal(selection.vectors, features)
    assert selection.merged() == ()


def test_where_cells_are_too_many_the_least_important_ones_are_dropped():
    importance = torch.tensor([0.1, 0.2, 0.9, 0.4, 0.3, 0.5])
    cells = torch.tensor([0, 0, 1, 1, 2, 2])
    assert direct_count(importance, cells, 3, 2) == (0, 3)
    selection = recycle(torch.eye(6), importance, cells, count=3, direct=0, filled=2)
    assert selection.kept.tolist() == [2, 5]
    assert [merge.members for merge in selection.merged()] == [(2, 3), (4, 5)]


@few
@given(st.tuples(st.integers(1, 9), st.integers(1, 9)), st.floats(0.3, 12), st.integers(0, 9), st.data())
def test_as_many_stay_as_they_are_as_the_budget_leaves_room_for(grid, size, seed, data):
    total = math.prod(grid)
    budget = data.draw(st.integers(1, total))
    if budget == total:
        return
    importance = torch.rand(total, generator=torch.Generator().manual_seed(seed))
    cells, count = cells_of([grid], size)
    order = importance.argsort(descending=True)
    fitting = [n for n in range(total) if n + cells[order[n:]].unique().numel() <= budget]
    direct, filled = direct_count(importance, cells, count, budget)
    assert direct == max(fitting, default=0)
    assert filled == cells[order[direct:]].unique().numel() == filled_cells(importance, cells, count, direct)
    filled = min(filled, budget - direct)
    kept = recycle(torch.eye(total), importance, cells, count=count, direct=direct, filled=filled).kept.numel()
    assert kept == budget if fitting else kept <= budget


def test_recycling_keeps_the_dtype_and_lets_gradients_through():
    features = torch.randn(6, 4, requires_grad=True)
    selection = recycle(features, torch.rand(6), torch.tensor([0, 0, 0, 1, 1, 1]), count=2, direct=1, filled=2)
    selection.vectors.sum().backward()
    assert bool((features.grad != 0).any(dim=1).all())
    half = recycle(
        features.detach().half(), torch.rand(6), torch.tensor([0, 0, 0, 1, 1, 1]), count=2, direct=1, filled=2
    )
    assert half.vectors.dtype == torch.float16


# The budget over layers


@pytest.mark.parametrize(
    ("first", "second", "last", "mean"),
    [
        (0.7233201448753168, 0.748747637472693, 0.487, 0.5007),
        (0.2651026358526424, 0.9833433139039235, 0.8773258179532721, 0.2507),
        (0.11661529508161146, 1.0, 0.6011, 0.1000),
    ],
)
def test_the_released_settings_have_the_mean_that_was_published(first, second, last, mean):
    assert mean_retention(first, second, last, (9, 18), 28) == pytest.approx(mean, abs=1e-4)
    target = mean_retention(first, second, last, (9, 18), 28)
    assert last_ratio(target, first, second, (9, 18), 28) == pytest.approx(last)


@pytest.mark.parametrize("keep", RELEASED)
def test_settings_hit_the_released_ones_and_are_linear_between_them(keep):
    assert released_settings(keep) == RELEASED[keep]
    assert released_settings(0.01) == RELEASED[0.1]
    assert released_settings(0.9) == RELEASED[0.5]
    middle = released_settings(0.375)
    for name in ("first", "second", "threshold", "cell"):
        ends = [getattr(RELEASED[share], name) for share in (0.25, 0.5)]
        assert getattr(middle, name) == pytest.approx(sum(ends) / 2)


def test_an_int_keep_takes_the_settings_of_its_share_of_each_image():
    count, share = VFlowOpt(keep=144).schedule(), VFlowOpt(keep=0.25).schedule()
    assert count.settings(count.target(576)) == share.settings(0.25)
    assert count.counts(576) == share.counts(576)


def test_layers_are_depth_fractions():
    assert stage_layers(28) == (9, 18)
    assert stage_layers(32) == (10, 21)
    assert stage_layers(DECODER_LAYERS) == (2, 3)
    for depth in range(3, 100):
        first, second = stage_layers(depth)
        assert 1 <= first < second < depth
        assert VFlowOpt().bind(facts(depth)).drop_layers() == (first - 1, second - 1)


@few
@given(
    st.integers(1, 3000),
    st.floats(0.01, 1),
    st.floats(1, 1.5),
    st.floats(0.534, 1),
    st.sampled_from([((9, 18), 28), ((10, 21), 32), ((2, 3), 5), ((1, 2), 3)]),
)
def test_the_mean_over_layers_is_at_most_the_budget_and_close_to_it(tokens, keep, more, second, model):
    (start, end), depth = model
    budget, first = budget_of(keep, tokens), min(1.0, keep * more)
    counts = stage_counts(tokens, budget, first, second, (start, end), depth)
    assert tokens >= counts[0] >= counts[1] >= counts[2] >= 1
    assert counts[0] <= max(1, round(first * tokens))
    mean = (start * counts[0] + (end - start) * counts[1] + (depth - end) * counts[2]) / depth
    assert mean <= budget
    if counts[2] < counts[1]:
        assert mean > budget - 1


@pytest.mark.parametrize("keep", [0.03, 0.1, 0.25, 0.5, 0.8, 0.9, 0.97])
@pytest.mark.parametrize("depth", [5, 24, 28, 32])
def test_the_default_uses_up_its_budget_at_any_keep(keep, depth):
    counts = VFlowOpt(keep=keep).bind(facts(depth)).schedule().counts(576)
    start, end = stage_layers(depth)
    mean = (start * counts[0] + (end - start) * counts[1] + (depth - end) * counts[2]) / depth
    assert budget_of(keep, 576) - 1 <= mean <= budget_of(keep, 576)


def test_settings_that_cannot_meet_the_budget_raise():
    for pruner in (
        VFlowOpt(keep=0.25, first=2.0),
        VFlowOpt(keep=0.5, first=2, second=1.0),
        VFlowOpt(keep=0.25, layers=(20, 27)),
    ):
        with pytest.raises(VTPruneError, match=r"vflowopt: first=.* use up a mean of"):
            pruner.bind(facts(28))
    with pytest.raises(VTPruneError, match="use up a mean of"):
        vtprune.wrap(make("llava-clip"), "vflowopt", keep=0.2, first=4.5)
    # A count of tokens is another share of every image, and all of a small one.
    fitted = VFlowOpt(keep=64, first=2.2).bind(facts(28)).schedule()
    assert fitted.counts(64) == (64, 64, 64)
    with pytest.raises(VTPruneError, match="use up a mean of"):
        fitted.counts(576)


def test_shares_below_keep_drop_nothing_at_the_last_stage():
    assert VFlowOpt(keep=0.5, first=1.0, second=1.0).schedule().counts(100) == (50, 50, 50)
    assert VFlowOpt(keep=0.5, first=0.8, second=0.9).schedule().counts(100) == (40, 36, 36)


@pytest.mark.parametrize(
    ("layers", "depth"), [((3, 28), 28), ((27, 30), 28), (None, 2), (None, 1)], ids=lambda value: str(value)
)
def test_layers_beyond_the_decoder_raise(layers, depth):
    with pytest.raises(VTPruneError, match="vflowopt drops tokens before the decoder layers"):
        VFlowOpt(layers=layers).bind(facts(depth))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first": 0.0}, "first is a finite number above 0, got 0.0"),
        ({"second": 1.5}, "second is a number above 0, at most 1, got 1.5"),
        ({"second": True}, "second"),
        ({"second": float("nan")}, "second"),
        ({"cell": 0}, "cell is a finite number above 0, got 0"),
        ({"cell": "3"}, "cell"),
        ({"alpha": float("inf")}, "alpha is a finite number, got inf"),
        ({"threshold": -1.0}, "threshold is a finite number of at least 0"),
        ({"layers": ()}, "layers are rising ints of at least 1"),
        ({"layers": (3,), "second": 0.5}, "second is the share at each of the 0 layers before the last"),
        ({"layers": (1, 2, 3), "second": (0.5,)}, "second is the share at each of the 2 layers"),
        ({"layers": (1, 2, 3), "second": (0.5, 1.5)}, "second is a number above 0, at most 1, got 1.5"),
        ({"layers": (3, 3)}, "layers"),
        ({"layers": (0, 3)}, "layers"),
        ({"layers": (1.0, 3)}, "layers"),
        ({"layers": 9}, "layers"),
        ({"recycle": 1}, "recycle is one of True, False, got 1"),
        ({"variant": "opt"}, "variant is one of 'paper', 'released', got 'opt'"),
        ({"keep": 0}, "keep"),
    ],
)
def test_bad_options_raise(options, message):
    with pytest.raises(VTPruneError, match=message):
        VFlowOpt(**options)


def test_the_search_space_is_the_authors_boxes_at_any_keep():
    space, count, own = (
        {name: dataclasses.replace(one, start=None) for name, one in pruner.search_space(576).items()}
        for pruner in (VFlowOpt(keep=0.25), VFlowOpt(keep=64), VFlowOpt())
    )
    assert space["first"] == Tunable(1, 1.5)
    assert space["second"] == Tunable(0.2 / 0.375, 1)
    assert space["alpha"] == Tunable(-1, 1)
    assert count == own == space
    names = {field.name for field in dataclasses.fields(VFlowOpt)}
    assert set(space) <= names


@pytest.mark.parametrize("tokens", [576, 2880])
def test_scoring_costs_under_two_percent_of_a_7b_prefill(tokens):
    work = Work(
        patches=tokens, tokens=tokens, shown=tokens, kept=tokens // 4,
        prompt=tokens + 64, text=64, encoder_patches=(tokens,) * 24,
        encoder_layers=(), decoder_layers=(9, 20), has_cls=True, **SEVEN_B,
    )  # fmt: skip
    flops = VFlowOpt(threshold=0).flops(work)
    assert flops == 4 * tokens * (tokens + 1) * 1024 + 2 * tokens * 4096
    assert VFlowOpt().flops(work) < 0.6 * flops
    pruned_prefill = 2 * 6.6e9 * (0.25 * tokens + 64)
    assert flops < 0.02 * pruned_prefill


# On models


def images_of(kind: str, pruner: Any) -> tuple[vtprune.Report, list[Any]]:
    model = vtprune.wrap(make(kind), pruner)
    with torch.no_grad():
        model(**prompt(kind, ROWS[kind]))
    report = vtprune.report(model)
    return report, [image for sample in report.samples for image in sample.images]


@every_model
@pytest.mark.parametrize("keep", [1, 4, 0.1, 0.25, 0.3, 0.5, 0.9, 10_000])
@pytest.mark.parametrize("options", [{}, {"cell": 1.5}, {"recycle": False}, {"alpha": -1.0, "cell": 3}], ids=str)
def test_the_mean_over_layers_is_at_most_what_was_asked(kind, keep, options):
    report, images = images_of(kind, VFlowOpt(keep=keep, **options))
    for image in images:
        counts = [len(kept) for kept in image.kept_per_layer]
        asked = budget_of(keep, image.tokens)
        assert 1 <= sum(counts) / len(counts) <= asked
        assert counts == sorted(counts, reverse=True)
        if keep == 10_000:
            assert counts == [image.tokens] * DECODER_LAYERS
    means = [sum(map(len, image.kept_per_layer)) / DECODER_LAYERS / image.tokens for image in images]
    assert report.achieved_keep == pytest.approx(sum(means) / len(means))


@every_model
@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("recycling", [True, False])
def test_every_token_is_kept_merged_or_dropped_exactly_once(kind, variant, recycling):
    pruner = VFlowOpt(keep=0.3, cell=2.5, recycle=recycling, variant=variant, alpha=0.3)
    for image in images_of(kind, pruner)[1]:
        entering, merged = set(image.kept), [member for merge in image.merged for member in merge.members]
        assert len(merged) == len(set(merged))
        for merge in image.merged:
            assert merge.into in entering
            assert entering & set(merge.members) == {merge.into}
            assert merge.into == merge.members[max(range(len(merge.weights)), key=merge.weights.__getitem__)]
            assert sum(merge.weights) == pytest.approx(1, abs=1e-5)
        gone = set(range(image.tokens)) - entering - set(merged)
        assert bool(merged) == recycling
        assert not gone if recycling else gone
        for before, after in zip(image.kept_per_layer, image.kept_per_layer[1:], strict=False):
            assert set(after) <= set(before)


@every_model
def test_released_keeps_its_share_and_the_recycled_tokens_on_top(kind):
    pruner = VFlowOpt(keep=0.3, first=4 / 3, second=0.9, cell=2.5, variant="released")
    for image in images_of(kind, pruner)[1]:
        _, height, width = image.grid
        nominal = image.tokens - round(image.tokens * 0.6)
        direct = max(0, nominal - int(image.tokens / 2.5**2))
        cells = math.ceil(height / 2.5) * math.ceil(width / 2.5)
        assert direct < len(image.kept) <= direct + cells
        counts = [len(kept) for kept in image.kept_per_layer]
        assert counts[2] == counts[0] - round(counts[0] * (1 - 0.9))
        last = last_ratio(0.3, 0.4, 0.9, stage_layers(DECODER_LAYERS), DECODER_LAYERS)
        assert 0 < last < 1
        assert counts[-1] == max(1, counts[2] - round(counts[2] * (1 - last)))


@every_model
def test_recycling_changes_vectors_and_keeps_as_many_tokens(kind):
    model, inputs = make(kind), prompt(kind, ROWS[kind])
    logits, counts = [], []
    for recycling in (True, False):
        with vtprune.wrapped(model, VFlowOpt(keep=0.3, cell=3.0, recycle=recycling)), torch.no_grad():
            logits.append(model(**inputs).logits)
            counts.append(vtprune.report(model).tokens_per_layer)
    assert counts[0] == counts[1]
    assert not torch.allclose(logits[0], logits[1])


@every_model
def test_it_follows_a_stage_that_drops_tokens_in_the_encoder(kind):
    _, images = images_of(kind, [FlowCut(keep=0.6, stages=1), VFlowOpt(keep=0.3, cell=2.0)])
    for image in images:
        mean = sum(map(len, image.kept_per_layer)) / DECODER_LAYERS
        assert 1 <= mean <= budget_of(0.3, image.tokens)
        assert image.merged


@pytest.mark.parametrize("grid", [(1, 3, 11), (2, 5, 4), (1, 1, 7)])
def test_any_grid_and_several_frames(grid):
    whole = picture_stream(grid, budget=5)
    selection = VFlowOpt(cell=2.0, threshold=1.0).select(whole)
    selection.check(math.prod(grid))
    assert selection.kept.numel() <= 5
    area = grid[1] * grid[2]
    for merge in selection.merged():
        assert len({member // area for member in merge.members}) == 1


def test_a_wrapped_model_saves_the_options_that_were_given(tmp_path):
    pruner = VFlowOpt(keep=0.3, layers=(1, 4), cell=3.0)
    model = vtprune.wrap(make("llava-siglip"), pruner)
    vtprune.save_config(model, tmp_path)
    assert vtprune.load_config(tmp_path) == pruner


@few
@given(
    tokens=st.integers(1, 900),
    depth=st.integers(5, 40),
    keep=st.floats(0.3, 0.9),
    stages=st.integers(1, 4),
    variant=st.sampled_from(["paper", "released"]),
    data=st.data(),
)
def test_any_number_of_stages_meets_the_mean(tokens, depth, keep, stages, variant, data) -> None:
    layers = tuple(sorted(data.draw(st.sets(st.integers(1, depth - 1), min_size=stages, max_size=stages))))
    one_each = tuple(data.draw(st.lists(st.floats(0.8, 1.0), min_size=stages - 1, max_size=stages - 1)))
    second = data.draw(st.sampled_from([None, one_each])) if one_each else None
    pruner = VFlowOpt(keep=keep, first=1.0, layers=layers, second=second, variant=variant).bind(facts(depth))
    counts = pruner.schedule().counts(tokens)
    assert len(counts) == stages + 1
    assert list(counts) == sorted(counts, reverse=True)
    assert counts[-1] >= 1
    assert pruner.drop_layers() == tuple(layer - 1 for layer in layers)
    # Released counts are those of the tokens that are there, recycled ones among them.
    decided = variant == "released" and counts[-1] < tokens
    budgets = [pruner.drop_budget(tokens, layer - 1, counts[0]) for layer in layers]
    assert budgets == ([None] * stages if decided else list(counts[1:]))
    lengths = [end - start for start, end in itertools.pairwise([0, *layers, depth])]
    mean = sum(count * length for count, length in zip(counts, lengths, strict=True)) / depth
    if variant == "paper":
        assert mean <= budget_of(keep, tokens)


def test_a_share_for_all_stages_is_that_share_for_each() -> None:
    for_all = VFlowOpt(keep=0.3, first=1.2, layers=(2, 4, 9), second=0.7).schedule()
    one_each = VFlowOpt(keep=0.3, first=1.2, layers=(2, 4, 9), second=(0.7, 0.7)).schedule()
    assert for_all.counts(576) == one_each.counts(576)
    # 0.36 enters; 0.7 and again 0.7 of it go on.
    assert for_all.counts(1000)[:3] == (360, 252, 176)


@pytest.mark.parametrize("layers", [(2,), (1, 2, 4)])
def test_other_numbers_of_stages_drop_as_masking_does(layers: tuple[int, ...]) -> None:
    kind = "llava-clip"
    model = vtprune.wrap(make(kind), VFlowOpt(keep=0.4, layers=layers))
    difference, report = difference_from_masked(kind, model, prompt(kind, ROWS[kind]))
    assert difference < TOLERANCE
    kept = report.samples[0].images[0].kept_per_layer
    falls = {layer for layer in range(1, len(kept)) if len(kept[layer]) < len(kept[layer - 1])}
    assert falls <= set(layers)
    assert layers[-1] in falls or len(kept[-1]) < 36
