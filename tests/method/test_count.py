"""What a server asks of a method: how many tokens an image keeps, by its grid alone, and then just so many."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import vtprune
from tests.models import ROWS, make, prompt
from tests.streams import few, stream
from vtprune.method.catalogue import own_methods
from vtprune.method.registry import create

SERVED: list[tuple[str, dict[str, Any]]] = [
    ("none", {}),
    ("random", {}),
    ("grid", {}),
    ("pool", {}),
    ("divprune", {}),
    ("divprune", {"variant": "released"}),
    ("fopru", {}),
    ("fopru", {"softmax": False}),
    ("fopru", {"strategy": "row"}),
    ("holov", {}),
    ("holov", {"crops": 2, "tau": 2.0}),
    ("cdpruner", {}),
    ("cdpruner", {"theta": 0.5}),
]
IDS = ["-".join([name, *map(str, options.values())]) for name, options in SERVED]
grids = st.tuples(st.integers(1, 9), st.integers(1, 9))
keeps = st.none() | st.integers(1, 90) | st.sampled_from([0.03, 0.25, 0.5, 0.999, 1.0])


def everything(grid: tuple[int, int], seed: int, features: Tensor | None = None) -> dict[str, Any]:
    """All that `select` may be given of an image of this grid."""
    shown = stream((1, *grid), seed=seed)
    text = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed))
    found = {"features": shown.features if features is None else features, "grid": grid, "text": text}
    return {**found, "signals": shown.signals, "pixels": shown.pixels}


@pytest.mark.parametrize(("name", "options"), SERVED, ids=IDS)
@few
@given(grid=grids, keep=keeps, seed=st.integers(0, 99), alike=st.booleans())
def test_a_method_keeps_as_many_tokens_as_it_counts(
    name: str, options: dict[str, Any], grid: tuple[int, int], keep: int | float | None, seed: int, alike: bool
) -> None:
    keep = None if name == "none" else keep
    features = torch.ones(math.prod(grid), 5) if alike else None
    counted = create(name, keep=keep, **options).count(grid)
    own = everything(grid, seed, features)
    chosen = vtprune.select(own.pop("features"), name, keep=keep, **own, **options)
    assert len(chosen.kept) == counted
    assert chosen.features.shape == (counted, 5)
    assert vtprune.available()[name].serves


@pytest.mark.parametrize("kind", ["llava-clip", "qwen2.5-vl"])
@pytest.mark.parametrize(("name", "options"), SERVED[1:], ids=IDS[1:])
def test_a_wrapped_model_keeps_what_select_keeps(
    kind: str, name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Any] = []
    pruner = create(name, keep=0.4, **options)
    choose = type(pruner).select

    def watched(self: Any, stream: Any) -> Any:
        shown.append(stream)
        return choose(self, stream)

    model, inputs = make(kind), prompt(kind, ROWS[kind])
    with monkeypatch.context() as patch, vtprune.wrapped(model, pruner), torch.no_grad():
        patch.setattr(type(pruner), "select", watched)
        model(**inputs)
        images = [image for sample in vtprune.report(model).samples for image in sample.images]
    assert len(images) == len(shown)
    for image, one in zip(images, shown, strict=True):
        own = {field: getattr(one, field) for field in ("signals", "pixels", "text", "text_ids", "text_after")}
        chosen = vtprune.select(one.features, name, keep=0.4, grid=one.grid, **own, **options)
        assert chosen.kept.tolist() == list(image.kept)
        assert len(image.kept) == pruner.count(one.grid)


def test_a_grid_of_three_numbers_counts_as_one_of_two() -> None:
    for grid in ((6, 8), (1, 6, 8)):
        assert create("grid", keep=13).count(grid) == 12


@pytest.mark.parametrize("name", ["fopru", "holov", "divprune", "cdpruner"])
def test_features_that_are_no_numbers_are_refused_by_name(name: str) -> None:
    own = everything((8, 8), 0)
    features = own.pop("features").clone()
    features[3] = float("nan")
    own["signals"].query[..., 3, :] = float("nan")
    with pytest.raises(vtprune.ScoreError, match=name):
        vtprune.select(features, name, keep=5, **own)


@pytest.mark.parametrize("grid", [(6,), (1, 2, 3, 4), (0, 4)])
def test_a_grid_is_two_or_three_sizes(grid: tuple[int, ...]) -> None:
    with pytest.raises(vtprune.VTPruneError, match="a grid is"):
        create("grid").count(grid)


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("fastv", {}, "inside the decoder"),
        ("flowcut", {}, "inside the decoder"),
        ("visionzip", {}, "inside the encoder"),
        ("d2o", {}, "cuts the cache"),
        ("auto", {}, "answers several times"),
        ("evs", {}, "videos alone"),
        ("gemfilter", {}, "decoder layers that have to run first"),
        ("prumerge", {}, "last layer"),
        ("covipal", {}, "trained weights"),
        ("holov", {"variant": "released"}, "fewer tokens than its budget"),
    ],
)
def test_a_method_that_cannot_be_served_says_why(name: str, options: dict[str, Any], why: str) -> None:
    with pytest.raises(vtprune.VTPruneError, match=f"{name} .*{why}"):
        create(name, **options).count((4, 4))


def test_each_method_is_served_or_says_why() -> None:
    told = {name: (info.serves, info.unserved) for name, info in own_methods().items()}
    assert told == {name: (info.serves, info.unserved) for name, info in vtprune.available().items() if name in told}
    assert all(bool(serves) != bool(unserved) for serves, unserved in told.values())


def test_what_a_method_reads_of_a_server_is_one_of_a_few_words() -> None:
    with pytest.raises(vtprune.VTPruneError, match="'signals'"):
        vtprune.register("mine", serves="weights")
