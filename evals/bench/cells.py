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

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from vtprune.errors import BusyError, VTPruneError
from vtprune.evals.bench.records import RECORD
from vtprune.evals.bench.scores import sample_scores
from vtprune.evals.settings import Setting
from vtprune.files import held, write_json, write_text
from vtprune.json_files import OBJECT, parse, read_file, read_json

FOLDER = "cells"
CONFIG, METRICS, SAMPLES, ANSWERS = "config.json", "metrics.json", "samples.jsonl", "answers.jsonl"
# What a record has one of for each question, which is in the samples.
EACH = ("answers", "correct", "kept_tokens")
WHAT = "a file of a cell"
# Characters of a method's name in the name of its folder.
NAME = 48


class _Asked(TypedDict):
    """Of a question what its results are told apart by."""

    task: str
    doc_id: int | str


class _Cost(TypedDict):
    kept_tokens: float


class _Sample(TypedDict):
    """A line of samples.jsonl."""

    question: _Asked
    answer: Any
    scores: dict[str, Any]
    cost: _Cost


SAMPLE = TypeAdapter(_Sample)


def of_each(samples: Sequence[dict[str, Any]], scores: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """What a record has of each question: the answer, its score by its task's main metric, the tokens kept."""
    metrics = {score["task"]: score["metric"] for score in scores}
    return {
        "answers": [sample["answer"] for sample in samples],
        "correct": [
            number
            for sample in samples
            for number in sample_scores([sample["scores"]], metrics[sample["question"]["task"]])
        ],
        "kept_tokens": [round(sample["cost"]["kept_tokens"], 3) for sample in samples],
    }


@dataclass(frozen=True)
class Written:
    """What a cell's files hold: with what it was made, each question, and the whole record."""

    about: dict[str, Any]
    samples: list[dict[str, Any]]
    record: dict[str, Any]


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

    def read(self) -> Written | None:
        """What `write` left, None where that is not whole or not readable; the caller holds the cell."""
        try:
            about = read_json(OBJECT, self.folder / CONFIG, WHAT)
            record = read_json(RECORD, self.folder / METRICS, WHAT)
            lines = read_file(self.folder / SAMPLES, WHAT).split(b"\n")
            samples = [parse(SAMPLE, line, self.folder / SAMPLES, WHAT) for line in lines if line]
            return Written(about, samples, {**record, **of_each(samples, record["scores"])})
        except (VTPruneError, KeyError):
            return None


def busy(results: Path) -> bool:
    """Whether any cell of a results folder is held."""
    for folder in (results / FOLDER).glob("*/"):
        with Cell(folder).claimed() as mine:
            if not mine:
                return True
    return False
