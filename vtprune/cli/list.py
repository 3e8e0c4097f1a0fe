"""The `vtprune list` command."""

from __future__ import annotations

from rich.table import Table

from vtprune.cli.options import Traceback
from vtprune.console.output import one_line_errors, open_console


def list_methods(traceback: Traceback = False) -> None:
    """List the methods and the model families."""
    with one_line_errors(traceback):
        from vtprune.method.catalogue import families, methods

        shown = Table(title="Methods", title_justify="left", title_style="bold", show_lines=True)
        for heading in ("name", "stage", "paper", "arXiv", "licence of the reference", "needs", "variants"):
            shown.add_column(heading, no_wrap=heading in ("name", "arXiv"))
        for info in methods().values():
            cells = (info.name, info.stage, info.paper, info.arxiv, info.licence, info.needs)
            shown.add_row(*cells, ", ".join(info.variants))
        models = Table(title="Models", title_justify="left", title_style="bold", show_lines=True)
        for heading in ("adapter", "models", "notes"):
            models.add_column(heading)
        for name, classes, notes in families():
            models.add_row(name, ", ".join(classes), notes)
        console = open_console()
        console.print(shown)
        console.print(models)
        console.print(
            "With lmms-eval: vtprune lmms-eval --tasks vtprune_shapes --model_args method=flowcut,keep=0.25",
            soft_wrap=True,
            highlight=False,
        )
