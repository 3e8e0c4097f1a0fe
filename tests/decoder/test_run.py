"""A decoder run that is no blackboard: who watches it, who shapes it, and what is left of it for the report."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vtprune
from tests.models import IMAGE, PAST, ROWS, Row, make, prompt
from vtprune.cache import names
from vtprune.cache.slots import Slots
from vtprune.decoder.prompt import ImageSpan, PromptInfo, numbers_in_rows
from vtprune.decoder.run import DecoderRun, Entering, LayerView, Observer, Shaper
from vtprune.encoder.arrangement import Part
from vtprune.encoder.encoding import EncodedImage
from vtprune.hooks.recording import Recording
from vtprune.method.answers import Merge, Selection
from vtprune.method.views import DecoderLayer
from vtprune.report.generation import Generation
from vtprune.report.trail import Trail, still_there
from vtprune.wrap import ATTRIBUTE

PACKAGE = Path(vtprune.__file__).parent


def _image(total: int = 9, device: str = "cpu") -> EncodedImage:
    alive = torch.arange(total, device=device)
    parts = (Part((1, 1, total)),)
    return EncodedImage(parts, alive, signals=None, pixels=None, segments=[], scored=(), maker=object())


def _span(row: int, device: str = "cpu") -> ImageSpan:
    tokens = torch.arange(9, device=device)
    return ImageSpan(row=row, stands=np.arange(9) + 2, image=_image(9, device), kept=tokens)


def _run(batch: int = 1, length: int = 12, spans: tuple[ImageSpan, ...] = ()) -> DecoderRun:
    info = PromptInfo(
        batch=batch, length=length, offset=0, device=torch.device("cpu"), mask=None, positions=None, cached=False
    )
    return DecoderRun(info, list(spans), None, cache=None, flash=False, rotary=None)


def _inputs(run: DecoderRun, index: int, states: Tensor) -> tuple[Tensor, dict[str, Any]]:
    turn = torch.ones(1, states.shape[1], 4)
    given = {"attention_mask": None, "position_embeddings": (turn, turn)}
    (states, *_), kwargs = run.layer_inputs(index, (states,), given)
    return states, kwargs


@dataclass
class Watcher(Observer):
    """Writes down what it is shown, and hides the first `hides` tokens from those after it."""

    name: str
    told: list[tuple[str, str]]
    layers: tuple[int, ...] = (0, 1)
    hides: int = 0
    views: list[LayerView] = field(default_factory=list)

    def wants(self, index: int) -> bool:
        return index in self.layers

    def after(self, run: DecoderRun, view: LayerView) -> LayerView:
        self.told.append((self.name, str(view.index)))
        self.views.append(view)
        return view.without_front(self.hides)

    def close(self, run: DecoderRun) -> None:
        self.told.append((self.name, "end"))


def test_observers_are_shown_each_layer_once_in_their_order() -> None:
    run, told = _run(), list[tuple[str, str]]()
    run.observers = [Watcher("first", told), Watcher("second", told, layers=(1,)), Observer()]
    for index in (0, 1, 1, 0):
        # A checkpoint runs layers again in a backward pass.
        states, kwargs = _inputs(run, index, torch.zeros(1, 12, 3))
        run.observe(index, states, kwargs)
    assert told == [("first", "0"), ("first", "1"), ("second", "1")]


def test_an_observer_sees_what_the_ones_before_it_left_and_what_is_tapped_as_a_constant() -> None:
    run, told = _run(), list[tuple[str, str]]()
    first, second = Watcher("first", told, hides=2), Watcher("second", told)
    run.observers = [first, second]
    states, kwargs = _inputs(run, 0, torch.arange(36.0).reshape(1, 12, 3))
    run.taps["q"] = torch.ones(1, 12, 5, requires_grad=True) * 2
    run.observe(0, (states, None), kwargs)
    assert first.views[0].hidden.shape == (1, 12, 3)
    assert not first.views[0].taps["q"].requires_grad
    assert torch.equal(second.views[0].hidden, states[:, 2:])
    assert second.views[0].taps["q"].shape == (1, 10, 5)
    assert second.views[0].embeddings[0].shape == (1, 10, 4)
    assert not run.taps


def test_a_shaper_says_which_tokens_a_layer_computes_and_where_the_inputs_own_are() -> None:
    class Last(Shaper):
        def enter(self, run: DecoderRun, index: int, states: Tensor) -> Entering:
            entering = run.alive_at(index, states)
            return replace(entering, states=entering.states[:, -3:]) if index else entering

        def mask(self, given: Any, places: Tensor | None, slots: Slots | None) -> Tensor | None:
            return torch.ones(1, 1, 3, 3)

        def leave(self, index: int, states: Tensor) -> Tensor:
            return states[:, 1:]

    run = _run()
    plain, kwargs = _inputs(run, 0, torch.zeros(1, 12, 3))
    assert plain.shape == (1, 12, 3)
    assert kwargs["attention_mask"] is None
    run.shaper = Last()
    states, kwargs = _inputs(run, 1, torch.zeros(1, 12, 3))
    assert states.shape == (1, 3, 3)
    assert kwargs["attention_mask"].shape == (1, 1, 3, 3)
    assert run.restore(torch.zeros(1, 13, 3), 1).shape == (1, 12, 3)


def test_an_image_counts_what_entered_and_what_the_layers_processed() -> None:
    span = _span(0)
    run = _run(spans=(span,))
    span.memories[0] = {"score": torch.arange(9), "name": "kept as it is"}
    _inputs(run, 0, torch.zeros(1, 12, 3))
    run.drop(span, Selection(torch.tensor([0, 4, 8])))
    _inputs(run, 1, torch.zeros(1, 12, 3))
    _inputs(run, 0, torch.zeros(1, 12, 3))
    assert span.entered.tolist() == list(range(9))
    assert span.processed == 9 + 3
    assert span.memories[0]["score"].tolist() == [0, 4, 8]
    assert span.memories[0]["name"] == "kept as it is"


def test_images_are_numbered_within_their_rows() -> None:
    assert numbers_in_rows([_span(0), _span(1), _span(0), _span(0), _span(1)]) == [0, 0, 1, 2, 1]


def test_noting_a_choice_waits_for_no_device() -> None:
    # A tensor on the meta device has no values, so reading one of them would raise.
    span = _span(0, "meta")
    before = span.kept
    recording = Recording(None, [span])  # type: ignore[arg-type]
    choice = Selection(torch.tensor([1, 3]), merges=(Merge(1, (1, 2), (0.5, 0.5)), Merge(3, (3,), (1.0,))))
    span.kept = before[:2]
    recording.dropped(span, before, choice, order=0, name="a method", layer=2)
    (layer, tokens, merges) = recording.of(span).merges[0]
    assert (layer, tokens is before, merges) == (2, True, choice.merges)


def test_merges_are_told_in_indices_of_the_whole_image() -> None:
    (trail,) = Trail.of([_span(0)]).images
    trail.merges.append((1, torch.tensor([2, 5, 8]), (Merge(1, (0, 1), (0.5, 0.5)),)))
    trail.merges.append((3, torch.tensor([5, 8]), (Merge(0, (0, 1), (0.25, 0.75)),)))
    assert trail.merged() == [(1, Merge(5, (2, 5), (0.5, 0.5))), (3, Merge(5, (5, 8), (0.25, 0.75)))]


def test_a_trail_keeps_no_pixels_and_follows_the_rows_of_the_cache() -> None:
    spans = [_span(0), _span(1)]
    shared = replace(spans[0].image, pixels=torch.zeros(3))
    spans[0].image = spans[1].image = shared
    trail = Trail.of(spans)
    assert [image.encoded.pixels for image in trail.images] == [None, None]
    assert trail.images[0].encoded is trail.images[1].encoded
    assert [image.row for image in still_there(trail.images, [1, 0, 1], 0)] == [1, 0, 2]
    assert still_there(trail.images, [0, 1], length=5) == []


def test_a_record_lies_with_its_cache_under_a_name_of_its_own() -> None:
    model, inputs = vtprune.wrap(make("llava-clip"), "grid", keep=4), prompt("llava-clip", ROWS["llava-clip"][:1])
    with torch.no_grad():
        cache = model(**inputs).past_key_values
    assert ATTRIBUTE != names.GENERATION
    assert isinstance(getattr(cache, names.GENERATION), Generation)
    assert not hasattr(cache, ATTRIBUTE)
    assert vtprune.report(cache).samples[0].images[0].kept == vtprune.report(model).samples[0].images[0].kept
    # Whatever else calls itself so is no record.
    other = type(cache)()
    setattr(other, ATTRIBUTE, getattr(cache, names.GENERATION))
    with pytest.raises(vtprune.VTPruneError, match="no wrapped model has filled this cache"):
        vtprune.report(other)


def test_an_interrupted_prefill_can_still_be_reported() -> None:
    model, inputs = vtprune.wrap(make("llava-clip"), "fastv", keep=0.5), prompt("llava-clip", ROWS["llava-clip"][:1])
    cache = type(model(**inputs).past_key_values)()
    layer = model.model.language_model.layers[3].self_attn
    handle = layer.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**inputs, **{PAST: cache})
    handle.remove()
    assert len(vtprune.report(cache).samples[0].images) == 1


def test_a_new_image_is_scored_by_its_own_keys_while_tokens_of_an_earlier_one_return(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The first image, a small one, drops before one layer alone; the second one before more of them.
    method = vtprune.LazyLLM(keep=0.3, schedule="entropy", layers=(1, 2, 3))
    model, seen = vtprune.wrap(make("qwen2.5-vl"), method), list[DecoderLayer]()
    original = vtprune.LazyLLM.prune_decoder

    def prune_decoder(self: vtprune.LazyLLM, layer: DecoderLayer) -> Selection | None:
        seen.append(layer)
        return original(self, layer)

    first, second = (prompt("qwen2.5-vl", [row]) for row in (Row([3, 7], [(2, 3)]), Row([4, 6], [(5, 7)], 5)))
    with torch.no_grad():
        cache = model(**first).past_key_values
        assert [index for index, layer in enumerate(cache.layers) if layer.waiting is not None] == [1]
        monkeypatch.setattr(vtprune.LazyLLM, "prune_decoder", prune_decoder)
        model(**second, **{PAST: cache})
    (step,) = vtprune.report(cache).samples[0].images[0].steps
    returned = [index for index, computed in enumerate(step.computed_per_layer) if computed]
    assert {layer.index for layer in seen} == {0, 1, 2}
    assert {1, 2} <= set(returned)
    image = first["input_ids"].shape[1] + int((second["input_ids"][0] == IMAGE).nonzero()[0])
    for layer in seen:
        held = cache.layers[layer.index]
        places = torch.arange(held.keys.shape[2]) if held.slots is None else held.slots[0]
        columns = (places == image + layer.indices[:, None]).int().argmax(dim=1)
        expected = held.keys[0][:, columns].repeat_interleave(2, dim=0)
        assert torch.allclose(layer.key[:, layer.vision], expected, atol=1e-6)


def test_things_in_a_cache_have_names_of_their_own_and_only_the_cache_knows_them() -> None:
    known = {name: value for name, value in vars(names).items() if name.isupper()}
    assert len(set(known.values())) == len(known)
    for path in [*PACKAGE.rglob("*.py")]:
        if path.parent.name in ("cache", "adapters") or "evals" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Attribute):
                literal = isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str)
                assert not (literal and node.value.attr in ("aux", "entries")), (path, node.lineno)
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                targets = {target.id for target in node.targets if isinstance(target, ast.Name)}
                assert not targets & known.keys(), (path, node.lineno)


def _imports(folder: str) -> Iterator[tuple[str, str]]:
    for path in (PACKAGE / folder).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                yield path.name, node.module
            if isinstance(node, ast.Import):
                yield from ((path.name, one.name) for one in node.names)


@pytest.mark.parametrize(
    ("folder", "above"),
    [
        ("cache", ("decoder", "encoder", "adapters", "report", "hooks", "wrap")),
        ("decoder", ("adapters", "report", "hooks", "wrap", "pruners")),
        ("report", ("decoder.run", "decoder.revival", "decoder.packing", "hooks", "wrap", "pruners")),
        ("hooks", ("wrap", "pruners")),
    ],
)
def test_imports_run_down_even_those_for_type_checking(folder: str, above: tuple[str, ...]) -> None:
    names_above = tuple(f"vtprune.{one}" for one in above)
    for file, module in _imports(folder):
        assert not f"{module}.".startswith(tuple(f"{one}." for one in names_above)), (folder, file, module)
