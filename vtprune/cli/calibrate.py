"""The `vtprune calibrate` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vtprune.cli.options import SAMPLES, Device, Dtype, Frames, Model, Pictures, Question, Traceback
from vtprune.console.output import one_line_errors, open_console


def calibrate(
    method: Annotated[str, typer.Argument(help="The method to calibrate: yopo.")],
    output: Annotated[Path, typer.Option(help="The JSON file for the heads.")] = Path("heads.json"),
    threshold: Annotated[
        float, typer.Option(help="A head reads vision in a sample where it gives it more than this times the rest.")
    ] = 0.077,
    agree: Annotated[float, typer.Option(help="It is kept if it does in more than this share of the samples.")] = 0.4,
    model: Model = None,
    data: Pictures = None,
    question: Question = None,
    frames: Frames = None,
    samples: Annotated[int, typer.Option(min=1, help="To measure on.", rich_help_panel=SAMPLES)] = 16,
    seed: Annotated[int, typer.Option(help="Of the samples.", rich_help_panel=SAMPLES)] = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    traceback: Traceback = False,
) -> None:
    """Measure which heads of a model's decoder read vision, on samples without labels.

    YOPO (arXiv 2410.06169) keeps a head for vision by the ratio of its attention to vision and to all else. Heads that
    share a key-value head are measured together; the first two layers keep all. No weights are trained.

    Then: vtprune.wrap(model, "yopo:head_file=heads.json"), as it is printed.
    """
    with one_line_errors(traceback):
        from vtprune.evals.calibrate.calibrate import CalibrateConfig, run_calibrate

        config = CalibrateConfig(
            method=method,
            output=output,
            threshold=threshold,
            agree=agree,
            model=model,
            data=data,
            question=question,
            frames=frames,
            samples=samples,
            seed=seed,
            device=device,
            dtype=dtype,
        )
        run_calibrate(config, open_console())
