"""The types of a method's options: what stands for a value of one, and whether a value is of it."""

from __future__ import annotations

import math
import types
import typing
from typing import Any

from vtprune.errors import VTPruneError


def hints_of(cls: type[Any]) -> dict[str, Any]:
    """Types of the fields; those of a plugin that names types only a type checker imports go unchecked."""
    try:
        return typing.get_type_hints(cls)
    except NameError:
        return {}


def _alternatives(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if union else (hint,)


def converted(value: Any, hint: Any) -> Any:
    """JSON has no tuples and texts have no lists: each becomes the other where the field takes no other, inside one
    another too."""
    if not isinstance(value, list | tuple):
        return value
    kinds = {typing.get_origin(part) or part: typing.get_args(part) for part in _alternatives(hint)}
    kind = next((one for one in (type(value), tuple, list) if one in kinds), None)
    return value if kind is None else kind(_items_converted(list(value), kinds[kind]))


def lone_item(value: Any, hint: Any) -> Any:
    """A text's single value as the tuple of one that it stands for, where the field takes a tuple of any length."""
    if not fits(value, hint):
        for part in _alternatives(hint):
            items = typing.get_args(part)
            if typing.get_origin(part) is tuple and items[1:] == (Ellipsis,) and fits(value, items[0]):
                return (value,)
    return value


def _items_converted(items: list[object], hints: tuple[Any, ...]) -> list[object]:
    if (len(hints) == 2 and hints[1] is Ellipsis) or len(hints) == 1:
        hints = hints[:1] * len(items)
    return [converted(*pair) for pair in zip(items, hints, strict=True)] if len(items) == len(hints) else items


def fits(value: object, hint: Any) -> bool:
    """Whether a JSON value is of a field's type; an int may stand for a float, a bool for neither."""
    for part in _alternatives(hint):
        kind = typing.get_origin(part) or part
        if kind is Any or (kind is types.NoneType and value is None):
            return True
        if kind is typing.Literal:
            if any(type(value) is type(choice) and value == choice for choice in typing.get_args(part)):
                return True
        elif kind in (int, float):
            number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
            if number and math.isfinite(typing.cast(float, value)):
                return True
        elif kind is tuple and isinstance(value, tuple):
            if _items_fit(value, typing.get_args(part)):
                return True
        elif isinstance(kind, type) and kind is not tuple and isinstance(value, kind):
            return True
    return False


def check_type(method: str, option: str, value: object, hint: Any) -> None:
    """Raises VTPruneError, naming the method, unless the value is of the option's type."""
    if not fits(value, hint):
        raise VTPruneError(f"{method}: {option} is of type {readable(hint)}, got {value!r}")


def _items_fit(items: tuple[object, ...], hints: tuple[Any, ...]) -> bool:
    if not hints:
        return True
    if len(hints) == 2 and hints[1] is Ellipsis:
        return all(fits(item, hints[0]) for item in items)
    return len(items) == len(hints) and all(map(fits, items, hints))


def readable(hint: Any) -> str:
    """A type as a message names it."""
    names = (part.__name__ if isinstance(part, type) else str(part) for part in _alternatives(hint))
    return " | ".join("None" if name == "NoneType" else name for name in names)
