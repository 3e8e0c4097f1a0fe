"""auto in the commands: a row of its own in a sweep, its folder, and what comes with the bundled models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import vtprune
from tests.evals.tuning import private_environment, run  # noqa: F401 (a fixture of every test here)
from vtprune.assets import BUNDLED, CALIBRATIONS, EXAMPLE_IMAGE
from vtprune.evals.settings import all_methods, build_settings, for_videos_alone, grows, measurable, takes_keep
from vtprune.evals.speed import launches, speed
from vtprune.evals.speed.timing import measure_prefill
from vtprune.loading.model import load_model
from vtprune.loading.pictures import open_picture
from vtprune.loading.prompts import encode, place, question


def test_a_sweep_has_one_row_of_each_agreement_whatever_the_keeps() -> None:
    found = build_settings(["auto", "auto:agreement=0.95", "grid"], [0.5, 0.25])
    assert [(one.label, one.keep) for one in found] == [
        ("none", None), ("auto", None), ("auto:agreement=0.95", None), ("grid", 0.5), ("grid", 0.25),
    ]  # fmt: skip
    assert [one.finds_keep for one in found] == [False, True, True, False, False]
    assert not takes_keep("auto")
    assert "auto" in all_methods()


@pytest.mark.parametrize("name", list(BUNDLED))
def test_a_bundled_model_comes_with_a_promise_that_its_calibration_gives(name: str) -> None:
    model, processor = load_model(name)
    inputs = place(encode(processor, [question(open_picture(EXAMPLE_IMAGE), "what is written?")]), model)
    with vtprune.wrapped(model, "auto", agreement=0.98):
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert vtprune.report(model).samples[0].attempts
    # The folder's config has the promise in it, which is compared.
    with vtprune.wrapped(model, str(CALIBRATIONS[name])):
        pass
    (setting,) = build_settings([str(CALIBRATIONS[name])], [0.5])[1:]
    with vtprune.wrapped(model, setting.method_source):
        pass


def test_times_of_a_growing_method_are_to_the_first_token_with_all_attempts() -> None:
    model, processor = load_model("tiny-llava")
    ran: list[int] = []
    handle = model.model.language_model.register_forward_hook(lambda *args: ran.append(1))
    inputs = encode(processor, [question(open_picture(EXAMPLE_IMAGE), "how many circles are there?")])
    times = measure_prefill(
        model, [inputs], {"unpruned": None, "ours": "auto:agreement=0.999,confidence=0.5"}, rounds=1
    )
    handle.remove()
    assert set(times.milliseconds) == {"unpruned", "ours"}
    assert len(ran) >= 4


def test_what_a_wrapped_model_does_only_once_is_not_timed() -> None:
    model, processor = load_model("tiny-llava")
    inputs = [encode(processor, [question(open_picture(EXAMPLE_IMAGE), f"{number} circles?")]) for number in range(5)]
    ran: list[bool] = []
    handle = model.model.language_model.register_forward_hook(lambda *args: ran.append(vtprune.is_wrapped(model)))
    times = measure_prefill(model, inputs, {"unpruned": None, "ours": "grid:keep=0.5"}, rounds=2)
    handle.remove()
    assert {name: len(own) for name, own in times.milliseconds.items()} == {"unpruned": 10, "ours": 10}
    # Four prompts in a row and one, each row after one more.
    assert ran == [*[False] * 5, *[True] * 5, *[False] * 2, *[True] * 2] * 2


def test_the_bench_and_ask_run_it(tmp_path: Path) -> None:
    result = run("bench", "--methods", "none,auto", "--limit", "5", "--output", tmp_path / "bench")
    assert result.exit_code == 0, result.output
    settings = json.loads((tmp_path / "bench" / "results.json").read_text())["settings"].values()
    assert [one["label"] for one in settings] == ["none", "auto"]
    answered = run("ask", EXAMPLE_IMAGE, "what is written?", "--method", "auto", "--output", tmp_path / "a.png")
    assert answered.exit_code == 0, answered.output
    refused = run("ask", EXAMPLE_IMAGE, "what?", "--method", "auto", "--keep", "0.5", "--output", tmp_path / "b.png")
    assert refused.exit_code == 2
    assert "leave out --keep" in refused.output


def test_measurements_of_one_prefill_take_every_method_but_those_that_run_others() -> None:
    known = {name for name in vtprune.available() if not grows(name)}
    assert set(measurable([])) == {name for name in known if not for_videos_alone(name)}
    assert set(measurable([], videos=True)) == known
    assert measurable(["fastv:keep=9", "grid+fastv"]) == ["fastv:keep=9", "grid+fastv"]


@pytest.mark.parametrize("command", [launches.main, speed.main])
def test_the_measurements_refuse_by_name_what_runs_another_method(command: Callable[..., None]) -> None:
    app = typer.Typer()
    app.command()(command)
    told = CliRunner().invoke(app, ["--methods", "fopru,auto"])
    assert told.exit_code == 2
    assert "auto runs another method, several times if need be" in told.output
