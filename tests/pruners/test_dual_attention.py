"""MustDrop's filters: the text's attention to an image, the key set, and the schedule that meets a budget."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.matrix import at_depth
from tests.streams import few, stream
from vtprune.method.views import DecoderLayer
from vtprune.pruners import MustDrop
from vtprune.pruners.mustdrop import filters as dual
from vtprune.pruners.parts.prompt_attention import attention_to_image


def decoder_layer(*, before: int = 3, tokens: int = 8, after: int = 4, pad: int = 0, seed: int = 0) -> DecoderLayer:
    """A random layer: padding (NaN), text, an image, text; the first two tokens are the key set."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(3, 2, pad + before + tokens + after, 4, generator=generator)
    states[:, :, :pad] = float("nan")
    vision = pad + before + torch.arange(tokens)
    text = torch.cat([pad + torch.arange(before), pad + before + tokens + torch.arange(after)])
    key = torch.arange(tokens) < 2
    return DecoderLayer(
        *states, vision, states.shape[2] - 1, 0.5, tokens, torch.arange(tokens), tokens, 2, 32, text,
        {"key": key, "entering": tokens, "saliency": torch.zeros(tokens)}, first=pad,
    )  # fmt: skip


def naive_attention(layer: DecoderLayer, rows: list[int], first: int) -> Tensor:
    """(T, N) head-mean causal attention, a row and a head at a time."""
    found = []
    for row in rows:
        heads = []
        for query, key in zip(layer.query.double(), layer.key.double(), strict=True):
            weights = (key[first : row + 1] @ query[row] * layer.scale).softmax(dim=0)
            heads.append(torch.stack([weights[at - first] if at <= row else weights[0] * 0 for at in layer.vision]))
        found.append(torch.stack(heads).mean(dim=0))
    return torch.stack(found)


@pytest.mark.parametrize("pad", [0, 2])
def test_the_texts_rows_are_the_layers_own_causal_attention(pad: int) -> None:
    layer = decoder_layer(pad=pad, before=2)
    rows = dual.rows_after(layer, text_only=True)
    assert list(rows) == [pad + 10, pad + 11, pad + 12, pad + 13]
    want = naive_attention(layer, list(rows), pad)
    assert torch.allclose(attention_to_image(layer, rows).double(), want, atol=1e-6)


def test_rows_are_text_after_the_image_or_all_tokens_after_it_or_the_last_one() -> None:
    layer = replace(decoder_layer(after=4), text=torch.tensor([0, 1, 2, 13, 14]), after=-1)
    assert list(dual.rows_after(layer, text_only=True)) == [13, 14]
    assert list(dual.rows_after(layer, text_only=False)) == [11, 12, 13, 14]
    last = decoder_layer(after=0)
    assert list(dual.rows_after(last, text_only=True)) == [10]
    assert list(dual.rows_after(last, text_only=False)) == [10]


@few
@given(seed=st.integers(0, 99), first=st.floats(0, 0.3), second=st.floats(0, 0.3))
def test_a_token_goes_that_is_below_both_thresholds_and_no_key_token(seed, first, second):
    layer = decoder_layer(seed=seed)
    attention = attention_to_image(layer, dual.rows_after(layer, text_only=True))
    sums = attention.sum(dim=0).tolist()
    stays = []
    for token in range(8):
        low = sums[token] < first * float(attention.sum()) - 1e-9
        stays.append(token < 2 or not (low and float(attention[:, token].max()) < second))
    pruner = MustDrop(global_threshold=first, individual_threshold=second)
    assert pruner.prune_decoder(layer).kept.tolist() == [token for token in range(8) if stays[token]]


def test_thresholds_of_zero_drop_nothing_and_high_ones_leave_the_key_set() -> None:
    layer = decoder_layer()
    nothing = MustDrop(global_threshold=0, individual_threshold=0).prune_decoder(layer)
    assert nothing.kept.tolist() == list(range(8))
    high = MustDrop(global_threshold=2, individual_threshold=2)
    assert high.prune_decoder(layer).kept.tolist() == [0, 1]
    best = attention_to_image(layer, dual.rows_after(layer, text_only=True)).sum(dim=0).argmax()
    no_key = {**layer.memory, "key": torch.zeros(8, dtype=torch.bool)}
    assert high.prune_decoder(replace(layer, memory=no_key)).kept.tolist() == [int(best)]


def test_ranking_is_raising_both_thresholds_together() -> None:
    attention = 0.05 * torch.rand(5, 20, generator=torch.Generator().manual_seed(1)) ** 3
    factor = dual.threshold_factor(attention)
    for count in range(1, 20):
        edge = float(factor.sort(descending=True).values[count - 1 : count + 1].mean())
        passed = dual.passes(attention, edge * dual.GLOBAL, edge * dual.INDIVIDUAL)
        assert passed.nonzero().flatten().tolist() == dual.top_with_key(factor, factor < 0, count, 0).tolist()
    assert bool(torch.isfinite(dual.threshold_factor(torch.zeros(2, 3))).all())


def test_the_key_set_is_certain_of_half_the_places() -> None:
    scores, key = torch.tensor([1.0, 9, 2, 8, 3, 7]), torch.tensor([1, 0, 1, 0, 1, 0]).bool()
    held = 3
    assert dual.top_with_key(scores, key, 6, held).tolist() == [0, 1, 2, 3, 4, 5]
    assert dual.top_with_key(scores, key, 4, held).tolist() == [1, 2, 3, 4]
    assert dual.top_with_key(scores, key, 2, held).tolist() == [1, 4]
    assert dual.top_with_key(scores, key, 1, held).tolist() == [1]


def test_key_set_is_the_salient_share_rounded_up() -> None:
    shown = replace(stream((1, 5, 5)), last_signals=stream((1, 5, 5)).signals)
    memory = MustDrop().remember(shown)
    assert memory["key"].nonzero().flatten().tolist() == sorted(memory["saliency"].topk(2).indices.tolist())
    assert int(MustDrop(key_share=0.0).remember(shown)["key"].sum()) == 0
    assert int(MustDrop(key_share=1.0).remember(shown)["key"].sum()) == 25
    assert int(dual.key_set(torch.rand(576), 0.08).sum()) == 47


@pytest.mark.parametrize(
    ("depth", "layers"),
    [(3, (1,)), (5, (1, 2)), (16, (1, 3, 5, 7)), (28, (2, 5, 9, 12)), (32, (2, 6, 10, 14)), (40, (3, 8, 13, 18))],
)
def test_filter_layers_are_fractions_of_the_depth(depth: int, layers: tuple[int, ...]) -> None:
    assert at_depth(MustDrop(), depth).drop_layers() == layers
    assert at_depth(MustDrop(), depth).cut_caches() == tuple(range(layers[0], layers[-1] + 1))
    assert at_depth(MustDrop(cut_cache=False), depth).cut_caches() == ()
    assert sum(dual.stage_lengths(layers, depth)) == depth


@few
@given(alive=st.integers(1, 3000), budget=st.integers(1, 3000), depth=st.integers(3, 48))
def test_the_schedule_meets_the_budget_and_wastes_little(alive, budget, depth):
    lengths = dual.stage_lengths(dual.filter_layers(depth), depth)
    entered = dual.most_entering(alive, budget, lengths)
    counts = dual.schedule(entered, budget, lengths)
    assert counts[0] == entered <= alive
    assert list(counts) == sorted(counts, reverse=True)
    assert min(counts) >= 1
    mean = sum(c * n for c, n in zip(counts, lengths, strict=True)) / depth
    assert mean <= budget
    if alive > budget:
        # Rounding down costs a token a stage at the most; entering one more would cost a whole one.
        assert mean > 0.9 * budget - len(counts) - 1


def test_published_budgets_at_576_tokens() -> None:
    lengths = (3, 4, 4, 4, 17)
    assert [dual.most_entering(576, budget, lengths) for budget in (192, 128, 64)] == [576, 543, 271]
    assert dual.schedule(576, 192, lengths)[0] == 576
    assert dual.schedule(192, 192, lengths) == (192,) * 5


def test_images_before_all_text_take_part_in_the_softmax() -> None:
    whole = decoder_layer(before=0)
    # The first three of the image's tokens belong to an image before it.
    layer = replace(whole, vision=whole.vision[3:], indices=torch.arange(5), total=5)
    rows = dual.rows_after(layer, text_only=True)
    want = naive_attention(whole, list(rows), 0)[:, 3:]
    assert torch.allclose(attention_to_image(layer, rows).double(), want, atol=1e-6)
