"""Answers written down as they are given, so that an interrupted setting goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NotRequired

from pydantic import ConfigDict, FiniteFloat, TypeAdapter
from typing_extensions import TypedDict

from vtprune.errors import FileError
from vtprune.evals.lmms.generation import Answer
from vtprune.evals.lmms.loglikelihood import Likelihood
from vtprune.files import append_text, write_bytes
from vtprune.json_files import parse, read_file

WHAT = "an answer that was written down"
# Costs that an answer may be without.
OPTIONAL = ("published_tokens", "decode_ms", "peak_bytes")


class Entry(TypedDict):
    """A line of a journal: one answer, or how likely a given one is, under the key of its question."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]

    key: str
    text: str
    input_tokens: int
    output_tokens: int
    seconds: FiniteFloat
    cost: dict[str, FiniteFloat | str | None]
    logprob: NotRequired[FiniteFloat]
    greedy: NotRequired[bool]


ENTRY = TypeAdapter(Entry)


def request_key(task: str, doc_id: int, context: str, options: dict[str, Any]) -> str:
    """Identifies one question to one model under one setting."""
    digest = hashlib.sha256(json.dumps([context, options], sort_keys=True, default=str).encode())
    return f"{task}/{doc_id}/{digest.hexdigest()[:16]}"


def read_answer(entry: dict[str, Any]) -> Answer:
    """An answer as it was written down; raises TypeError for half of one."""
    kind = Likelihood if {"logprob", "greedy"} & entry.keys() else Answer
    return kind.from_dict(entry)


def _entry(line: bytes, place: str) -> dict[str, Any]:
    """The entry in a line; raises FileError, naming the place, for what is none."""
    entry: dict[str, Any] = parse(ENTRY, line, place, WHAT)
    try:
        read_answer({name: value for name, value in entry.items() if name != "key"})
    except TypeError as error:
        raise FileError(f"{place} is not {WHAT}: cost: {error}") from error
    for name, value in entry["cost"].items():
        text, number = isinstance(value, str), isinstance(value, int | float)
        if not (text if name == "kept_whole" else number or (value is None and name in OPTIONAL)):
            wanted = "text" if name == "kept_whole" else "number"
            raise FileError(f"{place} is not {WHAT}: cost.{name}: should be a {wanted}")
    return entry


class Journal:
    """A JSON-lines file of answers: what is in it need not be computed again.

    Lines that hold no answer are taken out of the file and left out (`bad` says which and why); all others count.
    Raises FileError for a file that cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bad: list[str] = []
        self._answers: dict[str, dict[str, Any]] = {}
        if path.exists():
            self._load()

    def _load(self) -> None:
        content, good = read_file(self.path, "a journal of answers"), []
        for number, line in enumerate(content.split(b"\n"), 1):
            if not line.strip():
                continue
            try:
                entry = _entry(line, f"{self.path}, line {number}")
            except FileError as error:
                self.bad.append(f"{error}; it is left out and will be answered again")
                continue
            good.append(line + b"\n")
            self._answers[entry.pop("key")] = entry
        # Also where the last line was whole but for its end: the next answer begins a line of its own.
        if self.bad or not content.endswith(b"\n"):
            write_bytes(self.path, b"".join(good))

    def get(self, key: str) -> dict[str, Any] | None:
        """The answer that was written down under `key`."""
        return self._answers.get(key)

    def add(self, entries: dict[str, dict[str, Any]]) -> None:
        """Writes down a batch of answers; raises WriteError."""
        self._answers.update(entries)
        append_text(self.path, "".join(json.dumps({"key": key, **entry}) + "\n" for key, entry in entries.items()))

    def discard(self) -> None:
        """Removes the file: the setting is finished and its answers are kept elsewhere."""
        self.path.unlink(missing_ok=True)
