"""The JSON file of a run that goes on where it stopped: read back only where it is whole and of the same run."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from vtprune.errors import FileError, InputError
from vtprune.files import refuse_changed
from vtprune.json_files import read_json

# How a message names the parts of a config that are fingerprints.
WORDS = {"data": "the bundled data", "model_files": "the checkpoint"}
CODE = "code"


class Head(TypedDict):
    """What such a file has in every version."""

    format: int
    config: dict[str, Any]


HEAD = TypeAdapter(Head)


@dataclass(frozen=True)
class RunFile:
    """Where such a file lies, and what it is.

    kind: the shape of a whole one; format: that of this version; what, run: what messages call the file and what it
    holds; again: what they advise; check: raises FileError for what the shape does not say; words: how messages name
    parts of its config.
    """

    path: Path
    kind: TypeAdapter[Any]
    format: int
    what: str
    again: str
    check: Callable[[Path, dict[str, Any]], None]
    run: str = "run"
    words: Mapping[str, str] = field(default_factory=lambda: WORDS)

    def begun(self, config: dict[str, Any], **own: Any) -> dict[str, Any]:
        """The content of a new file: config is what every number in it depends on."""
        created = datetime.now(UTC).isoformat(timespec="microseconds")
        return {"format": self.format, "created": created, "config": config, "command": " ".join(sys.argv), **own}

    def read(self, config: dict[str, Any], *, afresh: bool) -> tuple[dict[str, Any] | None, str]:
        """The content, None where a new run is begun (`afresh`, or because the code is another one), and when the file
        was begun, as digits.

        Raises InputError for a file that holds none, is not whole, or is of another configuration.
        """
        try:
            head: dict[str, Any] = read_json(HEAD, self.path, self.what, self.again)
            stamp = re.sub(r"[^0-9]", "", str(head.get("created", "")))[:14] or "old"
            return (None if afresh else self._whole(head, config)), stamp
        except FileError as error:
            if afresh:
                return None, "old"
            raise InputError(f"output: {error}") from error

    def _whole(self, head: dict[str, Any], config: dict[str, Any]) -> dict[str, Any] | None:
        if head["format"] != self.format:
            raise FileError(f"{self.path} has another format than this version writes{self.again}")
        old, new = dict(head["config"]), dict(config)
        same_code = old.pop(CODE, "") == new.pop(CODE)
        refuse_changed(self.path, old, new, run=self.run, words=self.words, hint=self.again)
        if not same_code:
            return None
        data: dict[str, Any] = read_json(self.kind, self.path, self.what, self.again)
        self.check(self.path, data)
        return data
