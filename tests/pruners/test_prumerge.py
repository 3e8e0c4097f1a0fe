"""PruMerge: how many tokens stand out, which ones go on, and what flows into them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.streams import few, stream
from vtprune.errors import ScoreError, VTPruneError
from vtprune.evals.speed.launches import counting
from vtprune.method.facts import Work
from vtprune.method.stages import Read
from vtprune.method.views import VisionStream
from vtprune.pruners import PruMerge
from vtprune.pruners.prumerge import outliers, selected


def shown(tokens: int, budget: int = 9, *, prefix: int = 1, group: int = 1, seed: int = 0) -> VisionStream:
    """A stream with the tower's last layer in sight."""
    whole = stream((1, 1, tokens), budget, prefix=prefix, group=group, seed=seed)
    return replace(whole, signals=None, last_signals=whole.signals)


def attention_and_keys(whole: VisionStream) -> tuple[Tensor, Tensor]:
    """What the whole map of one wide head gives to each token, and its keys."""
    signals = whole.last_signals
    assert signals is not None
    query, key = (states.transpose(0, 1).flatten(1) for states in (signals.query, signals.key))
    rows = (query @ key.T * key.shape[1] ** -0.5).softmax(dim=-1)[:, signals.prefix :]
    patches = rows[0] if signals.prefix else rows.mean(dim=0)
    keys = key[signals.prefix :].reshape(-1, signals.group, key.shape[1]).mean(dim=1)
    return patches.reshape(-1, signals.group).mean(dim=1), torch.nn.functional.normalize(keys, dim=1)


# Who is selected


def test_what_lies_above_the_fence_stands_out() -> None:
    attention = np.ones(100, dtype=np.float32)
    attention[[3, 50, 51]] = (9, 8, 7)
    assert outliers(attention) == 3
    assert selected(attention, None, plus=False).tolist() == [3, 50, 51]


def test_where_nothing_stands_out_one_token_does() -> None:
    assert selected(np.ones(20, dtype=np.float32), None, plus=False).tolist() == [0]


def test_plus_adds_a_grid_three_times_as_dense() -> None:
    attention = np.ones(100, dtype=np.float32)
    attention[[3, 50, 51, 52]] = 9
    # Four of 100 are one of 25.
    assert selected(attention, None, plus=True).tolist() == sorted({3, 50, 51, 52, *range(0, 99, 8)})


@few
@given(tokens=st.integers(1, 80), plus=st.booleans(), data=st.data(), seed=st.integers(0, 99))
def test_a_count_is_met_exactly(tokens: int, plus: bool, data: Any, seed: int) -> None:
    count = data.draw(st.integers(1, tokens))
    attention = np.random.default_rng(seed).random(tokens, dtype=np.float32)
    chosen = selected(attention, count, plus=plus).tolist()
    assert chosen == sorted(set(chosen))
    assert len(chosen) == count
    assert set(chosen) >= set(np.argsort(-attention)[: -(-count // 4) if plus else count].tolist())


def test_the_others_of_plus_are_spread_evenly() -> None:
    attention = np.arange(40, 0, -1, dtype=np.float32)
    assert selected(attention, 8, plus=True).tolist() == [0, 1, 2, 8, 14, 21, 27, 33]


# What flows


@few
@given(
    tokens=st.integers(2, 60),
    layout=st.sampled_from([(1, 1), (0, 1), (0, 4)]),
    keep=st.sampled_from([None, 1, 2, 0.3]),
    plus=st.booleans(),
    seed=st.integers(0, 99),
)
def test_each_token_takes_in_those_whose_keys_are_like_its_own(tokens, layout, keep, plus, seed):
    pruner = PruMerge(keep=keep, plus=plus)
    whole = shown(tokens, pruner.budget(tokens), prefix=layout[0], group=layout[1], seed=seed)
    selection = pruner.select(whole)
    attention, keys = attention_and_keys(whole)
    count = None if keep is None else whole.budget - (whole.budget > 1)
    chosen = selected(attention.numpy(), count, plus=plus).tolist()
    rest = [token for token in range(tokens) if token not in chosen]
    extra = rest[-1:] if whole.budget > 1 else []
    assert selection.kept.tolist() == sorted(chosen + extra)
    if not rest:
        assert selection.vectors is None
        return
    for place, token in enumerate(selection.kept.tolist()):
        if token in extra:
            expected = attention[rest] @ whole.features[rest]
        else:
            near = sorted(rest, key=lambda other, one=token: -float(keys[one] @ keys[other]))[:32]
            expected = whole.features[token] + attention[near] @ whole.features[near]
        assert torch.allclose(selection.vectors[place], expected, atol=1e-4)
        merge = next(one for one in selection.merged() if one.into == token)
        parts = torch.tensor(merge.weights) @ whole.features[list(merge.members)]
        assert torch.allclose(parts, expected, atol=1e-4)


def test_no_selected_token_flows_into_another_one() -> None:
    selection = PruMerge(keep=12, plus=True).select(shown(60, 12))
    *own, last = selection.merged()
    into = {merge.into for merge in own}
    assert all(set(merge.members) & into == {merge.into} for merge in own)
    assert not set(last.members) & into
    assert last.into == max(last.members)


def test_without_merging_only_tokens_as_they_are_go_on() -> None:
    selection = PruMerge(keep=9, merge=False).select(shown(30))
    assert selection.kept.numel() == 9
    assert selection.vectors is None
    assert PruMerge(merge=False).input_reads == {Read.LAST_LAYER}


def test_the_attention_is_read_back_and_nothing_else() -> None:
    whole = shown(60)
    with counting() as counts:
        PruMerge(keep=9).select(whole)
    # The keys are checked at once, where no forward collects its checks.
    assert counts.read == 2


def test_nan_raises() -> None:
    whole = shown(30)
    assert whole.last_signals is not None
    whole.last_signals.key[0, 4, 0] = float("nan")
    with pytest.raises(ScoreError, match="prumerge"):
        PruMerge().select(whole)


@pytest.mark.parametrize("option", ["plus", "merge"])
def test_settings_that_make_no_sense_are_refused(option: str) -> None:
    with pytest.raises(VTPruneError, match=f"prumerge: {option} is one of True, False"):
        PruMerge(**{option: 1})


def test_scoring_is_a_row_and_what_flows() -> None:
    work = Work(
        patches=576, tokens=576, shown=576, kept=40,
        encoder_width=1024, encoder_heads=16, decoder_width=4096, decoder_heads=32,
        prompt=600, text=24, encoder_patches=(577,) * 24, encoder_layers=(), decoder_layers=(), has_cls=True,
    )  # fmt: skip
    assert PruMerge().flops(work) == 2 * 577 * 1024 + 2 * 40 * 576 * (1024 + 4096)
    assert PruMerge(merge=False).flops(work) == 2 * 577 * 1024
