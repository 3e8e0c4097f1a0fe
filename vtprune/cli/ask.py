"""The `vtprune ask` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vtprune.cli.options import Device, Dtype, Model, Traceback
from vtprune.console.output import one_line_errors, open_console


def ask(
    media: Annotated[
        Path,
        typer.Argument(metavar="PICTURE_OR_VIDEO", help="A picture, a video, or a folder with the frames of one."),
    ],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="A question about it.")],
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
    keep_video: Annotated[
        str | None, typer.Option(help="What is kept of a video instead.", show_default="what --keep says")
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(min=1, help="Frames of a video that the model sees, evenly spread over it.", show_default="16"),
    ] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second of a folder of frames.", show_default="2")] = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of an answer at the most.")] = 128,
    output: Annotated[Path, typer.Option(help="Where the picture of the kept patches goes.")] = Path("ask.png"),
    traceback: Traceback = False,
) -> None:
    """Ask about a picture or a video with and without pruning, and see which patches were kept.

    The written picture shows the image as the model saw it beside what was kept of it: patches that never entered
    the decoder are dimmed, those that dropped out inside it have the colour and the number of the first decoder
    layer without them; patches that were merged share a tint, and the token that they flowed into has a frame.
    Below are the vision tokens and the KV entries of every decoder layer.

    Of a video every frame that the vision encoder saw has its place, with its seconds and the tokens that the last
    decoder layer has left of it; of many frames 24 are drawn. Videos are read by PyAV (the extra `video`) and taken
    by models of the Qwen-VL families.
    """
    with one_line_errors(traceback):
        from vtprune.evals.ask.ask import run_ask
        from vtprune.method.texts import parse_keep

        run_ask(
            media,
            question,
            open_console(),
            method=method,
            keep=None if keep is None else parse_keep(keep),
            keep_video=None if keep_video is None else parse_keep(keep_video),
            frames=frames,
            fps=fps,
            output=output,
            model_name=model,
            device=device,
            dtype=dtype,
            max_new_tokens=max_new_tokens,
        )
