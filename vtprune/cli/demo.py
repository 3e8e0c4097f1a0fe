"""The `vtprune demo` command."""

from __future__ import annotations

from typing import Annotated

import typer

from vtprune.cli.options import Device, Dtype, Traceback
from vtprune.console.output import one_line_errors, open_console


def demo(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="A model id or a folder with a checkpoint; may be given again.", show_default="the bundled models"
        ),
    ] = None,
    device: Device = None,
    dtype: Dtype = "auto",
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 7860,
    queue_size: Annotated[int, typer.Option(min=1, help="Visitors that may wait; more are turned away.")] = 32,
    workers: Annotated[int, typer.Option(min=1, help="Visitors that are answered at once.")] = 2,
    share: Annotated[
        bool, typer.Option("--share", help="Also give the page a public address, through gradio.")
    ] = False,
    traceback: Traceback = False,
) -> None:
    """Open a page on which anyone sees what a pruner keeps, what it costs and what it breaks.

    Upload or paste a picture, or upload a video where a model takes them, ask a question, choose a method and how much
    it keeps: both answers side by side, what became of each patch layer by layer, tokens, FLOPs, KV bytes and times,
    and the lines of Python that do the same.
    Stops with Ctrl-C; uploads lie in a temporary folder that is gone then.
    """
    with one_line_errors(traceback):
        _require_gradio()
        from vtprune.evals.demo.server import Options, serve

        options = Options(
            models=tuple(model or ()),
            device=device,
            dtype=dtype,
            host=host,
            port=port,
            queue=queue_size,
            workers=workers,
            share=share,
        )
        console = open_console()
        serve(options, lambda line: console.print(line, highlight=False, soft_wrap=True))


def _require_gradio() -> None:
    from vtprune.errors import InputError

    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise InputError(f"gradio cannot be imported ({error}); pip install 'vtprune[demo]'") from error
