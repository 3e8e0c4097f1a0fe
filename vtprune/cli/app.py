"""The `vtprune` command."""

from __future__ import annotations

from typing import Annotated

import typer

from vtprune.cli.arank import arank
from vtprune.cli.ask import ask
from vtprune.cli.bench import bench
from vtprune.cli.calibrate import calibrate
from vtprune.cli.demo import demo
from vtprune.cli.list import list_methods
from vtprune.cli.lmms_eval import SETTINGS, lmms_eval
from vtprune.cli.report import report
from vtprune.cli.serve import SETTINGS as SERVING
from vtprune.cli.serve import serve
from vtprune.cli.train import train
from vtprune.cli.tune import tune
from vtprune.console.output import Loudness, one_line_errors, speaking
from vtprune.errors import InputError

app = typer.Typer(
    help="Prune, merge and route the vision tokens of vision-language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _show_version(value: bool) -> None:
    if value:
        from vtprune.provenance import __version__

        typer.echo(f"vtprune {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print results and errors, no progress and no notices.")
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose", "-v", help="Also print what libraries warn of, and where in the code an error came from."
        ),
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    with one_line_errors(traceback=False):
        if quiet and verbose:
            raise InputError("--quiet and --verbose: give one of them")
    loudness = Loudness.QUIET if quiet else Loudness.VERBOSE if verbose else Loudness.NORMAL
    context.with_resource(speaking(loudness))


app.command()(bench)
app.command()(ask)
app.command()(tune)
app.command(name="list")(list_methods)
app.command(name="lmms-eval", context_settings=SETTINGS)(lmms_eval)
app.command()(report)
app.command()(arank)
app.command()(calibrate)
app.command(context_settings=SERVING)(serve)
app.command()(train)
app.command()(demo)


def main() -> None:
    """The console script."""
    app()
