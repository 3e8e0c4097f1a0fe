"""What methods and the core say they know (counts, that an answer is sound) is what the device would have said."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import vtprune
from tests.matrix import CACHE, GATED, PRUNERS, RELEASED, label
from tests.models import ROWS, make, prompt
from vtprune.decoder import packing, revival, run
from vtprune.encoder.merging import check_selection
from vtprune.hooks.encoder import EncoderHooks
from vtprune.method.answers import EncoderSelection, Eviction, Selection
from vtprune.method.stages import InEncoder
from vtprune.tensors.compaction import places_of


@pytest.fixture(autouse=True)
def claims(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Holds every claim of soundness and every count against the tensors themselves; answers which were made."""
    made: list[str] = []

    def checked(cls: type[Any]) -> None:
        original = cls.check

        def check(self: Any, size: int) -> None:
            if self.sound:
                made.append(cls.__name__)
            original(replace(self, sound=False), size)

        monkeypatch.setattr(cls, "check", check)

    checked(Selection)
    checked(Eviction)
    ask = EncoderHooks._ask

    def asked(self: Any, encoding: Any, index: int, **others: Any) -> EncoderSelection | None:
        found = ask(self, encoding, index, **others)
        if found is not None:
            if found.sound:
                made.append("EncoderSelection")
                check_selection(found, encoding.valid, others["pruner"].name)
            known = replace(found, counts=None, flows=None).settled()
            assert found.counts in (None, known.counts)
            # A method may say that tokens flow where it happened to be none; never that none do where some did.
            assert found.flows is not False or not known.flows
            if found.lossless:
                assert bool(encoding.valid.all())
                assert bool((found.into >= 0).all())
        return found

    def placed(alive: Tensor, counted: Any = None) -> Tensor:
        if counted is not None:
            made.append("places_of")
            assert list(counted) == alive.sum(dim=1).tolist()
        return places_of(alive, counted)

    monkeypatch.setattr(EncoderHooks, "_ask", asked)
    for module in (run, packing, revival):
        monkeypatch.setattr(module, "places_of", placed)
    return made


EVERY = [one for one in [*PRUNERS, *CACHE, *GATED] if not isinstance(one, vtprune.NoPruning)]


CASES = [
    *(("llava-clip", one) for one in [*EVERY, *RELEASED]),
    # Towers that pack images differ in what happens inside them.
    *(("qwen2.5-vl", one) for one in EVERY if isinstance(one, InEncoder)),
]
# The first setting of each method is enough for a quick look.
FIRST = {(kind, type(one).__name__): one for kind, one in reversed(CASES)}


@pytest.mark.parametrize(
    ("kind", "pruner"),
    [
        pytest.param(kind, one, marks=[] if FIRST[kind, type(one).__name__] is one else [pytest.mark.slow])
        for kind, one in CASES
    ],
    ids=lambda value: value if isinstance(value, str) else label(value),
)
def test_what_a_method_says_that_it_knows_is_so(kind: str, pruner: Any, claims: list[str]) -> None:
    inputs = prompt(kind, ROWS[kind])
    with torch.no_grad(), vtprune.wrapped(make(kind), pruner) as model:
        model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert claims
