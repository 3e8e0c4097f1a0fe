"""A routed layer takes the norm that its method asked for, and only where that is the norm it would have made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import vtprune
from tests.models import ROWS, make, prompt
from vtprune.method.answers import Routes
from vtprune.method.registry import register
from vtprune.method.stages import InLayers
from vtprune.method.views import RoutedTokens


def _nothing(tokens: RoutedTokens) -> None:
    """Asks for no norm."""


def _its_own(tokens: RoutedTokens) -> None:
    tokens.norm(tokens.hidden)


def _anothers(tokens: RoutedTokens) -> None:
    tokens.norm(tokens.hidden)
    tokens.norm(-tokens.hidden)


def _a_part(tokens: RoutedTokens) -> None:
    tokens.norm(tokens.hidden)
    tokens.norm(tokens.hidden[:, 2:])


def _changed(tokens: RoutedTokens) -> None:
    normed = tokens.norm(tokens.hidden)
    normed.sub_(normed.mean(dim=-1, keepdim=True))


def _without_gradients(tokens: RoutedTokens) -> None:
    with torch.no_grad():
        tokens.norm(tokens.hidden)


@register("test_norms", needs="nothing")
@dataclass(frozen=True)
class Norms(InLayers):
    """Routes by the length of hidden states, and asks for norms on the side."""

    default_keep = 0.5
    asks: ClassVar[Callable[[RoutedTokens], None]] = staticmethod(_nothing)

    def routed_layers(self) -> tuple[int, ...]:
        return (1, 2)

    def routed_budget(self, tokens: int, layer: int, entered: int) -> int:
        return max(1, self.budget(entered))

    def route(self, tokens: RoutedTokens) -> Routes:
        scores = torch.linalg.vector_norm(tokens.hidden, dim=-1)
        type(self).asks(tokens)
        return tokens.best(scores)


def logits(monkeypatch: pytest.MonkeyPatch, asks: Callable[[RoutedTokens], None], rows: int) -> tuple[Tensor, Tensor]:
    """The logits of a prompt, and the gradient of a routed layer's norm."""
    monkeypatch.setattr(Norms, "asks", staticmethod(asks))
    model = vtprune.wrap(make("llava-clip"), Norms())
    inputs = prompt("llava-clip", ROWS["llava-clip"][:rows])
    with torch.no_grad():
        found = model(**inputs).logits
    model(**inputs).logits.square().mean().backward()
    grad = model.model.language_model.layers[1].input_layernorm.weight.grad
    assert grad is not None
    vtprune.unwrap(model)
    return found, grad


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("asks", [_its_own, _anothers, _a_part, _without_gradients])
def test_what_a_method_norms_changes_nothing(
    asks: Callable[[RoutedTokens], None], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, gradient = logits(monkeypatch, _nothing, rows)
    found, own = logits(monkeypatch, asks, rows)
    torch.testing.assert_close(found, plain, atol=1e-6, rtol=0)
    torch.testing.assert_close(own, gradient)


def test_a_norm_that_was_changed_in_place_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Norms, "asks", staticmethod(_nothing))
    inputs = prompt("llava-clip", ROWS["llava-clip"])
    found = []
    for asks in (_nothing, _changed):
        monkeypatch.setattr(Norms, "asks", staticmethod(asks))
        with torch.no_grad(), vtprune.wrapped(make("llava-clip"), Norms()) as model:
            found.append(model(**inputs).logits)
    torch.testing.assert_close(*found, atol=1e-6, rtol=0)


def test_a_layer_runs_its_norm_no_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Norms, "asks", staticmethod(_its_own))
    model = make("llava-clip")
    norm, ran = model.model.language_model.layers[1].input_layernorm, []
    forward = norm.forward
    monkeypatch.setattr(norm, "forward", lambda states: ran.append(states.shape) or forward(states))
    with torch.no_grad(), vtprune.wrapped(model, Norms()):
        model(**prompt("llava-clip", ROWS["llava-clip"][:1]))
    assert len(ran) == 1
