"""Pruners as JSON: `vtprune_config.json` beside a model's own files."""

from __future__ import annotations

import json
import math
import os
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vtprune.errors import VTPruneError
from vtprune.files import write_text
from vtprune.pruner import Pruner
from vtprune.registry import create, pruner_class

CONFIG_NAME = "vtprune_config.json"
FORMAT = "vtprune"
VERSION = 1

PrunerOrList = Pruner | list[Pruner]


def to_dict(pruner: Pruner | Sequence[Pruner]) -> dict[str, Any]:
    """What `save_config` writes: the format, its version, and the method's (or methods') hyper-parameters."""
    if isinstance(pruner, Pruner):
        return {"format": FORMAT, "version": VERSION, "pruner": pruner.to_dict()}
    if not isinstance(pruner, Sequence) or not pruner or not all(isinstance(p, Pruner) for p in pruner):
        raise VTPruneError(f"a config holds a Pruner or a non-empty list of them, got {pruner!r}")
    return {"format": FORMAT, "version": VERSION, "pruner": [stage.to_dict() for stage in pruner]}


def from_dict(data: object) -> PrunerOrList:
    """The pruner of `{"method": name, **options}`, the pruners of a list of such, or those of a whole config.

    Raises VTPruneError for an unknown version, method or option, and for a value of the wrong type.
    """
    if isinstance(data, dict) and "format" in data:
        return from_dict(_unpack(data))
    if isinstance(data, list):
        if not data:
            raise VTPruneError("a list of methods needs at least one")
        return [_from_method(method) for method in data]
    return _from_method(data)


def save_config(pruner: Pruner | Sequence[Pruner], folder: str | os.PathLike[str]) -> Path:
    """Writes `vtprune_config.json` into `folder` (made if absent), whole or not at all; returns its path.

    Raises VTPruneError where the folder cannot be written or a hyper-parameter is not plain JSON.
    """
    try:
        text = json.dumps(to_dict(pruner), indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        if isinstance(error, VTPruneError):
            raise
        raise VTPruneError(f"cannot write this pruner as JSON: {error}") from error
    path = Path(folder) / CONFIG_NAME
    write_text(path, text)
    return path


def load_config(folder: str | os.PathLike[str]) -> PrunerOrList:
    """The pruner, or list of pruners, that `save_config` wrote into `folder`.

    Raises VTPruneError, naming the file, if it is missing, unreadable, not JSON, cut short, of an unknown
    version, or holds an unknown method, an unknown option or a value of the wrong type.
    """
    path = Path(folder) / CONFIG_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise VTPruneError(f"no {CONFIG_NAME} in {Path(folder)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise VTPruneError(f"cannot read {path}: {error}") from error
    try:
        data = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise VTPruneError(f"{path} is not valid JSON (cut short?): {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise VTPruneError(f'{path} is not a vtprune config: no "format": "{FORMAT}"')
    try:
        return from_dict(data)
    except VTPruneError as error:
        raise VTPruneError(f"{path}: {error}") from error


def _unpack(data: dict[str, Any]) -> object:
    version = data.get("version")
    if type(version) is not int or version != VERSION:
        raise VTPruneError(f"config version {version!r} is unknown; this vtprune reads version {VERSION}")
    unknown = sorted(set(data) - {"format", "version", "pruner"})
    if data["format"] != FORMAT or "pruner" not in data or unknown:
        keys = ", ".join(data)
        raise VTPruneError(f'a config is {{"format": "{FORMAT}", "version": ..., "pruner": ...}}, got {keys}')
    return data["pruner"]


def _from_method(data: object) -> Pruner:
    if not isinstance(data, dict) or not isinstance(data.get("method"), str):
        raise VTPruneError(f'a method is {{"method": name, **options}}, got {data!r}')
    options = {key: value for key, value in data.items() if key != "method"}
    hints = _hints(pruner_class(data["method"]))
    for option, value in options.items():
        hint = hints.get(option, Any)
        options[option] = value = _as_tuple(value, hint)
        if not _fits(value, hint):
            raise VTPruneError(f"{data['method']}: {option} is of type {_readable(hint)}, got {value!r}")
    return create(data["method"], **options)


def _hints(cls: type[Pruner]) -> dict[str, Any]:
    """Types of the fields; those of a plugin that names types only a type checker imports go unchecked."""
    try:
        return typing.get_type_hints(cls)
    except NameError:
        return {}


def _alternatives(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if union else (hint,)


def _as_tuple(value: object, hint: Any) -> object:
    """JSON has no tuples: a list becomes one where the field takes a tuple and no list."""
    kinds = {typing.get_origin(part) or part for part in _alternatives(hint)}
    return tuple(value) if isinstance(value, list) and tuple in kinds and list not in kinds else value


def _fits(value: object, hint: Any) -> bool:
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


def _items_fit(items: tuple[object, ...], hints: tuple[Any, ...]) -> bool:
    if not hints:
        return True
    if len(hints) == 2 and hints[1] is Ellipsis:
        return all(_fits(item, hints[0]) for item in items)
    return len(items) == len(hints) and all(map(_fits, items, hints))


def _readable(hint: Any) -> str:
    names = (part.__name__ if isinstance(part, type) else str(part) for part in _alternatives(hint))
    return " | ".join("None" if name == "NoneType" else name for name in names)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a finite number")
