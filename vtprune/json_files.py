"""Reading JSON from the disk: it is of the shape that is needed, or one message says which file is wrong and where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from vtprune.errors import FileError

OBJECT = TypeAdapter(dict[str, Any])
BOM = b"\xef\xbb\xbf"


def read_file(path: Path, what: str, hint: str = "") -> bytes:
    """A file's bytes; raises FileError as `parse` does."""
    try:
        return path.read_bytes().removeprefix(BOM)
    except FileNotFoundError as error:
        raise FileError(f"no file {path}, {what}{hint}") from error
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}{hint}") from error


def parse(kind: TypeAdapter[Any], text: str | bytes, path: object, what: str, hint: str = "") -> Any:
    """What JSON says, as plain dicts and lists, once it has been found to be of a kind.

    path: the file, and the line where it is one; what: what the file should be; hint: what to do. Raises FileError,
    which says all three and the first thing that is wrong. Keys that `kind` does not name are left as they are.
    """
    raw = text.encode() if isinstance(text, str) else text
    try:
        kind.validate_json(raw, strict=True)
        return json.loads(raw)
    except ValidationError as error:
        raise FileError(f"{path} is not {what}: {first_fault(error)}{hint}") from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is not {what}: {' '.join(str(error).split())}{hint}") from error


def read_json(kind: TypeAdapter[Any], path: Path, what: str, hint: str = "") -> Any:
    """The content of a JSON file of a kind; raises FileError, naming the file and what is wrong."""
    return parse(kind, read_file(path, what, hint), path, what, hint=hint)


def first_fault(error: ValidationError) -> str:
    """The first thing that is wrong, and where: "settings.abc.tokens: Field required"."""
    found = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(str(part) for part in found["loc"])
    said = str(found["msg"])
    return f"{place}: {said}" if place else said
