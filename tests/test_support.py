"""Every method on every family and every kind of prompt: what is dropped is what the unpruned model does without.

`make test-all` runs all of it, and writes the support table (`adapters/support.md`) from what it saw.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import vtprune
from tests import support
from tests.clip_towers import TOWERS, masked, watched
from tests.deleted import run_deleted
from tests.growing import GREEDY, Given, alone, assert_as_alone, between
from tests.matrix import CACHE, DROPS, GATED, PRUNERS, RELEASED, TEMPORAL, label
from tests.models import ANYRES, HYBRIDS, MODELS, SHOWN, make, prompt, shown_rows, takes
from tests.oracle import TOLERANCE, compare, image_features, run_masked, run_wrapped
from vtprune.adapters import adapter_for
from vtprune.method.pruner import Pruner
from vtprune.method.registry import available
from vtprune.method.stages import encoder_layers, revives

# What heads hold, or gates weigh, is no mask of whole tokens: these have references of their own.
UNMASKED = CACHE + GATED
NO_VIDEOS = "the family takes images alone: a video is refused by name"
# Methods that a decoder with linear attention has no place for; of others it may refuse single settings.
NO_PLACE = {
    "spatten": "refused by name: it ranks tokens before every layer, and most layers have no attention to rank by",
    "lazyllm": "refused by name: a state that tokens have left cannot be opened again for those that return",
    "pmod": "refused by name: what a token that skips a layer leaves in its state is not defined",
    "mue": "refused by name: what a token that skips a layer leaves in its state is not defined",
    "random_ltd": "refused by name: what a token that skips a layer leaves in its state is not defined",
    "gamma_mod": "refused by name: what a token that skips a layer leaves in its state is not defined",
}
# Methods that act in the encoder, of a video whose tokens are means of patches; of MustDrop single settings may act.
POOLED = "refused by name: a token of a video is the mean of several patches, which cannot be dropped by themselves"
IN_ENCODER = ("flowcut", "turbo", "tome", "visionzip", "vispruner", "mustdrop", "vscan", "iared2", "test_drops")
# Those of them that drop nothing by itself.
MERGING = {"mustdrop": "mustdrop:merge_threshold=0.1", "tome": "tome:keep=9"}
# One that acts before the decoder, one inside it, one in the encoder.
GROWING = [Given(method=method) for method in ("grid", "fastv", "turbo")]
NO_DECODER = "refused by name: it acts before or inside a decoder, and there is none"
NO_ANSWERS = "refused by name: it compares answers, and a vision encoder alone gives none"
UNTRAINED = "refused by name: it brings weights that are trained with a decoder behind them"
KINDS = [*MODELS, *ANYRES, *HYBRIDS]


@pytest.fixture
def says(record_property: Callable[[str, Any], None], request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Notes what the test found of its cell of the table."""
    params = request.node.callspec.params
    name = "auto" if isinstance(params["pruner"], Given) else params["pruner"].name
    cell = [name, params["kind"], params["shown"]]
    return lambda text: record_property("support", [*cell, text])


def refuses_videos(kind: str, pruner: Pruner) -> bool:
    """Whether a family that takes no videos says so."""
    inputs = prompt(kind, shown_rows(kind, "an image"))
    model = vtprune.wrap(make(kind), pruner)
    with torch.no_grad(), pytest.raises(vtprune.VTPruneError, match="video inputs are not supported"):
        model(**inputs, pixel_values_videos=inputs["pixel_values"])
    return True


def is_refused(kind: str, pruner: Pruner, shown: str, says: Callable[[str], None]) -> bool:
    """Whether a decoder with linear attention has no place for a method, or for this setting of it, or a method acts
    on patches that tokens are only means of."""
    if kind in ANYRES and "video" in shown and pruner.name in IN_ENCODER:
        return _refuses_pooled(kind, pruner, shown, says)
    if kind not in HYBRIDS:
        return False
    layers, schedule = getattr(pruner, "layers", None), getattr(pruner, "schedule", "")
    if pruner.name not in NO_PLACE and not layers and schedule != "linear":
        return False
    if pruner.name not in NO_PLACE and not _refused(kind, pruner):
        return False
    assert _refused(kind, pruner)
    if pruner.name in NO_PLACE:
        says(NO_PLACE[pruner.name])
    return True


def has_no_place(kind: str, pruner: Pruner, shown: str, says: Callable[[str], None]) -> bool:
    """Whether a family takes no videos, or has no place for a method; what it refuses it refuses by name."""
    if not takes(kind, shown):
        assert refuses_videos(kind, pruner)
        says(NO_VIDEOS)
        return True
    return is_refused(kind, pruner, shown, says)


def _refuses_pooled(kind: str, pruner: Pruner, shown: str, says: Callable[[str], None]) -> bool:
    if not encoder_layers(pruner.bind(adapter_for(make(kind)).facts())):
        return False
    model = vtprune.wrap(make(kind), pruner)
    with torch.no_grad(), pytest.raises(vtprune.VTPruneError, match=f"{pruner.name} prunes inside the vision encoder"):
        model(**prompt(kind, shown_rows(kind, shown)))
    if pruner.name != "mustdrop":
        says(POOLED)
    return True


def _refused(kind: str, pruner: Pruner) -> bool:
    try:
        vtprune.wrap(make(kind), pruner)
    except vtprune.UnsupportedModelError as error:
        return pruner.name in str(error)
    return False


def found_of(pruner: Pruner, shown: str) -> str:
    """What a cell says where the method does what it is to do."""
    return support.WHOLE if pruner in TEMPORAL and "video" not in shown else support.YES


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shown", SHOWN)
@pytest.mark.parametrize("pruner", DROPS + PRUNERS + RELEASED + TEMPORAL, ids=label)
@pytest.mark.parametrize("kind", KINDS)
def test_dropping_equals_masking_whatever_is_shown(
    kind: str, pruner: Pruner, shown: str, attention: str, padding: str, says: Callable[[str], None]
) -> None:
    if has_no_place(kind, pruner, shown, says):
        return
    # A state would take in what pads a row behind its tokens.
    inputs = prompt(kind, shown_rows(kind, shown), "left" if kind in HYBRIDS else padding)
    model = vtprune.wrap(make(kind, attention), pruner)
    logits, report, cache = run_wrapped(kind, model, inputs)
    features = image_features(model, inputs)
    vtprune.unwrap(model)
    if revives(pruner):
        report = vtprune.report(cache)
    # Released code numbers positions anew where they are 1-D.
    compact = pruner.renumbers and not kind.startswith("qwen")
    if kind in HYBRIDS:
        expected = run_deleted(kind, model, inputs, report, features)
    else:
        expected = run_masked(kind, model, inputs, report, features, compact=compact)
    assert compare(logits, expected, inputs) < TOLERANCE
    for sample in report.samples:
        for image in sample.images:
            assert sum(image.kept_per_part) == len(image.kept)
            assert pruner not in TEMPORAL or image.kind == "video" or len(image.kept) == image.tokens
    says(found_of(pruner, shown))


@pytest.mark.parametrize("shown", SHOWN)
@pytest.mark.parametrize("pruner", UNMASKED, ids=label)
@pytest.mark.parametrize("kind", KINDS)
def test_what_no_mask_describes_is_the_same_in_a_batch_as_alone(
    kind: str, pruner: Pruner, shown: str, says: Callable[[str], None]
) -> None:
    if has_no_place(kind, pruner, shown, says):
        return
    model = vtprune.wrap(make(kind), pruner)
    rows = shown_rows(kind, shown)
    together, _, _ = run_wrapped(kind, model, prompt(kind, rows))
    steps = together.shape[1] - prompt(kind, rows)["input_ids"].shape[1]
    for number, row in enumerate(rows):
        alone, _, _ = run_wrapped(kind, model, prompt(kind, [row]), row=number)
        assert float((alone[0, -steps:] - together[number, -steps:]).abs().max()) < TOLERANCE
    says(found_of(pruner, shown))


@pytest.mark.parametrize("shown", SHOWN)
@pytest.mark.parametrize("pruner", GROWING, ids=lambda pruner: f"auto-{pruner.method}")
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_grows_is_answered_as_its_level_alone_answers(
    kind: str, pruner: Given, shown: str, says: Callable[[str], None]
) -> None:
    # Where the method that it runs is refused, another one of those above has the say.
    if has_no_place(kind, pruner.inner, shown, lambda text: says(text) if text == NO_VIDEOS else None):
        return
    inputs = prompt(kind, shown_rows(kind, shown))
    known = alone(kind, inputs, pruner.inner.name)
    shared = not encoder_layers(pruner.inner.bind(adapter_for(make(kind)).facts()))
    for threshold in (0.0, between(kind, inputs, pruner.inner.name), 2.0):
        with vtprune.wrapped(make(kind), replace(pruner, threshold=threshold)) as model:
            answers, report = model.generate(**inputs, **GREEDY), vtprune.report(model)
        assert_as_alone(answers, report, known, shared=shared)
    says(support.YES)


@pytest.mark.parametrize("shown", SHOWN)
@pytest.mark.parametrize("pruner", PRUNERS + CACHE + TEMPORAL, ids=label)
@pytest.mark.parametrize("kind", KINDS)
def test_keeping_everything_generates_what_the_unpruned_model_does(
    kind: str, pruner: Pruner, shown: str, says: Callable[[str], None]
) -> None:
    if not takes(kind, shown):
        assert refuses_videos(kind, pruner)
        return
    if is_refused(kind, pruner, shown, says):
        return
    inputs, model = prompt(kind, shown_rows(kind, shown)), make(kind)
    options = {"max_new_tokens": 3, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    expected = model.generate(**inputs, **options).scores
    with vtprune.wrapped(model, pruner.name, keep=1.0):
        actual = model.generate(**inputs, **options).scores
    assert all(map(torch.equal, actual, expected))


def test_the_table_names_a_cell_that_was_not_run_and_one_whose_settings_differ(tmp_path: Path) -> None:
    page, shown = tmp_path / "support.md", ["an image", "a video"]
    found = {("evs", "qwen", "an image"): ["whole", "whole"], ("evs", "qwen", "a video"): ["yes"]}
    support.write(page, found, {"qwen": shown})
    assert "| `evs` | whole | yes |" in page.read_text()
    support.write(page, {**found, ("evs", "qwen", "a video"): ["no frames here"]}, {"qwen": shown})
    assert "| `evs` | whole | [1] |" in page.read_text()
    assert "1. no frames here" in page.read_text()
    grid = {("grid", "qwen", one): ["yes"] for one in shown}
    with pytest.raises(ValueError, match="pool on qwen, a video: not run"):
        support.write(page, {**grid, ("pool", "qwen", "an image"): ["yes"]}, {"qwen": shown})
    # What was run is written all the same.
    assert "| `evs` | whole | [1] |\n| `grid` | yes | yes |" in page.read_text()
    with pytest.raises(ValueError, match="evs on qwen, a video: no frames here, yes"):
        support.write(page, {**found, ("evs", "qwen", "a video"): ["yes", "no frames here"]}, {"qwen": shown})
    with pytest.raises(ValueError, match="evs on llava, an image: not run"):
        support.write(page, found, {"qwen": shown, "llava": shown})


def test_the_table_is_read_as_it_is_written() -> None:
    page = (Path(vtprune.adapters.__path__[0]) / "support.md").read_text()
    kinds: dict[str, list[str]] = {}
    for _, kind, shown in (cells := support.read(page)):
        kinds[kind] = [*kinds.get(kind, []), *([] if shown in kinds.get(kind, []) else [shown])]
    assert support.table(cells, kinds) == page


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("method", [name for name in available() if not name.startswith("test_")])
def test_a_tower_alone_runs_what_acts_in_it_and_refuses_the_rest(
    method: str, tower: str, record_property: Callable[[str, Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def says(text: str) -> None:
        record_property("support", [method, support.ALONE, tower, text])

    model = TOWERS[tower]()
    pixels = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        if method == "none":
            plain = model.encode_image(pixels)
            with vtprune.wrapped(model, method):
                assert torch.equal(model.encode_image(pixels), plain)
        elif method == "iared2":
            with pytest.raises(vtprune.VTPruneError, match="weights that are trained with a decoder"):
                vtprune.wrap(model, method)
            says(UNTRAINED)
            return
        elif method == "auto":
            with pytest.raises(vtprune.VTPruneError, match="compares answers, and a vision encoder alone gives none"):
                vtprune.wrap(model, method)
            says(NO_ANSWERS)
            return
        elif method not in IN_ENCODER:
            with pytest.raises(vtprune.VTPruneError, match=r"decoder|image tokens|videos"):
                vtprune.wrap(model, method)
            says(NO_DECODER)
            return
        elif method in MERGING:
            assert_rows_alone(model, pixels, MERGING[method])
        else:
            drops = {"flowcut": "keep=7", "turbo": "keep=9,merge=False", "visionzip": "keep=9,merge=False,cls=False"}
            drops["vispruner"] = "keep=9"
            drops["vscan"] = "keep=9,merge=False,window=2"
            alive = watched(monkeypatch, 3, layers=6, tokens=36)
            with vtprune.wrapped(model, f"{method}:{drops[method]}"):
                found = model.encode_image(pixels)
            torch.testing.assert_close(found, masked(model, pixels, alive), atol=2e-6, rtol=0)
            monkeypatch.undo()
            assert_rows_alone(model, pixels, f"{method}:keep=9")
    says(support.YES)


def assert_rows_alone(model: Any, pixels: torch.Tensor, method: str) -> None:
    """A batch is embedded as its pictures alone."""
    with vtprune.wrapped(model, method):
        alone = torch.cat([model.encode_image(image[None]) for image in pixels])
        torch.testing.assert_close(model.encode_image(pixels), alone, atol=5e-6, rtol=0)
