"""Options that commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SAMPLES = "Samples"

Model = Annotated[
    str | None,
    typer.Option(
        help="A model id, a folder with a checkpoint, or tiny-qwen, the other bundled model.",
        show_default="the bundled tiny LLaVA",
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, or auto.", show_default="a GPU if there is one")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Attention = Annotated[str | None, typer.Option(help="sdpa, eager, flash_attention_2, …")]
BatchSize = Annotated[
    int | None,
    typer.Option(min=1, help="Rows that are answered together.", show_default="16 in float32 on a CPU, else 1"),
]
Pictures = Annotated[
    Path | None,
    typer.Option(
        help="A folder of pictures and videos; metadata.jsonl in it may give a question for each as "
        '{"file_name": "a.jpg", "question": "…"}, or name folders of frames so. No answers are needed.',
        show_default="fresh drawings, for the bundled model",
        rich_help_panel=SAMPLES,
    ),
]
Question = Annotated[
    str | None,
    typer.Option(
        help="Of pictures and videos that come without one.",
        show_default="Describe the image.",
        rich_help_panel=SAMPLES,
    ),
]
Frames = Annotated[
    int | None,
    typer.Option(min=1, help="Of each video, evenly spread over it.", show_default="16", rich_help_panel=SAMPLES),
]
Traceback = Annotated[bool, typer.Option("--traceback", help="Show where in the code an error came from.")]
