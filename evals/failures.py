"""The two ways in which a run ends badly: the request was wrong (exit 2), or the work failed (exit 1)."""

from __future__ import annotations

from vtprune.errors import RunError, VTPruneError

__all__ = ["InputError", "RunError", "SampleError"]


class InputError(VTPruneError):
    """The request cannot be carried out as it stands; the message says what would be right."""


class SampleError(RunError):
    """One sample could not be read or answered; the message names it."""
