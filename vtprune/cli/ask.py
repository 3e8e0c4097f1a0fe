"""The `vtprune ask` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vtprune.cli.options import Device, Dtype, Model, Traceback
from vtprune.console.output import one_line_errors, open_console


def ask(
    image: Annotated[Path, typer.Argument(help="A picture.")],
    question: Annotated[str, typer.Argument(help="A question about it.")],
    method: Annotated[
        str | None,
        typer.Option(
            help="A method, with options as fastv:layers=(2,5); several joined by +, as visionzip:keep=64+fastv; or a "
            "folder with vtprune_config.json. See `vtprune list`.",
            show_default="flowcut; what a --model folder was trained with",
        ),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            help="A count of tokens (64), a fraction (0.25) or a percentage (25%).",
            show_default="0.25, unless the method says its own",
        ),
    ] = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of an answer at the most.")] = 128,
    output: Annotated[Path, typer.Option(help="Where the picture of the kept patches goes.")] = Path("ask.png"),
    traceback: Traceback = False,
) -> None:
    """Ask about a picture with and without pruning, and see which patches were kept.

    The written picture shows the image as the model saw it beside what was kept of it: patches that never entered
    the decoder are dimmed, those that dropped out inside it have the colour and the number of the first decoder
    layer without them; patches that were merged share a tint, and the token that they flowed into has a frame.
    Below are the vision tokens and the KV entries of every decoder layer.
    """
    with one_line_errors(traceback):
        from vtprune.evals.ask.ask import run_ask
        from vtprune.method.texts import parse_keep

        run_ask(
            image,
            question,
            open_console(),
            method=method,
            keep=None if keep is None else parse_keep(keep),
            output=output,
            model_name=model,
            device=device,
            dtype=dtype,
            max_new_tokens=max_new_tokens,
        )
