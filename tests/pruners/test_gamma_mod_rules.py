"""gamma-MoD's rules, on tokens whose p is known: what is computed, what the loss is, which settings are refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vtprune
from tests.matrix import at_depth
from tests.models import ROWS, make, prompt
from vtprune.method.facts import ModelFacts
from vtprune.method.views import RoutedTokens
from vtprune.pruners.gamma_mod import GammaMoD


def tokens_of(
    hidden: Tensor, image: list[list[int]], budgets: list[list[int]], *, padding: int = 0, training: bool = False
) -> RoutedTokens:
    """Tokens of a layer whose norm changes nothing, under a router that reads p off their first value."""
    module = nn.Linear(hidden.shape[-1], 2, bias=False)
    with torch.no_grad():
        module.weight.zero_()
        module.weight[1, 0] = 1.0
    real = torch.ones(hidden.shape[:2], dtype=torch.bool)
    real[:, :padding] = False
    count = torch.tensor(budgets)
    numbers = torch.tensor(image)
    return RoutedTokens(
        hidden=hidden, norm=lambda states: states, real=real, image=numbers, text=numbers < 0, totals=count,
        budgets=count, index=1, depth=5, module=module, training=training,
    )  # fmt: skip


def states(logits: list[float]) -> Tensor:
    """(1, n, 2) hidden states whose p is the sigmoid of these."""
    return torch.tensor([[[value, 0.0] for value in logits]])


def test_ties_go_to_the_first_tokens_and_text_is_never_skipped() -> None:
    tokens = tokens_of(states([-9, 1, 1, 1, -9, 2, 3, -9]), [[-1, 0, 0, 0, -1, 1, 1, -1]], [[2, 1]])
    routes = GammaMoD().route(tokens)
    assert routes.computed(tokens.hidden).mask.tolist() == [[True, True, True, False, True, False, True, True]]
    assert routes.scale is None
    assert routes.loss is None
    assert routes.gate is not None
    assert float(routes.gate[0, 6].detach()) == pytest.approx(1 / (1 + math.exp(-3)))


def test_the_loss_is_the_cross_entropy_over_the_images() -> None:
    logits = [0.5, 1.0, -1.0, 2.0, 0.0]
    tokens = tokens_of(states(logits), [[-1, 0, 0, 0, -1]], [[1]], training=True)
    loss = GammaMoD(loss_weight=0.1).route(tokens).loss
    p = [1 / (1 + math.exp(-value)) for value in logits]
    expected = -(math.log(p[3]) + math.log(1 - p[1]) + math.log(1 - p[2])) / 3
    assert loss is not None
    assert float(loss.detach()) == pytest.approx(0.1 * expected, rel=1e-5)
    text = tokens_of(states(logits), [[-1] * 5], [[0]], training=True)
    assert GammaMoD().route(text).loss is None


@pytest.mark.parametrize("padding", [0, 2])
def test_released_training_skips_half_of_what_stands_before_the_question(padding: int) -> None:
    # One system token, five of an image, two of the question: c = 6, n = 8.
    logits = [0.0] * padding + [-5, 4, -3, 2, -1, 0, -9, -9]
    image = [-1] * padding + [-1, 0, 0, 0, 0, 0, -1, -1]
    tokens = tokens_of(states(logits), [image], [[0]], padding=padding, training=True)
    routes = GammaMoD(variant="released").route(tokens)
    kept = [False, True, False, True, False, True, True, True]
    assert routes.computed(tokens.hidden).mask.tolist() == [[True] * padding + kept]
    terms = [
        math.log1p(math.exp(-value if stays else value)) for value, stays in zip(logits[padding:], kept, strict=True)
    ]
    assert routes.loss is not None
    assert float(routes.loss.detach()) == pytest.approx(0.01 * sum(terms) / 8, rel=1e-5)


def test_released_training_skips_nothing_where_the_image_ends_the_prompt_or_there_is_none() -> None:
    for image in ([-1, 0, 0, 0], [-1] * 4):
        tokens = tokens_of(states([0.0, 1, 2, 3]), [image], [[0]], training=True)
        assert GammaMoD(variant="released").route(tokens).kept.all()


def test_a_keep_in_the_released_variant_ranks_the_prompt() -> None:
    tokens = tokens_of(states([-9, 3, 2, 1, -9]), [[-1, 0, 0, 0, -1]], [[1]])
    pruner = GammaMoD(variant="released", keep=0.6)
    assert pruner.route(tokens).kept.tolist() == [[True, True, False, False, True]]
    training = tokens_of(states([-9, 3, 2, 1, -9]), [[-1, 0, 0, 0, -1]], [[1]], training=True)
    # The system token may lose there, as in the published capacity.
    assert pruner.route(training).kept.tolist() == [[False, True, True, False, True]]


def test_not_a_number_is_refused_by_name_but_not_in_padding() -> None:
    broken = states([0.0, math.nan, 1.0])
    with pytest.raises(vtprune.ScoreError, match="gamma_mod: 1 of 3"):
        GammaMoD().route(tokens_of(broken, [[-1, 0, 0]], [[1]]))
    broken = states([math.nan, 0.0, 1.0])
    assert GammaMoD().route(tokens_of(broken, [[-1, 0, 0]], [[1]], padding=1)).kept.tolist() == [[True, False, True]]


@pytest.mark.parametrize(
    ("depth", "routed"), [(32, range(3, 31)), (40, range(4, 39)), (6, range(1, 5)), (5, range(1, 4)), (3, range(1, 2))]
)
def test_the_published_layers_at_other_depths(depth: int, routed: range) -> None:
    assert at_depth(GammaMoD(), depth).routed_layers() == tuple(routed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (0, 1)}, "layer 0 computes everything"),
        ({"layers": ()}, "rising ints"),
        ({"layers": (3, 2)}, "rising ints"),
        ({"layers": (True, 2)}, "rising ints"),
        ({"layers": 3}, "rising ints"),
        ({"skip": 1.0}, "skip is a number between 0 and 1"),
        ({"skip": math.nan}, "skip is a number between 0 and 1"),
        ({"skip": 0.5, "keep": 0.6}, "contradict"),
        ({"threshold": 0.1}, "variant='released'"),
        ({"threshold": 0.1, "variant": "released", "keep": 0.6}, "contradict"),
        ({"threshold": True, "variant": "released"}, "threshold is a number"),
        ({"loss_weight": -0.1}, "loss_weight is a finite number"),
        ({"loss_weight": True}, "loss_weight is a finite number"),
        ({"loss_weight": math.inf}, "loss_weight is a finite number"),
        ({"variant": "mgm"}, "variant is one of"),
        ({"keep": 0}, "keep takes"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(vtprune.VTPruneError, match=message):
        GammaMoD(**options)


def test_settings_that_a_model_cannot_meet_are_refused() -> None:
    facts = ModelFacts(True, 5, 5, 1, decoder_width=32)
    with pytest.raises(vtprune.VTPruneError, match="layer 5"):
        GammaMoD(layers=(2, 5)).bind(facts)
    with pytest.raises(vtprune.VTPruneError, match=r"cannot keep 0\.4 of the tokens on average: the 2 of 5 layers"):
        GammaMoD(keep=0.4).bind(facts)
    with pytest.raises(vtprune.VTPruneError, match="at least 3"):
        GammaMoD().bind(ModelFacts(True, 5, 2, 1))
    # A count of tokens is another share of every image: one that it cannot be met for is kept whole.
    model = vtprune.wrap(make("llava-clip"), GammaMoD(keep=9))
    with torch.no_grad():
        model(**prompt("llava-clip", ROWS["llava-clip"][:1]))
    image = vtprune.report(model).samples[0].images[0]
    assert {len(kept) for kept in image.kept_per_layer} == {36}
    assert "gamma_mod cannot keep 9 of 36 tokens" in image.notes[0]
