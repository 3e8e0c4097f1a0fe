"""Compiled layers stay compiled from prompt to prompt under methods that keep fixed counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer
from typer import Typer
from typer.testing import CliRunner

import vtprune
from tests.evals.test_overhead import TINY
from vtprune.errors import VTPruneError
from vtprune.evals.speed import overhead
from vtprune.evals.speed.compiling import CPU, METHODS, main, measure, prompts
from vtprune.evals.speed.overhead import Size, build_model


@pytest.fixture(scope="module")
def model() -> Any:
    return build_model(TINY, CPU, torch.float32)


@pytest.mark.parametrize(("method", "cached"), [*((one, False) for one in METHODS.split(",")), ("fastv", True)])
def test_later_prompts_compile_nothing(model: Any, method: str, cached: bool) -> None:
    found = measure(model, list(prompts(TINY, 5)), method, 0.7, cached=cached, backend="eager")
    assert (found.added, found.breaks) == (0, 0)
    assert found.graphs >= 2
    assert found.difference < 1e-5


def test_counts_that_change_compile_anew(model: Any) -> None:
    given = list(prompts(TINY, 2))
    more = [{**one, "input_ids": one["input_ids"][:, : -2 * turn]} for turn, one in enumerate(prompts(TINY, 3), 1)]
    found = measure(model, [*given, *more], "grid", 0.7, cached=False, backend="eager")
    assert found.added > 0


def test_a_graph_without_hooks_is_not_taken_in_silence(model: Any) -> None:
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    torch.compiler.reset()
    with vtprune.wrapped(model, "fopru", keep=16), torch.no_grad():
        for layer in layers:
            layer.compile(backend="eager")
        try:
            with pytest.raises(VTPruneError, match="skip_nnmodule_hook_guards is False"):
                model(**next(prompts(TINY, 1)))
        finally:
            for layer in layers:
                layer._compiled_call_impl = None
            torch.compiler.reset()


@pytest.mark.slow
def test_the_command_prints_a_line_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(overhead.SIZES, Size.small, TINY)
    app = Typer()
    app.command()(main)
    done = CliRunner().invoke(app, ["--methods", "grid", "--keep", "25%", "--prompts", "3"])
    assert done.exit_code == 0, done.output
    assert "unpruned" in done.output
    assert "3 prompts, with a cache" in done.output
    refused = CliRunner().invoke(app, ["--methods", "grit", "--prompts", "3"])
    assert refused.exit_code == 2
    assert "did you mean" in refused.output
