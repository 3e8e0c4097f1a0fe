"""Turbo: how many tokens merge in a layer, which ones, and with what weights."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import vtprune
from tests.layers import batch_layer, image_states, naive_metric, naive_saliency
from tests.models import MODELS, ROWS, make, prompt
from tests.streams import few
from vtprune.errors import ScoreError, VTPruneError
from vtprune.method.facts import ModelFacts, Work
from vtprune.pruners import Turbo
from vtprune.pruners.parts.bipartite import after, count_now, least

FACTS = ModelFacts(has_cls=True, encoder_depth=23, decoder_depth=32, group=1)


def plan(tokens: int, keep: int, layers: int) -> list[int]:
    """Tokens left after each layer."""
    left = []
    for layer in range(layers):
        tokens -= count_now(tokens, keep, layers - layer)
        left.append(tokens)
    return left


def test_tokens_leave_in_even_shares() -> None:
    assert plan(576, 192, 24) == list(range(560, 191, -16))
    assert plan(36, 18, 5) == [32, 28, 24, 21, 18]


def test_earlier_layers_merge_more_where_later_ones_could_not_catch_up() -> None:
    assert plan(36, 2, 5) == [29, 16, 8, 4, 2]
    assert plan(576, 1, 12)[-4:] == [8, 4, 2, 1]


@few
@given(tokens=st.integers(1, 700), layers=st.integers(1, 24), data=st.data())
def test_the_plan_meets_every_keep_that_halving_can_reach(tokens: int, layers: int, data: Any) -> None:
    keep = data.draw(st.integers(least(tokens, layers), tokens))
    left = [tokens, *plan(tokens, keep, layers)]
    assert left[-1] == keep
    assert all(0 <= a - b <= a // 2 for a, b in itertools.pairwise(left))
    assert after(tokens, [tokens] * layers) == least(tokens, layers)


def test_the_released_runs() -> None:
    # BLIP, ViT-B/16 at 384: 577 tokens with CLS come to 217 at r=30.
    assert Turbo(r=30, layers=12).budget(576) == 216 == Turbo().budget(576)
    assert Turbo(r=40, layers=12).budget(576) == 96


# Against a plain reference of the method's description


def reference(
    image: Tensor, sizes: Tensor, count: int, coefficient: float, *, prefix: int, group: int
) -> dict[int, int]:
    """{source: destination} of one image."""
    value = naive_saliency(image, prefix=prefix, group=group, sizes=sizes)
    metric = naive_metric(image, prefix=prefix, group=group)
    # Positions with CLS in front: the even ones may flow into the odd ones.
    sources = [token for token in range(len(value)) if (token + prefix) % 2 == 0]
    others = [token for token in range(len(value)) if token not in sources]
    edges = []
    for token in sources:
        cosines = [float(metric[token] @ metric[other]) for other in others]
        best = max(range(len(others)), key=lambda number: cosines[number])
        edges.append((cosines[best] - coefficient * float(value[token]), token, others[best]))
    return {token: other for _, token, other in sorted(edges, key=lambda edge: -edge[0])[:count]}


@few
@given(
    sizes=st.lists(st.integers(2, 25), min_size=1, max_size=4),
    layout=st.sampled_from([(1, 1), (0, 1), (0, 4)]),
    alpha=st.sampled_from([0.0, 1.0, 5.0]),
    beta=st.sampled_from([1.0, 0.5]),
    index=st.integers(0, 5),
    seed=st.integers(0, 999),
)
def test_each_image_of_a_batch_merges_as_described(sizes, layout, alpha, beta, index, seed):
    prefix, group = layout
    images = [image_states(n, prefix=prefix, group=group, seed=seed + row) for row, n in enumerate(sizes)]
    generator = torch.Generator().manual_seed(seed)
    stands_for = [torch.randint(1, 6, (n,), generator=generator).float() for n in sizes]
    budgets = [max(least(n, 6 - index), n // 2) for n in sizes]
    pruner = Turbo(alpha=alpha, beta=beta, gamma=2.0)
    layer = batch_layer(images, budgets, prefix=prefix, group=group, index=index, depth=6, sizes=stands_for)
    if not bool((layer.valid.sum(dim=1) > layer.budget).any()):
        return
    selection = pruner.prune_encoder(layer)
    for row, (image, own) in enumerate(zip(images, stands_for, strict=True)):
        count = count_now(sizes[row], budgets[row], 6 - index)
        coefficient = 30 * alpha * beta ** abs(2 - index)
        expected = reference(image, own, count, coefficient, prefix=prefix, group=group)
        valid = range(sizes[row])
        assert {t: int(selection.into[row, t]) for t in valid if not selection.keep[row, t]} == expected
        for kept in (token for token in valid if token not in expected):
            members = [kept, *(token for token, other in expected.items() if other == kept)]
            weights = own[members] / own[members].sum()
            assert torch.allclose(selection.weights[row, members], weights)
            assert int(selection.into[row, kept]) == kept


def test_without_merging_the_sources_are_dropped() -> None:
    layer = batch_layer([image_states(20, prefix=1, group=1, seed=1)], [15], prefix=1, group=1)
    merged, plain = (Turbo(merge=merge).prune_encoder(layer) for merge in (True, False))
    assert torch.equal(merged.keep, plain.keep)
    assert merged.settled().flows
    assert not plain.flows
    assert Turbo().weighs_keys
    assert not Turbo(merge=False).weighs_keys


def test_tokens_that_matter_do_not_flow() -> None:
    image = image_states(12, prefix=1, group=1, seed=5)
    layer = batch_layer([image], [9], prefix=1, group=1)
    value = naive_saliency(image, prefix=1, group=1)
    gone = ~Turbo(alpha=1e6).prune_encoder(layer).keep[0]
    sources = torch.arange(1, 12, 2)
    assert gone.nonzero().flatten().tolist() == sorted(sources[value[sources].argsort()[:3]].tolist())


def test_nan_raises_but_nan_padding_does_not() -> None:
    images = [image_states(n, prefix=0, group=1, seed=n) for n in (12, 9)]
    layer = batch_layer(images, [8, 8], prefix=0, group=1)
    layer.key[1, :, 9:] = layer.query[1, :, 9:] = float("nan")
    assert not bool(Turbo().prune_encoder(layer).keep[1, 9:].any())
    layer.key[0, 0, 3] = float("nan")
    with pytest.raises(ScoreError, match="turbo"):
        Turbo().prune_encoder(layer)


# What cannot be met


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1.0}, "alpha is a finite number"),
        ({"beta": float("nan")}, "beta is a finite number"),
        ({"r": 0}, "r is an int of at least 1"),
        ({"layers": True}, "layers is an int of at least 1"),
        ({"merge": 1}, "merge is one of True, False"),
        ({"r": 30, "keep": 64}, "keep=64 contradicts it"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(VTPruneError, match=message):
        Turbo(**options)


def test_an_encoder_that_is_too_shallow_is_refused_by_name() -> None:
    assert Turbo(keep=0.1).bind(FACTS).layers == 23
    assert Turbo(keep=0.1, layers=4).bind(FACTS).layers == 4
    with pytest.raises(VTPruneError, match=r"3 encoder layers .* keep=0.1; the smallest that works is 0.125"):
        Turbo(keep=0.1).bind(replace(FACTS, encoder_depth=3))
    with pytest.raises(VTPruneError, match="layers=24, but only 23"):
        Turbo(layers=24).bind(FACTS)
    with pytest.raises(VTPruneError, match="wrap a model, or set layers"):
        Turbo(r=3).budget(36)


def test_a_count_out_of_reach_names_the_least_that_works() -> None:
    inputs = prompt("llava-clip", ROWS["llava-clip"])
    model = vtprune.wrap(make("llava-clip"), Turbo(keep=1))
    with pytest.warns(vtprune.KeptWholeWarning, match=r"cannot leave 1 of 36; the smallest keep that .* is 2"):
        model(**inputs)
    image = vtprune.report(model).samples[0].images[0]
    assert image.kept == list(range(36))
    assert "the smallest keep" in image.kept_whole


# In a model


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("keep", [2, 4, 0.3, 10_000])
def test_exactly_what_was_asked_is_left(kind: str, keep: int | float) -> None:
    model = vtprune.wrap(make(kind), Turbo(keep=keep))
    with torch.no_grad():
        model(**prompt(kind, ROWS[kind]))
    for sample in vtprune.report(model).samples:
        for image in sample.images:
            asked = min(keep, image.tokens) if isinstance(keep, int) else max(1, round(keep * image.tokens))
            assert len(image.kept) == asked


@pytest.mark.parametrize("kind", MODELS)
def test_every_token_is_in_one_group_with_an_equal_share(kind: str) -> None:
    model = vtprune.wrap(make(kind), Turbo(keep=0.4))
    with torch.no_grad():
        model(**prompt(kind, ROWS[kind]))
    for sample in vtprune.report(model).samples:
        for image in sample.images:
            groups = {merge.into: list(merge.members) for merge in image.merged}
            alone = [[token] for token in image.kept if token not in groups]
            assert sorted(itertools.chain(*groups.values(), *alone)) == list(range(image.tokens))
            for merge in image.merged:
                assert merge.into == min(merge.members)
                assert list(merge.weights) == pytest.approx([1 / len(merge.members)] * len(merge.members), rel=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_r_merges_as_many_in_each_layer(kind: str) -> None:
    model = vtprune.wrap(make(kind), Turbo(r=3, layers=4))
    with torch.no_grad():
        model(**prompt(kind, ROWS[kind]))
    for sample in vtprune.report(model).samples:
        for image in sample.images:
            assert len(image.kept) == after(image.tokens, [3] * 4)


def test_scoring_is_a_row_and_the_similarities_of_every_layer() -> None:
    work = Work(
        patches=576, tokens=576, shown=576, kept=64,
        encoder_width=1024, encoder_heads=16, decoder_width=4096, decoder_heads=32,
        prompt=600, text=24, encoder_patches=(577, 301), encoder_layers=(0, 1), decoder_layers=(), has_cls=True,
    )  # fmt: skip
    expected = sum(2 * n * 1024 + 2 * ((n - 1) // 2) ** 2 * 64 for n in (577, 301))
    assert Turbo().flops(work) == expected
