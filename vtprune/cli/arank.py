"""The `vtprune arank` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vtprune.cli.options import SAMPLES, Device, Dtype, Frames, Model, Pictures, Question, Traceback
from vtprune.console.output import one_line_errors, open_console

LAYERS = "How many layers to route (one of them)"


def arank(
    output: Annotated[
        Path, typer.Option(help="The JSON file for the ranks and the choice; a plot goes beside it, as .png.")
    ] = Path("arank.json"),
    count: Annotated[
        int | None,
        typer.Option(
            min=1, help="Layers.", show_default="as many as gamma_mod routes at this depth", rich_help_panel=LAYERS
        ),
    ] = None,
    share: Annotated[
        float | None, typer.Option(help="A share of all layers (0.6), rounded down.", rich_help_panel=LAYERS)
    ] = None,
    model: Model = None,
    data: Pictures = None,
    question: Question = None,
    frames: Frames = None,
    samples: Annotated[int, typer.Option(min=1, help="To average the ranks over.", rich_help_panel=SAMPLES)] = 16,
    seed: Annotated[int, typer.Option(help="Of the samples.", rich_help_panel=SAMPLES)] = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    traceback: Traceback = False,
) -> None:
    """Rank a model's decoder layers by their attention maps, and choose those that gamma_mod routes.

    ARank (gamma-MoD, arXiv 2410.13859) is the rank of a layer's attention maps, the mean over heads and samples: where
    it is low the layer repeats itself, and skipping tokens costs least. The first and the last layer stay as they are.

    Then: vtprune.wrap(model, "gamma_mod:layers=(2,3)"), or vtprune train 'gamma_mod:layers=(2,3)', as it is printed.
    """
    with one_line_errors(traceback):
        from vtprune.evals.arank.ranking import ARankConfig, run_arank

        config = ARankConfig(
            output=output,
            count=count,
            share=share,
            model=model,
            data=data,
            question=question,
            frames=frames,
            samples=samples,
            seed=seed,
            device=device,
            dtype=dtype,
        )
        run_arank(config, open_console())
