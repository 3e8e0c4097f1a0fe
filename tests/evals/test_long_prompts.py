"""The measurement of long prompts measures what it says."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from typer.testing import CliRunner

import vtprune
from vtprune.evals.speed import long_prompts

CPU = torch.device("cpu")


def test_a_video_and_many_images_are_read_pruned_and_counted() -> None:
    model = long_prompts.build_model(CPU, torch.float32, width=128, layers=4)
    pruners = [vtprune.EVS(keep=0.25), vtprune.FastV(keep=0.5)]
    video, images = (
        long_prompts.measure(name, model, inputs, pruners, rounds=1)
        for name, inputs in (
            ("video", long_prompts.a_video(8, 3, torch.float32)),
            ("images", long_prompts.many_images(3, 4, torch.float32)),
        )
    )
    assert [(run.method, run.kept) for run in video] == [("none", 36), ("evs", 9), ("fastv", 18)]
    # Images stay whole under what compares frames. FastV: one of four layers has all 16 tokens of an image, the others
    # have 5, as 6 would make the mean more than 8.
    assert [run.kept for run in images] == [48, 48, round(3 * (16 + 3 * 5) / 4)]
    assert {run.tokens for run in video} | {run.tokens for run in images} == {36, 48}
    assert images[1].promised == 1.0 < video[1].promised
    for run in (*video, *images):
        assert run.counted == run.held > 0
        assert run.seconds > 0
        assert run.peak > 0


def test_the_command_prints_two_tables_and_writes_what_it_measured(tmp_path: Path) -> None:
    import typer

    app = typer.Typer()
    app.command()(long_prompts.main)
    output = tmp_path / "long.json"
    options = ["--methods", "random,frame_skip", "--keep", "0.5", "--frames", "8", "--images", "2", "--side", "3"]
    small = ["--width", "128", "--layers", "4", "--rounds", "1", "--output", str(output)]
    result = CliRunner().invoke(app, [*options, *small])
    assert result.exit_code == 0, result.output
    assert "a video of 8 frames: 36 vision tokens" in result.output
    assert "2 images: 18 vision tokens" in result.output
    written = json.loads(output.read_text())
    assert [run["method"] for run in written["runs"]] == ["none", "random", "frame_skip"] * 2
