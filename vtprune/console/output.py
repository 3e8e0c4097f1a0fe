"""What every command shares: some options, its console, and errors of one line."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import typer
from rich.console import Console
from rich.text import Text

from vtprune.errors import RunError, VTPruneError

BAD_INPUT, FAILURE, INTERRUPTED = 2, 1, 130


errors = Console(stderr=True, soft_wrap=True)


def open_console() -> Console:
    """stdout; wide where it is not a terminal, so that tables in a log are not cut."""
    return Console() if sys.stdout.isatty() else Console(width=160)


def _stop(message: str, status: int) -> typer.Exit:
    errors.print(Text(f"vtprune: {message}", style="red"))
    return typer.Exit(status)


@contextlib.contextmanager
def one_line_errors(traceback: bool) -> Iterator[None]:
    """Turns what goes wrong into one red line on stderr and the right exit status."""
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt as error:
        raise _stop(
            "interrupted; what was finished is kept, and the same command goes on from there", INTERRUPTED
        ) from error
    except Exception as error:
        if traceback:
            raise
        if isinstance(error, RunError):
            raise _stop(str(error), FAILURE) from error
        if isinstance(error, VTPruneError):
            raise _stop(str(error), BAD_INPUT) from error
        reason = " ".join(str(error).split()) or "no message"
        hint = "; --traceback shows where"
        raise _stop(f"{type(error).__name__}: {reason}{hint}", FAILURE) from error
