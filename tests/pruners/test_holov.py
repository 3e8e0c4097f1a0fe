"""HoloV: crops, quotas and the released strips; crops of large images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.golden.anyres import restore_crops, unpad_mask
from tests.streams import few, stream
from vtprune.pruners import HoloV
from vtprune.pruners.holov import (
    capped_quotas,
    crops_of,
    diversity,
    holistic_score,
    select_crops,
    select_strips,
)


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
    assert len(set(crops_of((2, 4, 4), 4).tolist())) == 32
    assert np.bincount(crops_of((1, 24, 24), 4)).tolist() == [36] * 16


def test_holov_gives_every_crop_its_share():
    attention = torch.full((16,), 0.01)
    attention[[2, 3, 6, 7]] = 0.019
    crops = crops_of((1, 4, 4), 2)
    kept = select_crops(torch.eye(16), attention, crops, 5)
    assert np.bincount(crops[kept.numpy()]).tolist() == [1, 2, 1, 1]
    sharper = select_crops(torch.eye(16), attention, crops, 5, tau=9.0)
    assert np.bincount(crops[sharper.numpy()]).tolist() == [1, 4]


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
    assert HoloV(variant="released").renumbers
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
