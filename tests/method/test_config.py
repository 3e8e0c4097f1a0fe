"""Config files: exact round trips, and a clear error for everything else."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

import vtprune
from vtprune.errors import UnknownPrunerError, VTPruneError
from vtprune.method import registry
from vtprune.method.config import (
    CONFIG_NAME,
    from_dict,
    load_config,
    save_config,
    to_dict,
)
from vtprune.method.pruner import Pruner, asked
from vtprune.pruners import (
    FlowCut,
    FoPru,
    HoloV,
    Random,
)
from vtprune.pruners.fopru import STRATEGIES

SHIPPED = [name for name in registry.available() if registry.pruner_class(name).__module__.startswith("vtprune.")]
KEEPS = st.none() | st.integers(1, 10**6) | st.floats(0, 1, exclude_min=True)
VALUES: dict[str, Any] = {
    "keep": KEEPS,
    "seed": st.integers(-(2**63) + 1, 2**63 - 1),
    "strategy": st.sampled_from(STRATEGIES),
    "softmax": st.booleans(),
    "stages": st.sampled_from([None, 1, 2]),
    "crops": st.none() | st.integers(1, 99),
    "alpha": st.none() | st.integers(0, 9) | st.floats(0, 1e9),
    "tau": st.just(1.0) | st.integers(0, 9) | st.floats(0, 1e9),
    "merge": st.booleans(),
    "recycle": st.booleans(),
    "cls": st.booleans(),
    "theta": st.none() | st.floats(0, 1, exclude_max=True),
    "contextual": st.none() | st.floats(0, 1, exclude_max=True) | st.integers(0, 9),
    "first": st.none() | st.floats(0, 1, exclude_min=True),
    "merge_threshold": st.floats(0, 1),
}


@st.composite
def pruners(draw: st.DrawFn) -> Pruner:
    """Any shipped method with any options that it accepts; what it refuses is not drawn."""
    cls = registry.pruner_class(draw(st.sampled_from(SHIPPED)))
    options = {}
    for field in dataclasses.fields(cls):
        values = st.sampled_from(cls.info.variants) if field.name == "variant" else VALUES.get(field.name)
        if values is not None and draw(st.booleans()):
            options[field.name] = draw(values)
    if options.get("variant") == "released":
        options.pop("tau", None)
    try:
        return cls(**options)
    except VTPruneError:
        reject()


def typed(pruner: Pruner | list[Pruner]) -> Any:
    """Every field with its type: 1 is not 1.0."""
    if isinstance(pruner, list):
        return [typed(stage) for stage in pruner]
    return type(pruner), [(name, type(value), value) for name, value in pruner.to_dict().items()]


@settings(max_examples=300, deadline=None)
@given(pruner=pruners() | st.lists(pruners(), min_size=1, max_size=3))
def test_the_round_trip_is_exact(pruner, tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    save_config(pruner, folder)
    assert typed(load_config(folder)) == typed(pruner)
    assert typed(from_dict(to_dict(pruner))) == typed(pruner)


def test_one_is_not_one_point_zero(tmp_path):
    for keep in (1, 1.0):
        save_config(Random(keep=keep), tmp_path)
        loaded = load_config(tmp_path)
        assert type(asked(loaded)) is type(keep)
    assert Random(keep=1).budget(100) == 1
    assert Random(keep=1.0).budget(100) == 100


def test_the_file_is_plain_and_complete(tmp_path):
    path = save_config(FlowCut(keep=64), tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / CONFIG_NAME
    assert json.loads(path.read_text()) == {
        "format": "vtprune",
        "version": 1,
        "pruner": {"method": "flowcut", "keep": 64, "stages": None, "variant": "paper"},
    }
    assert [entry.name for entry in path.parent.iterdir()] == [CONFIG_NAME]


def test_a_list_stays_a_list(tmp_path):
    save_config([FoPru(keep=9)], tmp_path)
    assert load_config(tmp_path) == [FoPru(keep=9)]
    save_config((FlowCut(keep=9), HoloV(keep=4)), tmp_path)
    assert load_config(tmp_path) == [FlowCut(keep=9), HoloV(keep=4)]


def test_options_may_be_left_out():
    assert from_dict({"method": "holov", "tau": 2}) == HoloV(tau=2)
    assert from_dict([{"method": "flowcut"}, {"method": "holov"}]) == [FlowCut(), HoloV()]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"method": "holov", "crop": 3}, "holov has no option crop; it takes alpha, crops, keep"),
        ({"method": "holof"}, "unknown pruner 'holof'; did you mean 'holov'"),
        ({"keep": 3}, "a method is"),
        ({"method": 3}, "a method is"),
        ("flowcut", "a method is"),
        (None, "a method is"),
        ([], "at least one"),
        ([["flowcut"]], "a method is"),
        ({"method": "flowcut", "keep": "64"}, r"flowcut: keep is of type int \| float \| None, got '64'"),
        ({"method": "flowcut", "keep": True}, "keep is of type"),
        ({"method": "flowcut", "keep": [64]}, "keep is of type"),
        ({"method": "flowcut", "keep": 0}, "at least 1"),
        ({"method": "flowcut", "stages": 1.0}, "stages is of type int"),
        ({"method": "flowcut", "variant": "fast"}, "variant is one of"),
        ({"method": "fopru", "softmax": 1}, "softmax is of type bool, got 1"),
        ({"method": "fopru", "strategy": None}, "strategy is of type str"),
        ({"method": "holov", "tau": None}, "tau is of type float"),
        ({"method": "holov", "tau": float("inf")}, "tau is of type float"),
        ({"format": "vtprune", "version": 2, "pruner": {"method": "none"}}, "version 2 is unknown.*version 1"),
        ({"format": "vtprune", "version": "1", "pruner": {"method": "none"}}, "version '1' is unknown"),
        ({"format": "vtprune", "version": True, "pruner": {"method": "none"}}, "version True is unknown"),
        ({"format": "vtprune", "pruner": {"method": "none"}}, "version None is unknown"),
        ({"format": "vtprune", "version": 1}, "a config is"),
        ({"format": "vtprune", "version": 1, "pruner": {"method": "none"}, "x": 1}, "a config is"),
        ({"format": "timm", "version": 1, "pruner": {"method": "none"}}, "a config is"),
    ],
)
def test_bad_configs_raise(data, message):
    with pytest.raises(VTPruneError, match=message):
        from_dict(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ('{"format": "vtprune", "version": 1, "pru', "not valid JSON"),
        ('{"format": "vtprune", "version": 1, "pruner": {"method": "holov", "tau": NaN}}', "NaN is not a finite"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "not a vtprune config"),
        ('{"method": "holov"}', "not a vtprune config"),
        ('{"format": "vtprune", "version": 9, "pruner": {}}', "version 9 is unknown"),
        ('{"format": "vtprune", "version": 1, "pruner": {"method": "holof"}}', "did you mean 'holov'"),
    ],
)
def test_bad_files_raise_and_are_named(text, message, tmp_path):
    path = tmp_path / CONFIG_NAME
    path.write_text(text)
    with pytest.raises(VTPruneError, match=message) as caught:
        load_config(tmp_path)
    assert str(path) in str(caught.value)


def test_missing_and_unreadable_files_raise(tmp_path):
    with pytest.raises(VTPruneError, match=f"no {CONFIG_NAME} in"):
        load_config(tmp_path)
    (tmp_path / CONFIG_NAME).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(VTPruneError, match="cannot read"):
        load_config(tmp_path)
    (tmp_path / CONFIG_NAME).unlink()
    (tmp_path / CONFIG_NAME).mkdir()
    with pytest.raises(VTPruneError, match="cannot read"):
        load_config(tmp_path)


def test_an_unwritable_folder_raises(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(VTPruneError, match="cannot write"):
        save_config(Random(), tmp_path / "file")
    with pytest.raises(VTPruneError, match="cannot write"):
        save_config(Random(), tmp_path / "file" / "below")


@pytest.mark.parametrize("pruner", ["flowcut", [], None, [Random(), "holov"]])
def test_only_pruners_are_saved(pruner, tmp_path):
    with pytest.raises(VTPruneError, match="non-empty list"):
        save_config(pruner, tmp_path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    save_config(Random(keep=5), tmp_path)

    def full_disk(source: str, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(VTPruneError, match="No space left on device"):
        save_config(Random(keep=6), tmp_path)
    monkeypatch.undo()
    assert load_config(tmp_path) == Random(keep=5)
    assert [entry.name for entry in tmp_path.iterdir()] == [CONFIG_NAME]


def test_fields_of_third_party_methods(tmp_path, monkeypatch):
    vtprune.available()
    monkeypatch.setattr(registry, "_pruners", dict(registry._pruners))

    @registry.register("third_party", paper="")
    @dataclass(frozen=True)
    class ThirdParty(Pruner):
        layers: tuple[int, ...] = (2, 4)
        pair: tuple[int, str] | None = None
        extra: Any = None

    pruner = ThirdParty(layers=(1, 2, 3), pair=(1, "a"))
    save_config(pruner, tmp_path)
    assert load_config(tmp_path) == pruner
    for options in ({"layers": [1, 2.5]}, {"pair": [1]}, {"layers": 3}):
        with pytest.raises(VTPruneError, match="is of type"):
            from_dict({"method": "third_party", **options})
    with pytest.raises(VTPruneError, match="as JSON"):
        save_config(ThirdParty(extra=object()), tmp_path)
    with pytest.raises(VTPruneError, match="as JSON"):
        save_config(ThirdParty(extra=float("nan")), tmp_path)
    assert issubclass(UnknownPrunerError, VTPruneError)
