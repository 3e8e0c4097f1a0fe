"""The exceptions and warnings of vtprune: each says what was wrong and what would be right, on one line."""

from __future__ import annotations


class VTPruneError(ValueError):
    """Bad input or an unsupported combination; the message names both."""


class InputError(VTPruneError):
    """The request cannot be carried out as it stands; the message says what would be right."""


class BusyError(VTPruneError):
    """Another run holds the folder."""


class CannotCut(VTPruneError):
    """A method cannot cut an image to its budget; such an image is kept whole, and its report says why."""


class UntrainedWarning(UserWarning):
    """A method that has to be trained runs with weights that nobody has trained."""


class UncheckedBaseWarning(UserWarning):
    """Nothing says on which base model some weights were trained, so it cannot be told whether this is it."""


class KeptWholeWarning(UserWarning):
    """An image cannot be cut to its budget by the method that it was given, and goes through the model whole."""


class PromiseWarning(UserWarning):
    """What was promised of answers does not hold for what is asked: it was calibrated with something else."""


class UnknownPrunerError(VTPruneError, KeyError):
    """No pruner is registered under that name."""

    def __str__(self) -> str:
        return str(self.args[0])


class UnsupportedModelError(VTPruneError, TypeError):
    """No adapter knows this model."""


class UnsupportedCacheError(VTPruneError, TypeError):
    """This kind of KV cache cannot hold layers of different lengths."""


class ScoreError(VTPruneError):
    """A pruner produced NaN or infinite scores."""


class PictureError(VTPruneError):
    """A file holds no picture that can be read; the message names it."""


class VideoError(VTPruneError):
    """A file or a folder holds no video that can be read; the message names it."""


class FileError(VTPruneError):
    """A file that was read does not hold what it should; the message names it and what is wrong."""


class RunError(RuntimeError):
    """The work failed on the way, through no fault of the request; what was computed before is kept."""


class WriteError(VTPruneError, RunError):
    """A file could not be written; what stood there before is unchanged."""


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
