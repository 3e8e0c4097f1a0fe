"""The overhead measurement at a tiny size: that it measures, not what."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from vtprune.errors import VTPruneError
from vtprune.evals.speed import overhead
from vtprune.evals.speed.overhead import (
    ModelSize,
    Pairs,
    Size,
    build_inputs,
    build_model,
    measure,
)
from vtprune.report.costs import flops

TINY = ModelSize(
    vision_width=32,
    vision_layers=3,
    width=64,
    layers=3,
    mlp_width=96,
    vocabulary=80,
    image_size=48,
    patch_size=6,
    text_tokens=12,
)
CPU = torch.device("cpu")


def test_medians_and_quartiles_of_the_paired_ratios() -> None:
    pairs = Pairs(plain=[1.0, 2.0, 4.0], wrapped=[1.5, 2.0, 2.0])
    assert pairs.ratios == [1.5, 1.0, 0.5]
    assert pairs.ratio == 1.0
    assert pairs.quartiles == (0.75, 1.25)
    assert Pairs([2.0], [1.0]).quartiles == (0.5, 0.5)


def test_base_model_is_large_enough_and_mostly_decoder() -> None:
    model = build_model(overhead.SIZES[Size.base], torch.device("meta"), torch.float32)
    assert sum(p.numel() for p in model.parameters()) > 200e6
    cost = flops(model.config, 576, text_tokens=64, images=1)
    assert cost.decoder > 0.85 * cost.total


def test_unwrapped_model_against_itself() -> None:
    model, inputs = build_model(TINY, CPU, torch.float32), build_inputs(TINY, CPU, torch.float32)
    noise = measure(model, inputs, None, 1.0, pairs=3, steps=2)
    assert noise.promised == 1.0
    assert len(noise.prefill.ratios) == len(noise.decode.ratios) == 3
    assert all(seconds > 0 for seconds in noise.prefill.plain + noise.decode.wrapped)


def test_promise_is_the_ratio_of_the_flops() -> None:
    model, inputs = build_model(TINY, CPU, torch.float32), build_inputs(TINY, CPU, torch.float32)
    whole = measure(model, inputs, "fopru", 1.0, pairs=1, steps=1)
    pruned = measure(model, inputs, "fopru", 16, pairs=1, steps=1)
    full, kept = (flops(model.config, n, text_tokens=12, images=1).total for n in (64, 16))
    # At keep=1.0 nothing is scored; at 16 the method's own arithmetic takes a little off the promise.
    assert whole.promised == pytest.approx(1.0, abs=0.01)
    assert 0.8 * full / kept < pruned.promised <= full / kept
    with pytest.raises(VTPruneError):
        measure(model, inputs, "no such method", 16, pairs=1, steps=1)


def test_command_prints_a_table_and_writes_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(overhead.SIZES, Size.small, TINY)
    app = overhead.typer.Typer()
    app.command()(overhead.main)
    output = tmp_path / "overhead.json"
    arguments = ["--size", "small", "--keep", "16", "--pairs", "2", "--steps", "2", "--output", str(output)]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    assert "the wrapper adds" in result.output
    assert "of the promise" in result.output
    written = json.loads(output.read_text())
    assert written["vision_tokens"] == 64
    assert len(written["pruned"]["prefill"]["ratios"]) == 2
    assert written["pruned"]["delivered"] == pytest.approx(
        written["pruned"]["speedup"] / written["pruned"]["promised"]
    )


def test_unknown_dtype_is_refused() -> None:
    app = overhead.typer.Typer()
    app.command()(overhead.main)
    result = CliRunner().invoke(app, ["--size", "small", "--dtype", "float31"])
    assert result.exit_code == 2
    assert "bfloat16" in result.output
