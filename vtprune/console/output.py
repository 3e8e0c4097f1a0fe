"""What every command shares: how much it says, its console, and errors of one line."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from enum import Enum, auto

import typer
from rich.console import Console
from rich.text import Text

from vtprune.errors import RunError, VTPruneError

BAD_INPUT, FAILURE, INTERRUPTED = 2, 1, 130


errors = Console(stderr=True, soft_wrap=True)


class Loudness(Enum):
    """How much a command says: QUIET results and errors alone, VERBOSE also what libraries warn of, and tracebacks."""

    QUIET = auto()
    NORMAL = auto()
    VERBOSE = auto()


_loudness = ContextVar("loudness", default=Loudness.NORMAL)


@contextlib.contextmanager
def speaking(loudness: Loudness) -> Iterator[None]:
    """Says so much for the length of a with block."""
    token = _loudness.set(loudness)
    try:
        with warnings.catch_warnings():
            if loudness is Loudness.VERBOSE:
                # Each once a place, whatever category Python leaves out by itself.
                warnings.simplefilter("default")
            yield
    finally:
        _loudness.reset(token)


def is_quiet() -> bool:
    """Whether progress and notices are left out."""
    return _loudness.get() is Loudness.QUIET


def is_verbose() -> bool:
    """Whether libraries say what they have to say."""
    return _loudness.get() is Loudness.VERBOSE


def notice(console: Console, text: str) -> None:
    """Prints a line that is no result, unless the command is quiet."""
    if not is_quiet():
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def log_level() -> int:
    """From which level on libraries' loggers speak."""
    return logging.WARNING if is_verbose() else logging.ERROR


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
        if traceback or is_verbose():
            raise
        if isinstance(error, RunError):
            raise _stop(str(error), FAILURE) from error
        if isinstance(error, VTPruneError):
            raise _stop(str(error), BAD_INPUT) from error
        reason = " ".join(str(error).split()) or "no message"
        hint = "; --traceback shows where"
        raise _stop(f"{type(error).__name__}: {reason}{hint}", FAILURE) from error
