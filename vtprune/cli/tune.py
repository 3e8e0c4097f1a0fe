"""The `vtprune tune` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vtprune.cli.options import (
    SAMPLES,
    Attention,
    BatchSize,
    Device,
    Dtype,
    Frames,
    Model,
    Pictures,
    Question,
    Traceback,
)
from vtprune.console.output import one_line_errors, open_console

BUDGET = "Budget (one of them)"


def tune(
    method: Annotated[
        str,
        typer.Argument(
            help="A method; options that are given stay fixed, as holov:tau=1 or fastv:layers=(2,5). See "
            "`vtprune list`."
        ),
    ],
    keep: Annotated[
        str | None,
        typer.Option(
            help="Budget: a count of tokens (64), a fraction (0.15) or a percentage (15%).", rich_help_panel=BUDGET
        ),
    ] = None,
    flops: Annotated[
        str | None,
        typer.Option(
            help="Budget: prefill FLOPs (vision tower included) as a share of the unpruned model's (40% or 0.4); "
            "every setting then keeps as many tokens as fit.",
            rich_help_panel=BUDGET,
        ),
    ] = None,
    model: Model = None,
    data: Pictures = None,
    question: Question = None,
    frames: Frames = None,
    samples: Annotated[int, typer.Option(min=1, help="To search on.", rich_help_panel=SAMPLES)] = 30,
    check_samples: Annotated[
        int,
        typer.Option(
            min=0,
            help="Held out: the search never sees them; the defaults and what was found are compared on them.",
            rich_help_panel=SAMPLES,
        ),
    ] = 30,
    trials: Annotated[int, typer.Option(min=1, help="Settings to try; the first one is the method's defaults.")] = 60,
    seed: Annotated[int, typer.Option(help="Of the samples and of the search.")] = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    attn_implementation: Attention = None,
    batch_size: BatchSize = None,
    output: Annotated[
        Path, typer.Option(help="Folder for vtprune_config.json (the best setting), search.json and search.png.")
    ] = Path("tune"),
    restart: Annotated[
        bool, typer.Option("--restart", help="Start afresh; the earlier search is kept in a folder beside.")
    ] = False,
    traceback: Traceback = False,
) -> None:
    """Search a method's hyper-parameters for a model at a budget, without answers or training.

    Looks for the setting under which the last prompt token's final hidden state stays nearest to the unpruned
    model's (the search of VFlowOpt, for any method with a search space), and compares it with the defaults on
    samples that the search did not see. A search that was interrupted goes on where it stopped when the same
    command is given again; more --trials go on from a finished one.

    Example: vtprune tune holov --keep 15% --output my-tune

    Then: vtprune bench --methods holov,my-tune --keep 15%, or vtprune.wrap(model, "my-tune").
    """
    with one_line_errors(traceback):
        from vtprune.evals.settings import parse_flops
        from vtprune.evals.tune.tune import TuneConfig, run_tune
        from vtprune.method.texts import parse_keep

        config = TuneConfig(
            method=method,
            output=output,
            keep=None if keep is None else parse_keep(keep),
            flops=None if flops is None else parse_flops(flops),
            model=model,
            data=data,
            question=question,
            frames=frames,
            samples=samples,
            check_samples=check_samples,
            trials=trials,
            seed=seed,
            device=device,
            dtype=dtype,
            attn_implementation=attn_implementation,
            batch_size=batch_size,
            restart=restart,
        )
        run_tune(config, open_console())
