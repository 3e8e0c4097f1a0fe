"""Options that commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[
    str | None,
    typer.Option(help="A model id or a folder with a checkpoint.", show_default="the bundled tiny LLaVA"),
]


Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, or auto.", show_default="a GPU if there is one")]


Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]


Traceback = Annotated[bool, typer.Option("--traceback", help="Show where in the code an error came from.")]
