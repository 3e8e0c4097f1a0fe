"""The `vtprune serve` command."""

from __future__ import annotations

from typing import Annotated

import typer

from vtprune.cli.options import Traceback
from vtprune.console.output import one_line_errors

SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder with a checkpoint, or a model id.")],
    method: Annotated[
        str,
        typer.Option(
            help="A method that can be served (see `vtprune list`), with options as fopru:softmax=false, or a folder "
            "with vtprune_config.json."
        ),
    ],
    keep: Annotated[
        str | None,
        typer.Option(
            help="A count of tokens an image (64), a fraction (0.25) or a percentage (25%).",
            show_default="what the method or the folder says",
        ),
    ] = None,
    positions: Annotated[
        str, typer.Option(help="original: of the whole prompt; compact: of the pruned one (LLaVA).")
    ] = "original",
    most: Annotated[
        str | None,
        typer.Option(
            help="The most that a request may keep which asks for a method or keep of its own.",
            show_default="what the method keeps",
        ),
    ] = None,
    traceback: Traceback = False,
) -> None:
    """Serve a model with vLLM, its images pruned before the decoder.

    All other options are those of vLLM's OpenAI server: --port, --dtype, --max-model-len and so on. Requests may name
    another method (mm_processor_kwargs) where it is started with --trust-request-mm-kwargs.

    Example: vtprune serve llava-hf/llava-1.5-7b-hf --method divprune --keep 64 --port 8000
    """
    with one_line_errors(traceback):
        from vtprune.method.texts import parse_keep
        from vtprune.serving.command import run_server, server_command

        command = server_command(
            model,
            method,
            keep=None if keep is None else parse_keep(keep),
            positions=positions,
            most=None if most is None else parse_keep(most),
            others=context.args,
        )
        run_server(command)
