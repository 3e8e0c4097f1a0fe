"""Pruners as JSON: `vtprune_config.json` beside a model's own files."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vtprune.errors import VTPruneError
from vtprune.files import write_text
from vtprune.method.pruner import Pruner
from vtprune.method.registry import create_checked
from vtprune.method.stages import Growing

CONFIG_NAME = "vtprune_config.json"
# Beside it, the weights of methods that bring some.
WEIGHTS_NAME = "vtprune_weights.safetensors"
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
    """The pruner, or list of pruners, that `save_config` wrote into `folder`; one that goes by other files finds them
    there.

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
        found = from_dict(data)
    except VTPruneError as error:
        raise VTPruneError(f"{path}: {error}") from error
    return found.at(path.parent) if isinstance(found, Growing) else found


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
    return create_checked(data["method"], {key: value for key, value in data.items() if key != "method"})


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a finite number")
