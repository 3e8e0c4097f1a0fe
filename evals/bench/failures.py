"""The two ways in which a run ends badly: the request was wrong (exit 2), or the work failed (exit 1)."""

from __future__ import annotations

from vtprune.errors import InputError, RunError

__all__ = ["InputError", "RunError", "SampleError", "explain", "first_line"]


class SampleError(RunError):
    """One sample could not be read or answered; the message names it."""


def root(error: BaseException) -> BaseException:
    """The error itself, or what it stands for: the last attempt of one that says no more than that it gave up trying
    (tenacity's RetryError), the first of a group, the cause of one without a message."""
    while True:
        attempt = getattr(error, "last_attempt", None)
        inner = attempt.exception() if attempt is not None and hasattr(attempt, "exception") else None
        if inner is None and isinstance(error, BaseExceptionGroup):
            inner = error.exceptions[0]
        if inner is None and not str(error).strip():
            inner = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if not isinstance(inner, BaseException):
            return error
        error = inner


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or of the one that it stands for, that says anything, or its type."""
    found = root(error)
    lines = [line.strip() for line in str(found).splitlines() if line.strip()]
    return lines[0] if lines else type(found).__name__


def explain(error: BaseException) -> str:
    """What went wrong in one line: the type and the message of an error, and of what it says that caused it."""
    found = root(error)
    text = f"{type(found).__name__}: {first_line(found)}"
    cause = found
    while cause.__cause__ is not None:
        cause = root(cause.__cause__)
    reason = first_line(cause)
    return text if cause is found or reason in text else f"{text} (because of {type(cause).__name__}: {reason})"
