"""results.json: everything that a run found, written whole after every setting."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from vtprune.errors import FileError
from vtprune.evals.bench.records import RESULTS
from vtprune.evals.run_file import RunFile
from vtprune.files import refuse_foreign, set_aside, write_text

FORMAT = 2
FILE, TABLE, PLOT = "results.json", "table.md", "pareto.png"
UNFINISHED = ".answers-"
WHAT = "a results file"
AGAIN = "; give another --output, or --no-resume to start afresh and keep the old one beside it"


class Results:
    """The content of results.json, kept on disk as it grows.

    config: what every number in the file depends on; settings: {key of a Setting: its record}; moved: where
    earlier results were put, if there were some of other code, or a fresh start was asked for. Raises InputError for
    results of another configuration, for a file that holds none, and for tables that are not of a bench.
    """

    def __init__(self, folder: Path, config: dict[str, Any], *, resume: bool) -> None:
        self.path, self.config = folder / FILE, config
        file = RunFile(self.path, RESULTS, format=FORMAT, what=WHAT, again=AGAIN, check=_check_tasks)
        self.data = file.begun(config, questions=[], settings={})
        self.moved: Path | None = None
        refuse_foreign(folder, FILE, (TABLE, PLOT))
        if self.path.exists():
            old, stamp = file.read(config, afresh=not resume)
            if old is None:
                self.moved = self._move_away(stamp)
            else:
                self.data = old
        if not resume:
            for path in folder.glob(f"{UNFINISHED}*"):
                set_aside(path, "old")

    def _move_away(self, stamp: str) -> Path:
        """Keeps earlier results under another name: they are not to be compared with new ones."""
        for name in (TABLE, PLOT):
            if self.path.with_name(name).exists():
                set_aside(self.path.with_name(name), stamp)
        return set_aside(self.path, stamp)

    def unfinished(self, key: str) -> Path:
        """Where the answers of a setting are noted until its record is written."""
        run = sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()[:8]
        return self.path.with_name(f"{UNFINISHED}{run}-{key}.jsonl")

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """The records so far."""
        settings: dict[str, dict[str, Any]] = self.data["settings"]
        return settings

    def set(self, key: str, record: dict[str, Any]) -> None:
        """Adds a record and writes the file."""
        self.settings[key] = record
        self.save()

    def save(self) -> None:
        """Writes the file; raises WriteError where that fails, and leaves the old one in place."""
        write_text(self.path, json.dumps(self.data, indent=1, ensure_ascii=False, default=str))


def _check_tasks(path: Path, data: dict[str, Any]) -> None:
    """Raises FileError where the settings of a file were not scored on the same tasks."""
    records = list(data["settings"].values())
    tasks = [{score["task"] for score in record["scores"] if score["name"] == score["task"]} for record in records]
    odd = [record["label"] for record, own in zip(records, tasks, strict=True) if not own or own != tasks[0]]
    if odd:
        raise FileError(f"{path} is not {WHAT}: {odd[0]} has scores of other tasks than the first setting{AGAIN}")
