"""Fields of what a method is shown that are worked out only if somebody reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


class _Later(partial[Any]):
    """Stands for a value in a field until that is read: a call that is still to be made."""


# `later(make, *given)` is a value for a field of a class that is `deferring` it: what `make` answers to these
# arguments once the field is first read.
later: Callable[..., Any] = _Later


class _Field:
    """A field of a dataclass that takes a value, or what `later` answers."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, view: object | None, owner: type | None = None) -> Any:
        if view is None:
            return self
        known = vars(view)
        value = known[self._name]
        if type(value) is _Later:
            value = known[self._name] = value()
        return value

    def __set__(self, view: object, value: Any) -> None:
        vars(view)[self._name] = value


def deferring(names: Sequence[str]) -> Callable[[type[T]], type[T]]:
    """Lets these fields of a dataclass be worked out `later`."""

    def marked(kind: type[T]) -> type[T]:
        for name in names:
            setattr(kind, name, _Field(name))
        return kind

    return marked
