"""Bad input gets one clear exception, and nothing is left half wrapped."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import vtprune
from tests.models import MODELS, ROWS, Row, make, prompt
from vtprune.method import registry
from vtprune.method.answers import Selection
from vtprune.method.stages import BeforeDecoder
from vtprune.method.views import VisionStream

every_model = pytest.mark.parametrize("kind", MODELS)


@pytest.mark.parametrize("keep", [0, -1, 1.5, 0.0, -0.5, True, "half", float("nan"), float("inf")])
@pytest.mark.parametrize("name", [one for one in vtprune.available() if one != "auto"][:7])
def test_a_keep_that_makes_no_sense_is_refused(name: str, keep: Any) -> None:
    model = make("llava-clip")
    with pytest.raises(vtprune.VTPruneError, match="keep takes a count"):
        vtprune.wrap(model, name, keep=keep)
    vtprune.wrap(model, name)


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(vtprune.UnknownPrunerError, match="did you mean 'flowcut'"):
        vtprune.wrap(make("llava-clip"), "flowcutt", keep=4)


def test_an_unknown_option_names_the_known_ones() -> None:
    with pytest.raises(vtprune.VTPruneError, match=r"holov has no option temperature; it takes .*keep"):
        vtprune.wrap(make("llava-clip"), "holov", temperature=2)


def test_options_beside_a_pruner_object_are_refused() -> None:
    with pytest.raises(vtprune.VTPruneError, match="set them on the Pruner"):
        vtprune.wrap(make("llava-clip"), vtprune.Grid(keep=4), keep=3)


@pytest.mark.parametrize("given", [None, 3, [], ["random"], object()])
def test_what_is_no_pruner_is_refused(given: Any) -> None:
    with pytest.raises(vtprune.VTPruneError, match="a pruner is a name"):
        vtprune.wrap(make("llava-clip"), given)


def test_a_model_without_an_adapter_names_those_that_have_one() -> None:
    with pytest.raises(vtprune.UnsupportedModelError, match=r"no adapter for Linear; vtprune wraps Llava.*Qwen2_5"):
        vtprune.wrap(torch.nn.Linear(2, 2), "random", keep=4)


@every_model
def test_wrapping_twice_says_to_unwrap(kind: str) -> None:
    model = vtprune.wrap(make(kind), "random", keep=4)
    with pytest.raises(vtprune.VTPruneError, match=r"already wrapped with random; call vtprune.unwrap"):
        vtprune.wrap(model, "grid", keep=4)


def test_unwrapping_and_reporting_need_a_wrapped_model() -> None:
    model = make("llava-clip")
    with pytest.raises(vtprune.VTPruneError, match="not wrapped"):
        vtprune.unwrap(model)
    with pytest.raises(vtprune.VTPruneError, match="not wrapped"):
        vtprune.report(model)
    vtprune.wrap(model, "none")
    with pytest.raises(vtprune.VTPruneError, match="nothing to report"):
        vtprune.report(model)


@every_model
@pytest.mark.parametrize("name", ["fopru", "flowcut", "holov"])
def test_nan_scores_are_named_and_the_model_goes_on(kind: str, name: str) -> None:
    inputs = prompt(kind, ROWS[kind][:1])
    broken = {**inputs, "pixel_values": torch.full_like(inputs["pixel_values"], float("nan"))}
    model = vtprune.wrap(make(kind), name, keep=5)
    with torch.no_grad():
        expected = model(**inputs).logits
        with pytest.raises(vtprune.ScoreError, match=f"{name}.*NaN"):
            model(**broken)
        assert torch.equal(model(**inputs).logits, expected)


@every_model
def test_an_error_inside_the_model_leaves_it_usable(kind: str) -> None:
    inputs = prompt(kind, ROWS[kind][:1])
    model = vtprune.wrap(make(kind), "flowcut", keep=5)
    layer = model.model.language_model.layers[1].mlp
    with torch.no_grad():
        expected = model(**inputs).logits
        handle = layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
        with pytest.raises(MemoryError, match="no room"):
            model(**inputs)
        handle.remove()
        assert torch.equal(model(**inputs).logits, expected)


def test_renumbered_positions_are_refused_for_m_rope() -> None:
    with pytest.raises(vtprune.VTPruneError, match="1-D positions only"):
        vtprune.wrap(make("qwen2.5-vl"), "random", keep=4, positions="compact")
    with pytest.raises(vtprune.VTPruneError, match="'original' or 'compact'"):
        vtprune.wrap(make("llava-clip"), "random", keep=4, positions="new")


def test_videos_are_refused_by_name_where_a_family_takes_none() -> None:
    inputs = prompt("llava-clip", [Row([2, 3], [(6, 6)])])
    model = vtprune.wrap(make("llava-clip"), "random", keep=4)
    with pytest.raises(vtprune.VTPruneError, match="video inputs are not supported by llava, which takes images"):
        model(**inputs, pixel_values_videos=inputs["pixel_values"])


@dataclass(frozen=True)
class Greedy(BeforeDecoder):
    """Answers with the given indices, whatever the budget."""

    kept: tuple[int, ...] = ()

    def select(self, stream: VisionStream) -> Selection | None:
        return Selection(torch.tensor(self.kept))


@pytest.mark.parametrize(
    ("kept", "message"),
    [((), "at least one"), ((3, 1), "ascending"), ((1, 1), "ascending"), ((40,), "below 36"), ((-1, 2), "below 36"),
     (tuple(range(10)), "budget of 9")],
)  # fmt: skip
def test_a_selection_that_breaks_the_contract_is_refused(kept: tuple[int, ...], message: str) -> None:
    vtprune.register("test_greedy", paper="a test")(Greedy)
    model = vtprune.wrap(make("llava-clip"), Greedy(keep=9, kept=kept))
    with pytest.raises(vtprune.VTPruneError, match=message):
        model(**prompt("llava-clip", ROWS["llava-clip"][:1]))


def test_methods_of_other_packages_come_through_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        def load(self) -> None:
            vtprune.register("test_plugged_in", paper="elsewhere")(type("Elsewhere", (Greedy,), {}))

    monkeypatch.setattr(registry, "_plugins_loaded", False)
    monkeypatch.setattr(registry, "entry_points", lambda group: [Entry()] if group == "vtprune.pruners" else [])
    assert vtprune.available()["test_plugged_in"].paper == "elsewhere"
    assert vtprune.wrap(make("llava-clip"), "test_plugged_in", kept=(1, 2), keep=2)


def test_a_registered_name_cannot_be_taken_again() -> None:
    with pytest.raises(vtprune.VTPruneError, match="'random' is taken"):
        vtprune.register("random", paper="")(Greedy)
    with pytest.raises(vtprune.VTPruneError, match="decorates a subclass"):
        vtprune.register("test_other", paper="")(object)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vflowopt", {"alpha": 10**400}),
        ("vflowopt", {"cell": 10**400}),
        ("visionzip", {"contextual": -(10**400)}),
        ("turbo", {"gamma": 10**400}),
        ("mustdrop", {"key_share": 10**400}),
        ("turbo", {"beta": 1e308}),
    ],
)
def test_numbers_beyond_a_float_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(vtprune.VTPruneError, match=next(iter(options))):
        vtprune.wrap(make("llava-clip"), name, **options)


def test_scores_that_overflow_are_refused() -> None:
    model = vtprune.wrap(make("llava-clip"), "vflowopt", keep=9, alpha=1e308)
    with pytest.raises(vtprune.ScoreError, match="vflowopt"):
        model(**prompt("llava-clip", ROWS["llava-clip"]))


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": pickle.dumps,
    "torch.save": lambda model: torch.save(model, io.BytesIO()),
}


@every_model
@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("name", ["grid", "fastv", "pmod"])
def test_a_wrapped_model_is_neither_copied_nor_pickled(kind: str, name: str, way: str) -> None:
    model = vtprune.wrap(make(kind), name)
    for part in (model, model.model, model.model.language_model):
        with pytest.raises(vtprune.VTPruneError, match=r"cannot be copied or pickled; call vtprune\.unwrap"):
            COPIES[way](part)
    torch.save(model.state_dict(), io.BytesIO())
    COPIES[way](vtprune.unwrap(model))


@every_model
@pytest.mark.parametrize("name", ["grid", "pmod", "covipal"])
def test_what_a_wrapped_model_saves_loads_as_the_base_and_wraps_as_the_method(
    kind: str, name: str, tmp_path: Path
) -> None:
    options = {"width": 16, "heads": 2} if name == "covipal" else {}
    inputs = prompt(kind, ROWS[kind])
    model = vtprune.wrap(make(kind), name, keep=0.7, **options)
    brought = getattr(model, "vtprune_weights", None)
    if brought is not None:
        assert any("vtprune_weights" in weight for weight in model.state_dict())
        with torch.no_grad():
            for weight in brought.parameters():
                weight.normal_()
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    assert (tmp_path / "vtprune_config.json").exists() == (brought is not None)
    vtprune.wrap(again, tmp_path) if brought is not None else vtprune.wrap(again, name, keep=0.7)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
