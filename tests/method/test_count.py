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
from vtprune.adapters import adapter_for
from vtprune.method.catalogue import own_methods
from vtprune.method.registry import create
from vtprune.method.stages import Read
from vtprune.method.views import LayerSignals

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
ENCODED: list[tuple[str, dict[str, Any]]] = [
    ("visionzip", {}),
    ("visionzip", {"cls": False}),
    ("visionzip", {"merge": False}),
    ("visionzip", {"contextual": 0.4}),
    ("vispruner", {}),
    ("vispruner", {"important_ratio": 1}),
]
ENCODED_IDS = ["-".join([name, *map(str, options.values())]) for name, options in ENCODED]
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


def encoded(grid: tuple[int, int], seed: int, *, group: int, alike: bool = False) -> tuple[Tensor, LayerSignals]:
    """States and signals of an encoder's last layer, behind CLS where a token is one patch."""
    shown = stream((1, *grid), seed=seed, prefix=int(group == 1), group=group)
    assert shown.signals is not None
    shape = (shown.signals.query.shape[1], 6)
    states = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return torch.ones(shape) if alike else states, shown.signals


@pytest.mark.parametrize(("name", "options"), ENCODED, ids=ENCODED_IDS)
@few
@given(grid=grids, keep=keeps, seed=st.integers(0, 99), alike=st.booleans(), group=st.sampled_from([1, 4]))
def test_a_method_keeps_as_many_encoded_tokens_as_it_counts(
    name: str,
    options: dict[str, Any],
    grid: tuple[int, int],
    keep: int | float | None,
    seed: int,
    alike: bool,
    group: int,
) -> None:
    states, signals = encoded(grid, seed, group=group, alike=alike)
    counted = create(name, keep=keep, **options).count(grid)
    chosen = vtprune.select_encoded(states, name, grid=grid, signals=signals, keep=keep, **options)
    assert len(chosen.kept.unique()) == len(chosen.kept) == counted
    assert chosen.kept.tolist() == sorted(chosen.kept.tolist())
    assert chosen.features.shape == (counted * group, 6)
    assert vtprune.available()[name].serves == "states"


@pytest.mark.parametrize("kind", ["llava-clip", "llava-siglip", "qwen2.5-vl"])
@pytest.mark.parametrize(("name", "options"), ENCODED, ids=ENCODED_IDS)
def test_a_wrapped_model_projects_what_select_encoded_keeps(
    kind: str, name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = make(kind), prompt(kind, ROWS[kind])
    pruner, layers, projected = create(name, keep=0.4, **options), [], []
    choose = type(pruner).prune_encoder

    def watched(self: Any, layer: Any) -> Any:
        layers.append(layer)
        return choose(self, layer)

    with monkeypatch.context() as patch, torch.no_grad():
        # All methods are shown the states here, whether they ask for them or not.
        patch.setattr(type(pruner), "encoder_reads", frozenset({Read.HIDDEN}))
        patch.setattr(type(pruner), "prune_encoder", watched)
        with vtprune.wrapped(model, pruner) as core:
            (projector,) = adapter_for(core).projectors
            hook = projector.register_forward_pre_hook(lambda _, args: projected.append(args[0]))
            core(**inputs)
            hook.remove()
            images = [image for sample in vtprune.report(core).samples for image in sample.images]
    rows = [(layer, row) for layer in layers for row in range(len(layer.alive))]
    assert len(images) == len(rows)
    found = []
    for image, (layer, row) in zip(images, rows, strict=True):
        count = layer.prefix + layer.alive[row] * layer.group
        states = [part[row, :, :count] for part in (layer.query, layer.key, layer.value)]
        signals = LayerSignals(*states, scale=layer.scale, prefix=layer.prefix, group=layer.group)
        chosen = vtprune.select_encoded(
            layer.hidden[row, :count], name, grid=layer.grids[row], signals=signals, keep=0.4, **options
        )
        assert chosen.kept.tolist() == list(image.kept)
        assert len(image.kept) == pruner.count(layer.grids[row])
        wanted = {merge.into: tuple(merge.members) for merge in image.merged}
        assert {merge.into: merge.members for merge in chosen.merges} == wanted
        found.append(chosen.features)
    # The tower's own windows put tokens in an order of their own.
    given = torch.cat([one.flatten(0, -2) for one in projected])
    assert in_any_order(given, like=torch.cat(found))


def in_any_order(given: Tensor, like: Tensor) -> bool:
    """Whether every row of `like` is one of `given`."""
    return bool((torch.cdist(like.double(), given.double()).amin(dim=1) < 1e-5).all())


@pytest.mark.parametrize(
    ("name", "why"), [("fopru", "vtprune.select"), ("turbo", "after the encoder's last"), ("vscan", "other layers")]
)
def test_what_acts_elsewhere_is_no_choice_among_encoded_tokens(name: str, why: str) -> None:
    states, signals = encoded((6, 6), 0, group=1)
    with pytest.raises(vtprune.VTPruneError, match=why):
        vtprune.select_encoded(states, name, grid=(6, 6), signals=signals, keep=9)


def test_states_that_do_not_fit_are_refused_and_nan_is_told_by_name() -> None:
    states, signals = encoded((6, 6), 0, group=1)
    with pytest.raises(vtprune.VTPruneError, match="grid of"):
        vtprune.select_encoded(states, "visionzip", grid=(6, 5), signals=signals, keep=9)
    with pytest.raises(vtprune.VTPruneError, match="one method"):
        vtprune.select_encoded(states, "visionzip+fastv", grid=(6, 6), signals=signals)
    signals.query[..., 0, :] = float("nan")
    with pytest.raises(vtprune.ScoreError, match="visionzip"):
        vtprune.select_encoded(states, "visionzip", grid=(6, 6), signals=signals, keep=9)


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
        ("turbo", {}, "inside the encoder"),
        ("d2o", {}, "cuts the cache"),
        ("auto", {}, "answers several times"),
        ("evs", {}, "videos alone"),
        ("gemfilter", {}, "decoder layers that have to run first"),
        ("prumerge", {}, "last layer"),
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
