"""What the page is made of, without a server: options, links, fates, the lines of Python, what is lent."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import vtprune
from tests.checkpoint import random_qwen_checkpoint
from tests.clips import write_clip
from vtprune.assets import ASSETS, EXAMPLE_IMAGE
from vtprune.cli.app import app
from vtprune.errors import InputError, PictureError, VTPruneError
from vtprune.evals.demo import link
from vtprune.evals.demo.asking import ROWS, Finished, ask, check_question, cost_table, encoded, stream
from vtprune.evals.demo.curve import KEEPS, curve
from vtprune.evals.demo.fates import fates, sentence
from vtprune.evals.demo.models import Loaded, Models, load_models
from vtprune.evals.demo.options import AUTOMATIC, Kind, as_trained, changed, choosable, chosen, options_of
from vtprune.evals.demo.requests import media_of
from vtprune.evals.demo.snippet import snippet
from vtprune.evals.settings import Setting
from vtprune.loading.pictures import read_image
from vtprune.method.registry import pruner_class
from vtprune.report.report import ImageReport, MergeReport

QUESTION = "what is written on the yellow square?"
every_method = pytest.mark.parametrize("method", choosable())


@pytest.fixture(scope="module")
def loaded(models: Models) -> Loaded:
    return models["tiny-llava"]


def test_a_method_that_finds_its_keep_is_there_where_it_was_calibrated(models: Models, loaded: Loaded) -> None:
    setting = chosen(loaded, "auto", 25, "agreement=0.95")
    assert (setting.keep, setting.pruner()) == (None, vtprune.Auto(agreement=0.95))
    (one,) = finished(models, setting)
    assert one.report.samples[0].attempts
    assert "vtprune.wrap(model, 'auto:agreement=0.95')" in snippet(loaded, setting, QUESTION, tokens=8)
    other = dataclasses.replace(loaded, source="somewhere/else")
    with pytest.raises(InputError, match="method: choose one of"):
        chosen(other, "auto", 25)


def finished(models: Models, *settings: Setting) -> list[Finished]:
    labels = [str(place) for place in range(len(settings))]
    image = read_image(EXAMPLE_IMAGE)
    *_, last = ask(models, models.names[0], image, QUESTION, settings=settings, labels=labels, timed=False)
    assert last.complete
    return last.finished


@every_method
def test_each_field_of_a_method_is_a_control_with_a_line_of_help(loaded: Loaded, method: str) -> None:
    found = {option.name: option for option in options_of(method, loaded.facts)}
    elsewhere = {"keep", "keep_video", "_for_videos", "model", "clip", "head_file", "calibration", "promise", "task"}
    fields = {field.name for field in dataclasses.fields(pruner_class(method))} - elsewhere
    assert set(found) == fields
    for option in found.values():
        assert 10 < len(option.help) <= 160, option
        assert option.kind is not Kind.SLIDER or option.low <= option.value <= option.high
        assert option.kind is not Kind.CHOICE or option.value in option.choices


@every_method
def test_a_control_that_is_where_it_was_changes_nothing(loaded: Loaded, method: str) -> None:
    for option in options_of(method, loaded.facts):
        # What the page shows of a number that the method finds itself is an empty field.
        shown = "" if option.value is None else option.value
        assert changed(method, loaded.facts, "", option.name, shown) == ""


@every_method
def test_each_control_reaches_its_field_and_leaves_the_others(loaded: Loaded, method: str) -> None:
    for option in options_of(method, loaded.facts):
        value: Any = None
        if option.kind is Kind.SLIDER:
            value = option.high if option.value != option.high else option.low
        elif option.kind is Kind.SWITCH:
            value = not option.value
        elif option.kind is Kind.CHOICE:
            value = next(one for one in option.choices if one not in (option.value, AUTOMATIC))
        elif option.kind is Kind.LAYERS:
            value = "2, 3"
        if value is None:
            continue
        staged = method in ("fastv", "dart", "vscan", "spatten") and option.name == "layers"
        before = "schedule=steps" if staged else ""
        text = changed(method, loaded.facts, before, option.name, value)
        assert text.startswith(before)
        held = getattr(chosen(loaded, method, 50, text).pruner(), option.name)
        assert held == ((2, 3) if option.kind is Kind.LAYERS else value)
        # Moved back, it is as if nobody had touched it.
        back = "" if option.kind is Kind.LAYERS else option.value
        assert changed(method, loaded.facts, text, option.name, back) == before


def test_numbers_are_typed_and_what_is_none_is_told_when_it_is_asked_with(loaded: Loaded) -> None:
    facts = loaded.facts
    assert changed("fastv", facts, "layers=(2,)", "ratio", "0.3") == "layers=(2,),ratio=0.3"
    assert changed("fastv", facts, "layers=(2,),ratio=0.3", "ratio", "") == "layers=(2,)"
    assert changed("turbo", facts, "", "r", "3") == "r=3"
    for method, name, value in (("fastv", "ratio", "half"), ("fastv", "layers", "2, x")):
        with pytest.raises(VTPruneError, match=name):
            chosen(loaded, method, 50, changed(method, facts, "", name, value)).pruners()


@pytest.mark.parametrize("text", ["cell=1e-9", "cell=0.01", "cell=1000000", "alpha=7"])
def test_what_no_slider_reaches_is_refused(loaded: Loaded, text: str) -> None:
    with pytest.raises(InputError, match=r"is chosen from .* to .* here"):
        chosen(loaded, "vflowopt", 50, text)


def test_a_video_is_no_picture_whatever_its_name_says(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4")
    with pytest.raises(InputError, match=r"^image: this is a video; a model that takes videos has a place of its own"):
        media_of(str(path), None)
    with pytest.raises(PictureError, match=r"cannot read the picture: .*its format is not known"):
        media_of(str(path.rename(tmp_path / "clip.png")), None)


def test_half_a_character_is_no_question(loaded: Loaded) -> None:
    with pytest.raises(InputError, match="half a character"):
        check_question(loaded, "why \ud800?")


def test_what_was_trained_comes_with_its_own_model_alone() -> None:
    models = load_models([])
    plain, trained = models["tiny-llava"], models["tiny-llava-pmod"]
    assert (as_trained(plain), as_trained(trained)) == ("", "pmod, as trained")
    assert chosen(trained, "pmod, as trained", 25).folder == str(ASSETS / "tiny-llava-pmod")
    with pytest.raises(InputError, match="method: choose one of"):
        chosen(plain, "pmod, as trained", 25)


def test_a_link_says_what_it_said_and_nothing_else(models: Models) -> None:
    said = {"model": "tiny-llava", "method": "holov", "keep": "12", "options": "tau=2.0", "question": "why?"}
    assert dataclasses.astuple(link.read(said, models)) == ("tiny-llava", "holov", 12.0, "tau=2.0", "why?")
    odd = {"model": "/etc/passwd", "method": "../x", "keep": "nan", "question": "x" * 5000}
    found = link.read(odd, models)
    assert (found.model, found.method, found.keep) == ("tiny-llava", link.METHOD, link.KEEP)
    assert len(found.question) == 2000


def test_a_patch_is_told_where_it_went() -> None:
    merged = [MergeReport(into=0, members=[0, 1], weights=[0.5, 0.5], layer=3, stage="encoder")]
    report = ImageReport((1, 2, 3), 6, kept=[0, 2, 3], kept_per_layer=[[0, 2, 3], [0, 3], [0, 2]], merged=merged)
    assert [sentence(report, token).partition(": ")[2] for token in range(6)] == [
        "stays in all 3 decoder layers, holding 1 other.",
        "flowed into row 1, column 1 in layer 3 of the vision encoder.",
        "computed in 2 of 3 decoder layers (0, 2).",
        "left before decoder layer 2 (counted from 0).",
        "never entered the decoder.",
        "never entered the decoder.",
    ]
    drawn = fates([read_image(EXAMPLE_IMAGE)], report, "x")
    assert drawn["alive"] == ["101100", "101100", "100100", "101000"]
    assert drawn["counts"] == [3, 3, 2, 2]
    assert (drawn["groups"], drawn["holders"]) == ([0, 0, -1, -1, -1, -1], [0])


def test_the_lines_of_python_do_what_the_page_did(models: Models, loaded: Loaded, capsys: Any) -> None:
    setting = chosen(loaded, "flowcut", 20)
    answer = finished(models, setting)[0]
    lines = snippet(loaded, setting, QUESTION, tokens=20, picture=str(EXAMPLE_IMAGE))
    exec(compile(lines, "snippet", "exec"), {})
    told = capsys.readouterr().out
    assert told.splitlines()[0] == answer.answer.text.strip()
    assert f"kept {answer.report.kept_tokens:.4g} of 144 tokens an image" in told


def test_a_qwen_checkpoint_is_served_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtprune.evals.demo.asking.LONGEST_ANSWER", 3)
    method = "pyramid_drop"
    models = load_models([random_qwen_checkpoint()])
    name = models.names[0]
    own, image = chosen(models[name], method, 40), read_image(EXAMPLE_IMAGE)
    settings = [Setting("none"), own]
    *_, last = ask(models, name, image, "why?", settings=settings, labels=["unpruned", "pruned"])
    report = last.finished[1].report.samples[0].images[0]
    drawn = fates([image], report, method)
    assert len(drawn["words"]) == report.tokens == drawn["columns"] * drawn["rows"] == len(drawn["cells"])
    assert drawn["counts"][-1] < report.tokens
    *_, points = curve(models, name, image, "why?", setting=lambda keep: chosen(models[name], method, keep))
    # Random weights: what the unpruned model said first, a pruned one thinks nothing of.
    assert all(0 <= point.plain <= 1 for point in points if not point.refused)
    assert [cells[0] for cells in cost_table(last.finished)] == list(ROWS)


def test_a_patch_is_told_that_it_returned_or_left_caches(models: Models, loaded: Loaded) -> None:
    words = [
        " ".join(fates([read_image(EXAMPLE_IMAGE)], one.report.samples[0].images[0], "x")["words"])
        for one in finished(models, chosen(loaded, "lazyllm", 40), chosen(loaded, "d2o", 40))
    ]
    assert "left before decoder layer 1 (counted from 0); returned at decode step 1." in words[0]
    assert "after the prompt in 0 of the 12 cut caches of heads." in words[1]


def test_replicas_share_weights_and_nothing_else(models: Models, loaded: Loaded) -> None:
    with models.lent("tiny-llava") as one, models.lent("tiny-llava") as other:
        for first, second, base in zip(one.parameters(), other.parameters(), loaded.model.parameters(), strict=True):
            assert first.data_ptr() == second.data_ptr() == base.data_ptr()
        vtprune.wrap(one, "fopru", keep=9)
        assert not vtprune.is_wrapped(other)
        assert not vtprune.is_wrapped(loaded.model)
        vtprune.unwrap(one)
        assert models.busy == 2
    assert models.busy == 0


def test_who_stops_listening_stops_the_answer(models: Models, loaded: Loaded) -> None:
    image, settings = read_image(EXAMPLE_IMAGE), [chosen(loaded, "grid", 50)]
    running = ask(models, "tiny-llava", image, QUESTION, settings=settings, labels=["a"], timed=False)
    next(running)
    assert models.busy == 1
    running.close()
    assert models.busy == 0


def test_an_error_while_answering_reaches_who_asked(
    models: Models, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Iterator[None]:
        raise RuntimeError("out of memory")

    with models.lent("tiny-llava") as model:
        monkeypatch.setattr("vtprune.evals.demo.asking.answer_batch", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            list(stream(model, loaded.processor, {}, Setting("none"), stopped=lambda: False))
        assert not vtprune.is_wrapped(model)


def test_confidence_is_the_probability_that_a_forward_over_the_whole_answer_gives(
    models: Models, loaded: Loaded
) -> None:
    image = read_image(EXAMPLE_IMAGE)
    *_, last = curve(models, "tiny-llava", image, QUESTION, setting=lambda keep: chosen(loaded, "fopru", keep))
    assert [point.keep for point in last] == list(KEEPS)
    inputs = encoded(loaded, image, QUESTION)
    answer = loaded.processor.tokenizer(last[0].text, add_special_tokens=False, return_tensors="pt").input_ids
    whole = {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], answer], dim=1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(answer)], dim=1),
    }
    with torch.no_grad():
        logits = loaded.model(**whole).logits[0, -answer.shape[1] - 1 : -1]
    expected = logits.log_softmax(dim=-1).gather(1, answer[0][:, None]).mean().exp()
    assert math.isclose(last[0].own, float(expected), rel_tol=1e-4)
    assert last[0].own == last[0].plain


def test_without_gradio_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    done = CliRunner().invoke(app, ["demo"])
    assert done.exit_code == 2
    assert "pip install 'vtprune[demo]'" in done.output
