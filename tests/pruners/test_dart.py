"""DART: pivots and what is least like them, by a slow reference; its counts, and the norm before its cosines."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import vtprune
from tests.models import LONG, ROWS, make, prompt
from tests.pruners.test_dual_attention import decoder_layer
from vtprune.errors import ScoreError, VTPruneError
from vtprune.method.facts import ModelFacts
from vtprune.method.views import DecoderLayer
from vtprune.pruners import DART
from vtprune.pruners.dart import choose_pivots, even_takes, least_alike

FACTS = ModelFacts(True, 24, 32, 1)


def shown(*, tokens: int = 20, after: int = 6, budget: int = 12, seed: int = 0, pad: int = 0) -> DecoderLayer:
    """A random layer with hidden states (NaN on padding), and a last norm that weighs their columns unequally."""
    layer = decoder_layer(tokens=tokens, after=after, pad=pad, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(layer.key.shape[1], 6, generator=generator)
    hidden[:pad] = float("nan")
    weight = torch.tensor([5.0, 1.0, 0.1, 1.0, 3.0, 0.2])
    return replace(layer, hidden=hidden, final_norm=lambda states: states * weight, budget=budget)


def slow_kept(layer: DecoderLayer, pivots: int = 4, text_pivots: int = 4) -> list[int]:
    """What stays, token by token, with a set of what is left."""
    assert layer.hidden is not None
    assert layer.final_norm is not None
    image = layer.vision.tolist()
    words = [place for place in layer.text.tolist() if place > image[-1]]
    norm = {place: float(layer.key[:, place].double().abs().sum()) for place in [*image, *words]}
    own = sorted(image, key=lambda place: -norm[place])[: min(pivots, layer.budget)]
    asked = sorted(own + sorted(words, key=lambda place: -norm[place])[:text_pivots])
    share, more = divmod(layer.budget - len(own), len(asked))
    left, kept = set(image) - set(own), set(own)
    states = layer.final_norm(layer.hidden).double()
    for turn, pivot in enumerate(asked):
        cosine = {place: float(torch.cosine_similarity(states[pivot], states[place], dim=0)) for place in left}
        taken = sorted(left, key=lambda place: cosine[place])[: share + (turn < more)]
        left -= set(taken)
        kept |= set(taken)
    return sorted(place - image[0] for place in kept)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("budget", "after"), [(12, 6), (17, 6), (11, 2), (9, 0), (3, 6), (1, 6)])
def test_what_stays_is_pivots_and_what_each_finds_least_like_it(budget: int, after: int, seed: int) -> None:
    """Also with less text than text pivots, with none, and with a budget below the image's pivots."""
    layer = shown(budget=budget, after=after, seed=seed, pad=2)
    selection = DART().prune_decoder(layer)
    assert selection is not None
    assert selection.kept.tolist() == slow_kept(layer)
    assert len(selection.kept) == budget


@pytest.mark.parametrize(("pivots", "text_pivots"), [(1, 0), (2, 7), (20, 1)])
def test_any_number_of_pivots(pivots: int, text_pivots: int) -> None:
    layer = shown()
    selection = DART(pivots=pivots, text_pivots=text_pivots).prune_decoder(layer)
    assert selection is not None
    assert selection.kept.tolist() == slow_kept(layer, pivots, text_pivots)


def test_the_order_of_the_pivots_decides_what_each_of_them_finds() -> None:
    cosines = torch.tensor([[0.1, 0.2, 0.9, 0.5], [0.1, 0.9, 0.2, 0.5]])
    none = torch.zeros(4, dtype=torch.bool)
    assert least_alike(cosines, none, [2, 1]).tolist() == [True, True, True, False]
    assert least_alike(cosines.flip(0), none, [2, 1]).tolist() == [True, True, True, False]
    assert least_alike(cosines, none, [1, 1]).tolist() == [True, False, True, False]
    assert least_alike(cosines.flip(0), none, [1, 1]).tolist() == [True, True, False, False]


def test_ties_go_to_the_first_and_the_first_pivots_take_what_does_not_divide() -> None:
    assert choose_pivots(torch.ones(5), torch.arange(10, 15), 2).tolist() == [10, 11]
    assert least_alike(torch.zeros(1, 4), torch.tensor([True, False, False, False]), [2]).tolist() == [
        True, True, True, False,
    ]  # fmt: skip
    assert even_takes(11, 4) == [3, 3, 3, 2]


def test_states_or_keys_that_are_no_numbers_are_refused() -> None:
    layer = shown()
    assert layer.hidden is not None
    for broken in (
        replace(layer, hidden=layer.hidden * float("inf")),
        replace(layer, key=layer.key * float("nan")),
    ):
        with pytest.raises(ScoreError, match=r"dart: .* of .* token scores are NaN"):
            DART().prune_decoder(broken)


def test_published_and_released_counts() -> None:
    assert DART().bind(FACTS).counts(576, 576) == (576,) * 2 + (128,) * 30
    assert DART(ratio=2 / 3).bind(FACTS).counts(576, 576)[-1] == 192
    # An eighth of the target rounded down, for each of eight pivots, and the four of the image.
    released = DART(variant="released")
    assert [released.released_count(target) for target in (64, 127, 128, 192)] == [68, 124, 132, 196]
    assert released.bind(FACTS).counts(576, 576) == (576,) * 2 + (132,) * 30
    assert DART(ratio=0.05, variant="released").bind(FACTS).counts(20, 20)[-1] == 20


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"pivots": 0}, "pivots is an int of at least 1"),
        ({"text_pivots": -1}, "text_pivots is an int of at least 0"),
        ({"ratio": 0.5, "keep": 0.5}, "keep and ratio contradict each other"),
        ({"schedule": "entropy", "keep": 0.5}, "schedule is one of 'constant'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(VTPruneError, match=f"dart: {says}"):
        DART(**options)


@torch.no_grad()
def test_it_is_shown_the_layers_states_and_the_decoders_last_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen, states = make("llava-clip"), list[DecoderLayer](), list[Tensor]()
    decoder = model.model.language_model
    decoder.norm.weight.data.uniform_(0.5, 2.0)
    decoder.layers[1].register_forward_hook(lambda module, args, output: states.append(output))
    original = DART.prune_decoder
    monkeypatch.setattr(DART, "prune_decoder", lambda self, layer: (seen.append(layer), original(self, layer))[1])
    vtprune.wrap(model, DART(keep=0.6, layers=(2,)))(**prompt("llava-clip", [LONG]))
    (layer,) = seen
    assert layer.hidden is not None
    assert layer.final_norm is not None
    assert torch.equal(layer.final_norm(layer.hidden), decoder.norm(states[0][0]))
    kept = vtprune.report(model).samples[0].images[0].kept_per_layer
    assert kept[2] == kept[-1] == slow_kept(layer)


def test_images_that_share_by_importance_are_refused_since_it_has_no_scores() -> None:
    model = vtprune.wrap(make("qwen2.5-vl"), "dart", keep_prompt=0.5, share="importance")
    with pytest.raises(VTPruneError, match=r"dart does not choose by one score a token.*share='size'"):
        model(**prompt("qwen2.5-vl", ROWS["qwen2.5-vl"]))
