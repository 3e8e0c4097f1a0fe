"""One folder a cell of the grid: what a setting was, what it answered to each question, and what that cost.

A process that works on a cell holds its folder, so that processes, machines and grids that share a results folder take
different ones; the system lets go of a cell whose process has died, and the next one goes on with its answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from vtprune.errors import BusyError
from vtprune.evals.settings import Setting
from vtprune.files import held, write_json, write_text

FOLDER = "cells"
CONFIG, METRICS, SAMPLES, ANSWERS = "config.json", "metrics.json", "samples.jsonl", "answers.jsonl"
# What a record has one of for each question, which is in the samples.
EACH = ("answers", "correct", "kept_tokens")
# Characters of a method's name in the name of its folder.
NAME = 48


@dataclass(frozen=True)
class Cell:
    """The folder of one setting of one run.

    It holds config.json (the run's configuration, the setting, versions, machine), samples.jsonl (a question a line,
    with its answer, its score by every metric and its own cost), metrics.json (all that was made of them, and times);
    until these are written answers.jsonl has the answers so far.
    """

    folder: Path

    @classmethod
    def of(cls, results: Path, config: dict[str, Any], setting: Setting) -> Cell:
        """The cell in a results folder; another configuration of the run has another one."""
        text = json.dumps(config, sort_keys=True) + setting.key()
        name = re.sub(r"[^A-Za-z0-9._=+-]+", "_", setting.label)[:NAME].strip("_")
        keep = "" if setting.keep is None else f"-{setting.keep}"
        return cls(results / FOLDER / f"{name}{keep}-{sha256(text.encode()).hexdigest()[:8]}")

    @property
    def answers(self) -> Path:
        """Where answers are noted until all are there."""
        return self.folder / ANSWERS

    @contextmanager
    def claimed(self) -> Iterator[bool]:
        """Holds the cell; False where another process does."""
        with ExitStack() as stack:
            try:
                stack.enter_context(held(self.folder))
            except BusyError:
                mine = False
            else:
                mine = True
            yield mine

    def tidy(self) -> None:
        """Removes the notes of a run that was killed when its record had just been written."""
        if self.answers.exists():
            with self.claimed() as mine:
                if mine:
                    self.answers.unlink(missing_ok=True)

    def write(self, about: dict[str, Any], samples: Sequence[dict[str, Any]], record: dict[str, Any]) -> None:
        """Writes its three files; raises WriteError."""
        write_json(self.folder / CONFIG, about)
        lines = [json.dumps(sample, ensure_ascii=False, default=str) + "\n" for sample in samples]
        write_text(self.folder / SAMPLES, "".join(lines))
        write_json(self.folder / METRICS, {name: value for name, value in record.items() if name not in EACH})


def busy(results: Path) -> bool:
    """Whether any cell of a results folder is held."""
    for folder in (results / FOLDER).glob("*/"):
        with Cell(folder).claimed() as mine:
            if not mine:
                return True
    return False
