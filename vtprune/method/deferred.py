"""Fields of what a method is shown that are worked out only if somebody reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

T = TypeVar("T")


class _Later:
    """Stands for a value in a field until that is read."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make


class _Field:
    """A field of a dataclass that takes a value, or what `later` answers."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, view: object | None, owner: type | None = None) -> Any:
        if view is None:
            return self
        known = vars(view)
        value = known[self._name]
        if isinstance(value, _Later):
            value = known[self._name] = value.make()
        return value

    def __set__(self, view: object, value: Any) -> None:
        vars(view)[self._name] = value


def later(make: Callable[[], T]) -> T:
    """A value for a field of a class that is `deferring` it: what `make` answers once the field is first read."""
    return cast(T, _Later(make))


def deferring(names: Sequence[str]) -> Callable[[type[T]], type[T]]:
    """Lets these fields of a dataclass be worked out `later`."""

    def marked(kind: type[T]) -> type[T]:
        for name in names:
            setattr(kind, name, _Field(name))
        return kind

    return marked
