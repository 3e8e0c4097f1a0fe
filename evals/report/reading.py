"""From folders to groups of settings that may be compared."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vtprune.errors import RunError, VTPruneError, first_line
from vtprune.evals.report.bench_file import is_bench, read_bench
from vtprune.evals.report.lmms_file import is_lmms, read_lmms
from vtprune.evals.report.runs import Row, Run

# Of an identity: what a heading says first, and what it leaves out where nothing else tells two groups apart.
FIRST = ("run by", "limit", "seed", "random_seed", "dtype")


@dataclass
class Group:
    """Settings of one model on the same questions, from one run or several: all else that numbers depend on is equal.

    rows: the unpruned model first; twice: settings that were measured more than once, with other answers.
    """

    identity: dict[str, Any]
    runs: list[Run] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)

    @property
    def model(self) -> str:
        """What the model is called."""
        return self.runs[0].model

    @property
    def tasks(self) -> list[str]:
        """In the order of the files."""
        return list(dict.fromkeys(task for row in self.rows for task in row.scores))

    @property
    def questions(self) -> dict[str, int]:
        """How many each task has."""
        return {task: count for run in self.runs for task, count in run.questions.items()}

    @property
    def unpruned(self) -> Row | None:
        """The model as it is, where it was run."""
        return next((row for row in self.rows if row.unpruned), None)

    def add(self, run: Run) -> None:
        """Takes a run in; of a setting that is there already the tasks are added, and the later numbers of one task
        stand."""
        self.runs.append(run)
        known = {row.key: place for place, row in enumerate(self.rows)}
        for row in run.rows:
            if row.key in known:
                place = known[row.key]
                self.rows[place] = self._joined(self.rows[place], row)
            else:
                self.rows.append(row)
        self.rows.sort(key=lambda row: not row.unpruned)

    def _joined(self, old: Row, new: Row) -> Row:
        if any(new.scores[task] != old.scores[task] for task in old.scores.keys() & new.scores.keys()):
            self.twice.append(f"{new.name} was measured twice, with other answers; shown is {new.source}")
        return Row(
            key=new.key,
            method=new.method,
            label=new.label,
            keep=new.keep,
            scores={**old.scores, **new.scores},
            spent={**old.spent, **new.spent},
            source=new.source,
            categories=new.categories or old.categories,
            metrics={**old.metrics, **new.metrics},
            untrained=new.untrained,
        )


@dataclass(frozen=True)
class Found:
    """What was read, and one line for each file or folder that could not be."""

    groups: list[Group]
    broken: list[str]


def read_all(places: Sequence[Path]) -> Found:
    """Every result in these folders and the ones inside them, grouped; raises RunError, naming each that could not be
    read, where none could."""
    runs: list[Run] = []
    broken: list[str] = []
    seen: set[Path] = set()
    for place in places:
        files = _files(place)
        if not files:
            broken.append(_nothing(place))
        for path in files:
            if path.resolve() in seen:
                continue
            seen.add(path.resolve())
            try:
                runs.append(read_bench(path) if is_bench(path) else read_lmms(path))
            except VTPruneError as error:
                broken.append(first_line(error))
    if not runs:
        raise RunError("; ".join(broken))
    return Found(_grouped(runs), broken)


def _files(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    # What a task writes for a server beside its results may be called as they are.
    found = (path for path in place.rglob("*.json") if "submissions" not in path.relative_to(place).parts)
    return sorted(path for path in found if path.is_file() and (is_bench(path) or is_lmms(path)))


def _nothing(place: Path) -> str:
    if not place.exists():
        return f"{place} is not there; give folders that vtprune bench or lmms-eval wrote"
    return f"{place} holds no results: neither results.json of vtprune bench nor a *_results.json of lmms-eval"


def _grouped(runs: list[Run]) -> list[Group]:
    groups: dict[str, list[Group]] = {}
    for run in sorted(runs, key=lambda run: run.created):
        alike = groups.setdefault(json.dumps(run.identity, sort_keys=True, default=str), [])
        group = next((group for group in alike if _one_metric(group, run)), None)
        if group is None:
            # What else tells it from the first one, for the headings.
            metrics = _metrics(run.rows) if alike else {}
            group = Group({**run.identity, **{f"metric of {task}": metric for task, metric in metrics.items()}})
            alike.append(group)
        group.add(run)
    return sorted((group for alike in groups.values() for group in alike), key=lambda group: group.model)


def _metrics(rows: Iterable[Row]) -> dict[str, str]:
    return {task: score.metric for row in rows for task, score in row.scores.items()}


def _one_metric(group: Group, run: Run) -> bool:
    """Whether the main numbers of a run are of the metrics that a group shows of the same tasks."""
    shown, own = _metrics(group.rows), _metrics(run.rows)
    return all(shown[task] == own[task] for task in shown.keys() & own.keys())


def told_apart(groups: Sequence[Group]) -> list[str]:
    """What a heading says of each group beside its model and tasks, so that no two are headed alike."""
    usual = [_text(group, [name for name in FIRST if name in group.identity]) for group in groups]
    texts = []
    for group, text in zip(groups, usual, strict=True):
        alike = [
            other
            for other, its in zip(groups, usual, strict=True)
            if other is not group and (other.model, its, other.questions) == (group.model, text, group.questions)
        ]
        names = {*group.identity, *(name for other in alike for name in other.identity)} - {*FIRST, "model"}
        odd = [name for name in names if any(other.identity.get(name) != group.identity.get(name) for other in alike)]
        texts.append(", ".join(part for part in (text, _text(group, sorted(odd))) if part))
    return texts


def _text(group: Group, names: Sequence[str]) -> str:
    return ", ".join(_said(name, group.identity.get(name)) for name in names)


def _said(name: str, value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if name == "limit":
        return "every question" if value in (None, 0) else f"limit {value}"
    if name == "run by":
        return f"by {value}"
    if name == "dtype" and value:
        return str(value)
    return f"{name.replace('_', ' ')} {'not given' if value in (None, '') else value}"
