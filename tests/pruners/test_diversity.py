"""DivPrune and CDPruner: greedy choices, and the relevance that weighs them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.streams import few, stream
from vtprune.errors import ScoreError, VTPruneError
from vtprune.evals.speed.launches import counting
from vtprune.method.pruner import Tunable
from vtprune.pruners import CDPruner, DivPrune, divprune
from vtprune.pruners.cdpruner import dpp
from vtprune.pruners.cdpruner.dpp import (
    greedy_dpp,
    mean_cosine,
    min_max,
    sharpen,
)
from vtprune.pruners.divprune import max_min_diverse
from vtprune.pruners.parts import cosines


def vectors(tokens: int, width: int = 6, seed: int = 0) -> Tensor:
    """Random vectors."""
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


def farthest(features: Tensor, count: int) -> list[int]:
    """Max-min diversity that reads everything again at every choice."""
    unit = F.normalize(features.double(), dim=-1)
    # A product need not round alike on both sides of the diagonal, where two tokens are each other's nearest.
    cosine = (unit @ unit.T).triu()
    distance = 1 - (cosine + cosine.triu(1).T)
    chosen: list[int] = []
    for _ in range(count):
        others = [token for token in range(len(features)) if token not in chosen]
        nearest = {t: min(float(distance[t, s]) for s in (chosen or range(len(features))) if s != t) for t in others}
        chosen.append(max(others, key=nearest.__getitem__))
    return chosen


def most_determinant(features: Tensor, relevance: Tensor, count: int) -> list[int]:
    """The greedy choice by the determinants themselves."""
    unit = F.normalize(features.double(), dim=-1) * relevance.double()[:, None]
    kernel, chosen = unit @ unit.T, list[int]()
    for _ in range(count):
        others = [token for token in range(len(features)) if token not in chosen]
        chosen.append(max(others, key=lambda t: float(torch.linalg.det(kernel[[*chosen, t]][:, [*chosen, t]]))))
    return chosen


# Max-min diversity


@few
@given(tokens=st.integers(2, 24), width=st.integers(2, 40), data=st.data(), seed=st.integers(0, 99))
def test_the_running_maximum_chooses_what_reading_everything_again_chooses(tokens, width, data, seed):
    count = data.draw(st.integers(1, tokens))
    features = vectors(tokens, width, seed)
    if tokens > 2 or count > 1:  # of two tokens each is the other's nearest
        assert max_min_diverse(features, count).tolist() == farthest(features, count)


def test_chunks_and_rows_choose_as_the_whole_matrix_does(monkeypatch):
    features, relevance = vectors(70, 80), 0.1 + torch.rand(70, generator=torch.Generator().manual_seed(0))

    def chosen() -> list[int]:
        return [*max_min_diverse(features, 30).tolist(), *greedy_dpp(features, relevance, 30)[0].tolist()]

    whole = chosen()
    monkeypatch.setattr(cosines, "CHUNK", 16)
    assert chosen() == whole
    monkeypatch.setattr(dpp, "HOST_WORK", 0)
    assert chosen() == whole
    monkeypatch.setattr(divprune, "fits", lambda tokens: False)
    monkeypatch.setattr(dpp, "fits", lambda tokens: False)
    assert chosen() == whole


def test_all_cosines_and_the_nearest(monkeypatch):
    monkeypatch.setattr(cosines, "CHUNK", 4)
    unit = cosines.unit_vectors(vectors(11), "test")
    matrix, nearest = cosines.cosine_matrix(unit)
    assert torch.allclose(matrix, unit @ unit.T, atol=1e-6)
    assert torch.equal(matrix, matrix.T)
    assert torch.allclose(nearest, (unit @ unit.T).fill_diagonal_(-1).amax(dim=1), atol=1e-6)
    index = torch.tensor([5])
    assert torch.allclose(cosines.cosine_row(unit, index), matrix[5], atol=1e-6)
    assert cosines.matrix_flops(11, 6) == 2 * 6 * (4 * 11 + 4 * 7 + 3 * 3)


@pytest.mark.parametrize("width", [8, 64])
def test_no_token_is_chosen_twice_among_exact_duplicates(width):
    features = vectors(6, width).repeat(4, 1)
    for count in (6, 12, 24):
        for chosen in (max_min_diverse(features, count), greedy_dpp(features, torch.ones(24), count)[0]):
            assert chosen.unique().numel() == count
            assert (chosen[:6] % 6).unique().numel() == 6


@few
@given(seed=st.integers(0, 99), exponent=st.integers(-8, 8))
def test_choices_do_not_depend_on_lengths(seed, exponent):
    features = vectors(20, 7, seed)
    lengths = 2.0 ** torch.randint(-8, 8 + 1, (20, 1), generator=torch.Generator().manual_seed(exponent))
    assert torch.equal(max_min_diverse(features * lengths, 9), max_min_diverse(features, 9))
    relevance = torch.rand(20, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(greedy_dpp(features * lengths, relevance, 5)[0], greedy_dpp(features, relevance, 5)[0])


@few
@given(seed=st.integers(0, 99), count=st.integers(1, 19))
def test_a_smaller_budget_chooses_the_first_of_a_larger_one(seed, count):
    features = vectors(20, 30, seed)
    assert torch.equal(max_min_diverse(features, count), max_min_diverse(features, 20)[:count])
    relevance = 0.1 + torch.rand(20, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(greedy_dpp(features, relevance, count)[0], greedy_dpp(features, relevance, 20)[0][:count])


def test_ties_go_to_the_lowest_index():
    features = torch.eye(8)
    assert max_min_diverse(features, 5).tolist() == [0, 1, 2, 3, 4]
    assert greedy_dpp(features, torch.ones(8), 5)[0].tolist() == [0, 1, 2, 3, 4]


def test_zero_vectors_are_no_reason_for_nan():
    features = vectors(9)
    features[4] = 0
    assert 4 in max_min_diverse(features, 2)
    chosen, gains = greedy_dpp(features, torch.ones(9), 8)
    assert 4 not in chosen[:6]
    assert not gains.isnan().any()


@pytest.mark.parametrize("pruner", [DivPrune(), CDPruner(), CDPruner(variant="released")], ids=repr)
def test_nan_features_raise(pruner):
    whole = stream()
    whole.features[3, 0] = float("nan")
    with pytest.raises(ScoreError, match=pruner.name):
        pruner.select(whole)


def test_one_token_can_be_kept():
    assert max_min_diverse(vectors(1), 1).tolist() == [0]
    assert greedy_dpp(vectors(1), torch.ones(1), 1)[0].tolist() == [0]


# The determinantal point process


@few
@given(tokens=st.integers(2, 12), data=st.data(), seed=st.integers(0, 99))
def test_the_cholesky_form_takes_what_raises_the_determinant_most(tokens, data, seed):
    count = data.draw(st.integers(1, min(tokens, 6)))
    features = vectors(tokens, 12, seed)
    relevance = 0.2 + torch.rand(tokens, generator=torch.Generator().manual_seed(seed))
    chosen, gains = greedy_dpp(features, relevance, count)
    assert chosen.tolist() == most_determinant(features, relevance, count)
    unit = F.normalize(features.double(), dim=-1) * relevance.double()[:, None]
    kernel = unit @ unit.T
    base = torch.linalg.det(kernel[chosen][:, chosen])
    for token in set(range(tokens)) - set(chosen.tolist()):
        more = [*chosen.tolist(), token]
        assert float(gains[token]) == pytest.approx(float(torch.linalg.det(kernel[more][:, more]) / base), abs=1e-4)


def test_beyond_the_rank_choices_stay_distinct_and_finite():
    chosen, gains = greedy_dpp(vectors(30, 4), torch.linspace(0.1, 1, 30), 30)
    assert chosen.unique().numel() == 30
    assert not gains.isnan().any()


def test_a_relevant_token_comes_before_a_different_one():
    features = torch.eye(4)
    relevance = torch.tensor([0.1, 1.0, 0.5, 0.2])
    assert greedy_dpp(features, relevance, 3)[0].tolist() == [1, 2, 3]


# Relevance


def test_constant_relevance_is_one_everywhere():
    assert torch.equal(min_max(torch.full((2, 5), 0.3)), torch.ones(2, 5))
    assert torch.equal(min_max(torch.full((2, 5), 0.3), shared=True), torch.ones(2, 5))
    whole = stream()
    chosen = greedy_dpp(whole.features, torch.ones(36), 9)[0]
    assert torch.equal(CDPruner().select(whole).kept, chosen.sort().values)  # its text is zeros


def test_the_range_is_an_images_own_unless_it_is_shared():
    scores = torch.tensor([[0.0, 1.0], [2.0, 4.0]])
    assert torch.allclose(min_max(scores), torch.tensor([[0.0, 1.0], [0.0, 1.0]]), atol=1e-5)
    assert torch.allclose(min_max(scores, shared=True), torch.tensor([[0.0, 0.25], [0.5, 1.0]]), atol=1e-5)
    assert bool((min_max(scores) > 0).all())


def test_the_mean_over_text_vectors_is_that_of_their_cosines():
    tokens, texts = vectors(9), vectors(3, seed=5)
    expected = F.cosine_similarity(tokens[:, None], texts[None], dim=-1).mean(dim=1)
    assert torch.allclose(mean_cosine(tokens, texts), expected, atol=1e-6)


def test_theta_0_is_diversity_alone_and_more_sharpens():
    relevance = torch.tensor([0.1, 0.5, 1.0])
    assert torch.equal(sharpen(relevance, 0.0), torch.ones(3))
    alpha = 0.8 / 0.4
    assert torch.allclose(sharpen(relevance, 0.8), (alpha * relevance).exp() / math.exp(alpha))
    assert not sharpen(relevance, 0.999).isnan().any()
    whole = replace(stream(), text=vectors(3, 5))
    plain = greedy_dpp(whole.features, torch.ones(36), 9)[0].sort().values
    assert torch.equal(CDPruner(theta=0.0).select(whole).kept, plain)


def test_negate_turns_relevance_round():
    features = torch.cat([torch.eye(4), torch.zeros(4, 1)], dim=1)
    features[:, 4] = torch.tensor([3.0, 2.0, 1.0, 0.5])
    text = torch.tensor([[0.0, 0, 0, 0, 1]])
    whole = replace(stream((1, 2, 2), 1), features=features, text=text)
    assert CDPruner().select(whole).kept.tolist() == CDPruner(negate=False).select(whole).kept.tolist() == [0]
    assert CDPruner(negate=True).select(whole).kept.tolist() == [3]


@pytest.mark.parametrize("pruner", [DivPrune(), CDPruner()], ids=repr)
def test_released_code_renumbers(pruner):
    assert not pruner.renumbers
    assert replace(pruner, variant="released").renumbers
    assert torch.equal(replace(pruner, variant="released").select(stream()).kept, pruner.select(stream()).kept)


def test_what_can_be_tuned():
    assert DivPrune().search_space(576) == CDPruner(variant="released").search_space(576) == {}
    assert CDPruner().search_space(576) == {"theta": Tunable(0.05, 0.95)}


def test_budgets_of_the_papers():
    assert DivPrune().budget(576) == 56
    assert CDPruner().budget(576) == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"theta": 1.0}, "theta is a number of at least 0 and below 1, got 1.0"),
        ({"theta": True}, "theta"),
        ({"theta": float("nan")}, "theta"),
        ({"negate": 1}, "negate is one of None, True, False, got 1"),
        ({"clip": 3}, "clip is a folder, a hub id or a model, got 3"),
        ({"variant": "code"}, "variant is one of 'paper', 'released'"),
    ],
)
def test_bad_options_raise(options, message):
    with pytest.raises(VTPruneError, match=message):
        CDPruner(**options)
    with pytest.raises(VTPruneError, match="divprune: variant"):
        DivPrune(variant="code")


class Reads(TorchDispatchMode):
    """Counts the elements that operations read of tensors of at least `least` elements."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.read = least, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if "index_select" in str(func):
            self.read += result.numel()
        elif not func.is_view:
            whole = [one for one in args if isinstance(one, Tensor) and one.numel() >= self.least]
            self.read += sum(one.numel() for one in whole)
        return result


@pytest.mark.parametrize("method", ["divprune", "cdpruner"])
def test_choices_on_the_host_launch_nothing(method):
    features, relevance = vectors(96, 128), torch.rand(96, generator=torch.Generator().manual_seed(1))
    launched = []
    for picks in (24, 48):
        with counting() as counts:
            max_min_diverse(features, picks) if method == "divprune" else greedy_dpp(features, relevance, picks)
        launched.append((counts.launched, counts.read))
    assert launched[0] == launched[1]


@pytest.mark.parametrize("method", ["divprune", "cdpruner"])
def test_a_greedy_choice_reads_one_row_of_what_was_computed_before(method, monkeypatch):
    tokens, count = 96, 24
    monkeypatch.setattr(dpp, "HOST_WORK", 0)
    monkeypatch.setattr(divprune, "fits", lambda tokens: False)
    features, relevance = vectors(tokens, 128), torch.rand(tokens, generator=torch.Generator().manual_seed(1))

    def read(picks: int) -> int:
        with Reads(tokens * tokens) as reads:
            max_min_diverse(features, picks) if method == "divprune" else greedy_dpp(features, relevance, picks)
        return reads.read

    # CDPruner also reads a column of its factor, no longer than what was chosen; nothing reads the matrix whole.
    # DivPrune, where no matrix is held, computes a row from the vectors, one of which it reads.
    per_choice, width = (read(2 * count) - read(count)) / count, features.shape[1]
    least, most = (tokens, 2 * tokens) if method == "cdpruner" else (width, width + tokens * width)
    assert least <= per_choice <= most
