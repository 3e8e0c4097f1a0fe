"""One grammar: what a text stands for, wherever one stands for a pruner, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import vtprune
from tests.matrix import CACHE, DROPS, GATED, PRUNERS, RELEASED, label
from tests.models import make
from vtprune.errors import InputError
from vtprune.evals.lmms.model_args import parse_model_args
from vtprune.evals.settings import build_settings
from vtprune.method.pruner import Pruner
from vtprune.method.resolving import resolve
from vtprune.method.texts import (
    parse_entry,
    parse_method,
    parse_value,
    show,
    show_value,
    split_entries,
)
from vtprune.training.run import Source, _method

EVERY = [*PRUNERS, *CACHE, *GATED, *RELEASED, *DROPS]


@pytest.mark.parametrize("pruner", EVERY, ids=label)
def test_every_pruner_has_a_text_that_stands_for_it(pruner: Pruner) -> None:
    text = show(pruner)
    assert resolve(text) == [pruner]
    assert show(resolve(text)) == text
    assert vtprune.Grid(keep=3) == resolve(f"grid:keep=3+{text}")[0]
    assert show(resolve(f"{text}+grid:keep=3")) == f"{text}+grid:keep=3"
    assert split_entries(f"none,{text},grid") == ["none", text, "grid"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("64", 64), ("-2", -2), ("0.25", 0.25), ("1e-3", 1e-3), ("1e+3", 1e3), ("25%", 0.25), ("True", True),
        ("false", False), ("None", None), ("null", None), ("word", "word"), ("'a,b'", "a,b"), ('"it\'s"', "it's"),
        ("(2,5)", (2, 5)), ("[2,5]", (2, 5)), ("(2, 5)", (2, 5)), ("(2,)", (2,)), ("()", ()),
        ("((1,2),[3])", ((1, 2), (3,))), ("hf-hub:a/b", "hf-hub:a/b"), ("nan", "nan"), ("1_000", "1_000"),
    ],
)  # fmt: skip
def test_values_are_read(text: str, value: Any) -> None:
    found = parse_value(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "value", [3, 0.1, True, None, "", "word", "25%", "64", "None", "a+b", "it's", (1,), ((), "x")]
)
def test_values_read_back_as_they_were(value: Any) -> None:
    assert parse_value(show_value(value)) == value


def test_commas_continue_a_method_where_a_name_and_an_equals_sign_follow() -> None:
    text = "grid,fastv:keep=0.5,layers=(2,5),my/folder,flowcut:variant=released:stages=2,fastv,layers=[1],none"
    assert split_entries(text) == [
        "grid",
        "fastv:keep=0.5,layers=(2,5)",
        "my/folder",
        "flowcut:variant=released:stages=2",
        "fastv,layers=[1]",
        "none",
    ]
    assert parse_method("fastv,layers=[1]") == ("fastv", (("layers", (1,)),))


def test_layers_are_spelt_as_they_are_advised() -> None:
    for text in ("fastv:keep=0.5,layers=2", "fastv:keep=50%:layers=(2,)", "fastv:layers=[2],keep=.5"):
        assert resolve(text) == [vtprune.FastV(keep=0.5, layers=(2,))]
    assert resolve("gamma_mod:layers=(2, 4)") == [vtprune.GammaMoD(layers=(2, 4))]
    assert resolve("gamma_mod", layers=[2, 4]) == resolve({"method": "gamma_mod", "layers": [2, 4]})
    assert resolve("turbo:layers=4") == [vtprune.Turbo(layers=4)]


def test_one_text_means_the_same_in_every_place(tmp_path: Path) -> None:
    text = "pyramid_drop:keep=0.5,layers=(1,2)"
    wanted = [vtprune.PyramidDrop(keep=0.5, layers=(1, 2))]
    assert resolve(text) == wanted
    assert build_settings([text], [0.25])[1].pruners() == wanted
    assert _method(Source(text)) == (wanted, {})
    assert _method(Source("pyramid_drop", keep=0.5, options=("layers=(1,2)",))) == (wanted, {})
    for arguments in (
        f"method={text}",
        "method=pyramid_drop,keep=0.5,layers=(1,2)",
        "layers=[1,2],keep=50%,method=pyramid_drop",
    ):
        assert resolve(parse_model_args(arguments, ("method", "pretrained"))["method"]) == wanted
    vtprune.save_config(wanted, tmp_path)
    assert resolve(str(tmp_path)) == wanted


def test_several_methods_are_joined_by_a_plus() -> None:
    text = "visionzip:keep=192+vflowopt:keep=96"
    wanted = [vtprune.VisionZip(keep=192), vtprune.VFlowOpt(keep=96)]
    assert resolve(text) == wanted
    (setting,) = build_settings([text], [0.25, 0.5])[1:]
    assert (setting.pruners(), setting.keep, setting.label) == (wanted, 96, text)
    open_ended = build_settings(["visionzip:keep=192+fastv"], [0.25, 0.5])[1:]
    assert [(one.keep, one.pruners()[1].keep, one.pruners()[0].keep) for one in open_ended] == [
        (0.25, 0.25, 192),
        (0.5, 0.5, 192),
    ]
    model = vtprune.wrap(make("llava-clip"), "visionzip:keep=9+fastv:keep=0.2,layers=(2,)")
    vtprune.unwrap(model)
    assert parse_model_args("method=visionzip:keep=192+fastv,layers=(2,5)", ("method",)) == {
        "method": "visionzip:keep=192+fastv:layers=(2,5)"
    }


def test_a_folder_is_a_method_whatever_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("plain", "with,comma", "a+b", "lr=1e-3", "grid", "it's"):
        vtprune.save_config(vtprune.Grid(keep=4), name)
        assert resolve(repr(name)) == [vtprune.Grid(keep=4)]
        assert resolve(f"./{name}") == [vtprune.Grid(keep=4)]
    assert resolve("plain+fastv:keep=0.1") == [vtprune.Grid(keep=4), vtprune.FastV(keep=0.1)]
    assert resolve("grid") == [vtprune.Grid()]
    with pytest.raises(vtprune.VTPruneError, match="give no others"):
        resolve("plain,keep=3")
    with pytest.raises(vtprune.VTPruneError, match=r"no vtprune_config\.json in other/folder"):
        resolve("other/folder")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fastv:layer=(2,5)", r"fastv has no option layer; it takes .*layers.*; did you mean layers\?"),
        ("fastv:layers=x", "layers is of type .* got 'x'"),
        ("fastv:layers=(2,5", "is missing at its end"),
        ("fastv:layers=2)", "closes no bracket"),
        ("fastv:keep=3,keep=4", "keep is given twice"),
        ("fastv:keep=", "keep has no value"),
        ("fastv:keep=many", "keep: cannot take 'many'"),
        ("grid+", "a method is missing"),
        ("grid,fastv", "stages of one method are joined by"),
        ("keep=3", "options follow the method"),
        ("visionzip:keep=3+fastw", "unknown pruner 'fastw'.*did you mean 'fastv'"),
        ("", "as one method"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(vtprune.VTPruneError, match=message):
        resolve(text)


def test_an_option_given_twice_is_refused_in_every_place() -> None:
    with pytest.raises(vtprune.VTPruneError, match="keep is given twice"):
        vtprune.wrap(make("llava-clip"), "fastv:keep=0.5", keep=0.4)
    with pytest.raises(vtprune.VTPruneError, match="scale is given twice"):
        _method(Source("pmod:scale=0.3", options=("scale=0.2",)))
    with pytest.raises(InputError, match="scale is given twice"):
        _method(Source("pmod", options=("scale=0.3", "scale=0.2")))
    with pytest.raises(InputError, match="keep: given twice"):
        _method(Source("pmod", keep=0.5, options=("keep=0.3",)))
    with pytest.raises(InputError, match="which one does keep=3 belong to"):
        parse_model_args("keep=3,method=grid+fastv", ("method",))


def test_a_quoted_value_holds_what_separates() -> None:
    (stage,) = parse_entry("cdpruner:clip='a,b+c:d=(',theta=0.5")
    assert dict(stage.options) == {"clip": "a,b+c:d=(", "theta": 0.5}
