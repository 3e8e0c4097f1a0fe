"""The two ways in which a run ends badly: the request was wrong (exit 2), or the work failed (exit 1)."""

from __future__ import annotations

from vtprune.errors import InputError

__all__ = ["InputError", "RunError", "SampleError"]


class RunError(RuntimeError):
    """The work failed on the way; what was computed before is kept."""


class SampleError(RunError):
    """One sample could not be read or answered; the message names it."""
