"""Checks of options that several methods share."""

from __future__ import annotations

import math

from vtprune.errors import VTPruneError
from vtprune.method.views import VisionStream


def check_choice(method: str, option: str, value: object, choices: tuple[object, ...]) -> None:
    """Raises VTPruneError unless `value` is one of `choices` (True is not 1)."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise VTPruneError(f"{method}: {option} is one of {', '.join(map(repr, choices))}, got {value!r}")


def check_count(method: str, option: str, value: object, *, least: int = 1) -> None:
    """Raises VTPruneError unless `value` is an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise VTPruneError(f"{method}: {option} is an int of at least {least}, got {value!r}")


def is_number(value: object) -> bool:
    """Whether `value` is a finite int or float (True is neither) that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def check_factor(method: str, option: str, value: object) -> None:
    """Raises VTPruneError unless `value` is a finite number of at least 0."""
    if not is_number(value) or value < 0:  # type: ignore[operator]
        raise VTPruneError(f"{method}: {option} is a finite number of at least 0, got {value!r}")


def check_share(method: str, option: str, value: object, keep: object) -> None:
    """Raises VTPruneError unless `value` is None or a number between 0 and 1, and None beside a `keep`."""
    if value is None:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < 1:  # type: ignore[operator]
        raise VTPruneError(f"{method}: {option} is a number between 0 and 1, got {value!r}")
    if keep is not None:
        raise VTPruneError(f"{method}: keep and {option} contradict each other; give one of them")


def check_whole_grid(method: str, stream: VisionStream) -> None:
    """Raises VTPruneError unless the stream still holds every token of the image."""
    if stream.indices.numel() != stream.total:
        raise VTPruneError(
            f"{method} needs all {stream.total} tokens of the image's grid, got {stream.indices.numel()}: "
            "it cannot follow a stage that drops tokens in the encoder"
        )
