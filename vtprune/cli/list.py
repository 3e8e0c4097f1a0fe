"""The `vtprune list` command."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from vtprune.cli.options import Traceback
from vtprune.console.output import one_line_errors, open_console


def list_methods(
    options: Annotated[bool, typer.Option("--options", help="What methods and lmms-eval's model_args take.")] = False,
    traceback: Traceback = False,
) -> None:
    """List the methods and the model families, or the options of the methods."""
    with one_line_errors(traceback):
        console = open_console()
        for table in _options() if options else _known():
            console.print(table)
        console.print(
            "With lmms-eval: vtprune lmms-eval --tasks vtprune_shapes --model_args method=flowcut,keep=0.25",
            soft_wrap=True,
            highlight=False,
        )


def _known() -> tuple[Table, Table]:
    from vtprune.method.catalogue import families, methods

    shown = _table("Methods", show_lines=True)
    for heading in ("name", "stage", "paper", "arXiv", "licence of the reference", "needs", "served", "variants"):
        shown.add_column(heading, no_wrap=heading in ("name", "arXiv"))
    for info in methods().values():
        served = info.serves or f"no: it {info.unserved}"
        cells = (info.name, info.stage, info.paper, info.arxiv, info.licence, info.needs, served)
        shown.add_row(*cells, ", ".join(info.variants))
    models = _table("Models", show_lines=True)
    for heading in ("adapter", "models", "notes"):
        models.add_column(heading)
    for name, classes, notes in families():
        models.add_row(name, ", ".join(classes), notes)
    return shown, models


def _options() -> tuple[Table, Table]:
    from vtprune.evals.lmms.model_args import ARGUMENTS
    from vtprune.method.registry import available, options_of

    shown = _table("Options of methods, as in method:keep=0.25,option=value")
    for heading in ("method", "option", "type", "default"):
        shown.add_column(heading)
    for method in available():
        for number, (name, (kind, default)) in enumerate(options_of(method).items()):
            shown.add_row("" if number else method, name, kind, repr(default), end_section=False)
        shown.add_section()
    arguments = _table("Arguments in --model_args of lmms-eval, beside the options of the method")
    for heading in ("argument", "what it is"):
        arguments.add_column(heading)
    for name, text in ARGUMENTS.items():
        arguments.add_row(name, text)
    return shown, arguments


def _table(title: str, *, show_lines: bool = False) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", show_lines=show_lines)
