"""Answers written down as they are given, so that an interrupted setting goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def request_key(task: str, doc_id: int, context: str, options: dict[str, Any]) -> str:
    """Identifies one question to one model under one setting."""
    digest = hashlib.sha256(json.dumps([context, options], sort_keys=True, default=str).encode())
    return f"{task}/{doc_id}/{digest.hexdigest()[:16]}"


class Journal:
    """A JSON-lines file of answers: what is in it need not be computed again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._answers: dict[str, dict[str, Any]] = {}
        if path.exists():
            self._load()

    def _load(self) -> None:
        intact = 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            try:
                entry = json.loads(line)
                self._answers[entry.pop("key")] = entry
            except (ValueError, KeyError):
                break  # the writer was stopped in the middle of this line
            intact += len(line)
        os.truncate(self.path, intact)

    def get(self, key: str) -> dict[str, Any] | None:
        """The answer that was written down under `key`."""
        return self._answers.get(key)

    def add(self, entries: dict[str, dict[str, Any]]) -> None:
        """Writes down a batch of answers."""
        self._answers.update(entries)
        with self.path.open("a", encoding="utf-8") as file:
            for key, entry in entries.items():
                file.write(json.dumps({"key": key, **entry}) + "\n")

    def discard(self) -> None:
        """Removes the file: the setting is finished and its answers are kept elsewhere."""
        self.path.unlink(missing_ok=True)
