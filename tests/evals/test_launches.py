"""Launches and read-backs are counted exactly, and what methods add to them stays within its bound."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from vtprune.evals.speed.launches import Counts, count_all, counting, main

# Of unpruned: methods that act once before the decoder, or once in it.
ONCE = {"none": 1.03, "grid": 1.10, "random": 1.10, "pool": 1.10, "fopru": 1.10, "covipal": 1.10, "fastv": 1.10}
STEP = 1.03


def test_views_launch_nothing_and_everything_else_does() -> None:
    states = torch.ones(4, 6)
    with counting() as counts:
        states.view(2, 12).transpose(0, 1)[3:].unsqueeze(0).detach()
    assert (counts.launched, counts.read) == (0, 0)
    with counting() as counts:
        (states @ states.mT).softmax(dim=-1)
    assert counts.launched == 2


@pytest.mark.parametrize(
    "wait",
    [
        lambda one: one.max().item(), lambda one: bool((one > 0).all()), lambda one: int(one[0]),
        lambda one: one.tolist(), lambda one: one.nonzero(), lambda one: one[one > 2], lambda one: one.unique(),
        lambda one: torch.equal(one, one), lambda one: one.repeat_interleave(one), lambda one: one.cpu(),
        lambda one: one.index_put((one > 2,), one[0]),
    ],
)  # fmt: skip
def test_what_python_waits_for_is_a_read_back(wait: object) -> None:
    values = torch.arange(5)
    with counting() as counts:
        wait(values)  # type: ignore[operator]
    assert counts.read == 1


def test_what_needs_no_answer_is_none() -> None:
    values = torch.arange(5)
    with counting() as counts:
        values.repeat_interleave(values, output_size=10)
        values[values.clamp(min=2)].masked_fill(values > 2, 0).cumsum(dim=0)
    assert counts.read == 0


def test_places_are_lines_of_this_project_and_the_model_is_left_alone() -> None:
    found = count_all("llava", 1, ["fopru"])
    assert {place for _, place in found[""].prefill.launches} == {""}
    places = {place.partition(":")[0] for _, place in found["fopru"].prefill.launches}
    assert "vtprune/pruners/fopru.py" in places
    ours = Counts(found["fopru"].prefill.launches - found[""].prefill.launches)
    assert ours.launched < found["fopru"].prefill.launched / 10


def test_methods_stay_within_their_launches() -> None:
    found = count_all("llava", 1, list(ONCE))
    plain = found.pop("")
    for method, own in found.items():
        assert own.prefill.launched <= ONCE[method] * plain.prefill.launched, method
        for step in (own.first, own.later):
            assert step.launched <= STEP * plain.later.launched, method
            assert step.read == plain.later.read, method


@pytest.mark.parametrize("kind", ["llava", "qwen"])
def test_rows_of_a_batch_wait_together(kind: str) -> None:
    one, eight = (count_all(kind, batch, ["random"]) for batch in (1, 2))
    extra = [found["random"].prefill.read - found[""].prefill.read for found in (one, eight)]
    assert extra[1] <= 2 * extra[0]


def test_the_command_prints_and_writes_what_it_counted(tmp_path: Path) -> None:
    app = Typer()
    app.command()(main)
    file = tmp_path / "counts.json"
    done = CliRunner().invoke(app, ["--methods", "grid", "--detail", "--output", str(file)])
    assert done.exit_code == 0, done.output
    assert "grid: a prefill" in done.output
    written = json.loads(file.read_text())
    assert written["unpruned"]["prefill"]["read_backs"] < written["grid"]["prefill"]["read_backs"]
    refused = CliRunner().invoke(app, ["--model", "bert"])
    assert refused.exit_code == 2
    assert "model is one of llava, qwen, got 'bert'" in refused.output.replace("\n", " ")
