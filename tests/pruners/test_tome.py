"""ToMe: its schedules, and that it is Turbo without semantic value."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

import vtprune
from tests.flop_helper import counter
from tests.layers import batch_layer, image_states
from tests.models import ROWS, make, prompt
from vtprune.errors import ScoreError, VTPruneError
from vtprune.method.facts import ModelFacts, Work
from vtprune.pruners import ToMe, Turbo
from vtprune.pruners.tome import schedule

FACTS = ModelFacts(has_cls=True, encoder_depth=23, decoder_depth=32, group=1)


def test_r_is_the_mean_of_every_schedule() -> None:
    assert schedule(8, 0.0, 12) == (8,) * 12
    assert schedule(8, -1.0, 12) == (16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0)
    assert schedule(8, 1.0, 12) == tuple(reversed(schedule(8, -1.0, 12)))
    assert schedule(8, 1.0, 1) == (0,)
    assert schedule((3, 2), 0.0, 4) == (3, 2, 0, 0)


@pytest.mark.parametrize("layout", [(1, 1), (0, 1), (0, 4)])
def test_it_merges_as_turbo_does_where_nothing_is_worth_more(layout: tuple[int, int]) -> None:
    prefix, group = layout
    images = [image_states(n, prefix=prefix, group=group, seed=n) for n in (21, 14)]
    sizes = [torch.arange(1.0, 22), torch.arange(1.0, 15)]
    layer = batch_layer(images, [15, 8], prefix=prefix, group=group, sizes=sizes)
    found, wanted = ToMe().prune_encoder(layer), Turbo(alpha=0.0).prune_encoder(layer)
    assert torch.equal(found.into, wanted.into)
    assert torch.equal(found.weights, wanted.weights)
    assert found.counts == wanted.counts == (15, 8)


def test_each_layer_merges_what_its_schedule_says() -> None:
    pruner = ToMe(r=(4, 0, 30)).bind(replace(FACTS, encoder_depth=3))
    assert pruner.budget(40) == 18
    for index, left in enumerate((36, 40, 20)):
        layer = batch_layer(
            [image_states(40, prefix=1, group=1, seed=1)], [18], prefix=1, group=1, index=index, depth=3
        )
        assert pruner.prune_encoder(layer).counts == (left,)


def test_nan_raises_but_nan_padding_does_not() -> None:
    images = [image_states(n, prefix=0, group=1, seed=n) for n in (12, 9)]
    layer = batch_layer(images, [8, 8], prefix=0, group=1)
    layer.key[1, :, 9:] = float("nan")
    assert not bool(ToMe().prune_encoder(layer).keep[1, 9:].any())
    layer.key[0, 0, 3] = float("nan")
    with pytest.raises(ScoreError, match="tome"):
        ToMe().prune_encoder(layer)


def test_without_proportional_attention_no_key_weighs_more() -> None:
    assert ToMe().weighs_keys
    assert not ToMe(proportional=False).weighs_keys


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r is an int of at least 1"),
        ({"r": ()}, "r is an int of at least 1, or ints"),
        ({"r": (3, -1)}, "r is an int of at least 1, or ints"),
        ({"r": 8, "inflect": 1.5}, "inflect is a number from -1 to 1"),
        ({"inflect": 1.0}, "inflect=1.0 bends a schedule of r"),
        ({"r": (3, 2), "inflect": 1.0}, "inflect=1.0 bends a schedule of r"),
        ({"r": 8, "keep": 64}, "r=8 decides how many tokens are left"),
        ({"layers": 0}, "layers is an int of at least 1"),
        ({"proportional": 1}, "proportional is one of True, False"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(VTPruneError, match=f"tome: {message}"):
        ToMe(**options)


def test_more_numbers_than_layers_are_refused() -> None:
    with pytest.raises(VTPruneError, match="r has 3 numbers, but only 2 encoder layers merge"):
        ToMe(r=(1, 1, 1), layers=2).bind(FACTS)
    with pytest.raises(VTPruneError, match=r"tome: 3 encoder layers .* keep=0.1; the smallest that works is 0.125"):
        ToMe(keep=0.1).bind(replace(FACTS, encoder_depth=3))


def test_scoring_is_the_similarities_of_every_layer() -> None:
    work = Work(
        patches=576, tokens=576, shown=576, kept=64,
        encoder_width=1024, encoder_heads=16, decoder_width=4096, decoder_heads=32,
        prompt=600, text=24, encoder_patches=(577, 301), encoder_layers=(0, 1), decoder_layers=(), has_cls=True,
    )  # fmt: skip
    assert ToMe().flops(work) == sum(2 * ((n - 1) // 2) ** 2 * 64 for n in (577, 301))


@pytest.mark.parametrize("pruner", [ToMe(keep=0.5), Turbo(keep=0.5)])
@pytest.mark.parametrize("kind", ["llava-clip", "llava-siglip"])
def test_the_layer_past_the_features_costs_what_it_computes(kind: str, pruner: ToMe) -> None:
    model = vtprune.wrap(make(kind), pruner)
    with torch.no_grad(), counter() as count:
        model(**prompt(kind, ROWS[kind][:1]))
    counted = {name: sum(kinds.values()) for name, kinds in count.get_flop_counts().items()}
    part = re.compile(r"vision_tower.*(patch_embedding|layers\.\d+\.(self_attn|mlp))$|vision_tower\.head$")
    tower = sum(flops for name, flops in counted.items() if part.search(name))
    assert vtprune.report(model).flops_breakdown.vision_tower == tower
