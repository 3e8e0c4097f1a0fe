"""The profile of a prefill at a tiny size: that its parts are right, not how long they take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

import vtprune
from tests.evals.test_overhead import TINY
from vtprune.evals.speed import overhead
from vtprune.evals.speed.overhead import Size, build_inputs, build_model
from vtprune.evals.speed.profiling import Line, main, profile, summary

CPU = torch.device("cpu")


def test_a_part_is_promised_the_share_of_its_flops_and_the_sum_that_of_all() -> None:
    model, inputs = build_model(TINY, CPU, torch.float32), build_inputs(TINY, CPU, torch.float32)
    found = {line.name: line for line in profile(model, inputs, vtprune.FoPru(keep=4), 2)}
    products, whole = found["decoder: matrix products"], found["all"]
    with vtprune.wrapped(model, "fopru", keep=4):
        model(**inputs, use_cache=True)
        report = vtprune.report(model)
    assert whole.promised / whole.plain == pytest.approx(report.flops / report.flops_full)
    assert 0 < products.promised < products.plain
    # FoPru leaves the tower whole, and what it does itself was not there before.
    tower = found["tower: matrix products"]
    assert tower.promised == pytest.approx(tower.plain)
    assert found["vtprune/pruners/fopru.py"].plain == 0 < found["vtprune/pruners/fopru.py"].pruned
    assert whole.pruned == pytest.approx(sum(line.pruned for name, line in found.items() if name != "all"))


def test_what_lies_above_the_promise_is_told_apart_for_each_method() -> None:
    lines = [
        Line("decoder: attention", 0.5, 0.2, 0.1),
        Line("vtprune/pruners/fastv.py", 0.0, 0.004, 0.0),
        Line("adapters/decoder_side.py", 0.0, 0.002, 0.0),
        Line("Python between operations", 0.1, 0.13, 0.1),
        Line("tower: matrix products", 0.3, 0.25, 0.3),
        Line("all", 0.9, 0.586, 0.5),
    ]
    columns = [list(column.cells) for column in summary({"fastv": lines}).columns]
    assert columns == [["fastv"], ["500.0"], ["6.0"], ["30.0"], ["50.0"], ["86.0"]]


def test_the_command_writes_a_line_a_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(overhead.SIZES, Size.small, TINY)
    app, output = Typer(), tmp_path / "profile.json"
    app.command()(main)
    given = ["grid,turbo", "--keep", "25%", "--rounds", "1", "--size", "small", "--output", str(output)]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    assert "grid: milliseconds of a prefill" in done.output
    assert "above what the FLOPs promise" in done.output
    assert set(json.loads(output.read_text())["methods"]) == {"grid", "turbo"}
    refused = CliRunner().invoke(app, ["grid", "--keep", "250%"])
    assert refused.exit_code != 0
