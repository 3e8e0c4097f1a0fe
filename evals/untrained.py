"""Methods that have to be trained and are not: said in the output of a command, in the place of a warning."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vtprune.errors import UncheckedBaseWarning, UntrainedWarning

OURS = (UntrainedWarning, UncheckedBaseWarning)


@contextmanager
def told_untrained(tell: Callable[[str], object]) -> Iterator[None]:
    """Hands what `wrap` warns of inside the block to `tell`, each text once; other warnings go their usual way."""
    told: set[str] = set()
    shown: list[warnings.WarningMessage]
    with warnings.catch_warnings(record=True) as shown:
        for kind in OURS:
            warnings.simplefilter("always", kind)
        yield
    for one in shown:
        if not issubclass(one.category, OURS):
            warnings.showwarning(one.message, one.category, one.filename, one.lineno, file=one.file, line=one.line)
        elif str(one.message) not in told:
            told.add(str(one.message))
            tell(str(one.message))


@contextmanager
def quiet_untrained() -> Iterator[None]:
    """Keeps these warnings from stderr where the output says so itself, once for many times that `wrap` is called."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrainedWarning)
        yield
