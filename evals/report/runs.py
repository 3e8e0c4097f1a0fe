"""What the report knows of a result folder, whichever command wrote it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from vtprune.evals.paired import Share, share_kept
from vtprune.evals.settings import UNPRUNED
from vtprune.method.texts import show_keep


@dataclass(frozen=True)
class TaskScore:
    """The main number of a task: value and stderr as the file has them (a share of 1, or points).

    answers: the score of each question by its name, where they are known and `value` is their mean; else empty.
    """

    metric: str
    value: float
    stderr: float | None
    answers: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_share(self) -> bool:
        """Whether it is a share of right answers, to be shown in percent."""
        return 0 <= self.value <= 1


@dataclass(frozen=True)
class Category:
    """A task's number on the questions of one kind."""

    task: str
    name: str
    value: float


@dataclass(frozen=True)
class Costs:
    """Vision tokens a question, shares of the unpruned model's FLOPs and cache (1.0: all of it), and the prefill in
    milliseconds and as a multiple of the unpruned one's. None is what nobody measured."""

    before: float | None = None
    kept: float | None = None
    published: float | None = None
    flops: float | None = None
    kv: float | None = None
    kv_end: float | None = None
    prefill_ms: float | None = None
    prefill_ratio: float | None = None


@dataclass(frozen=True)
class Row:
    """One setting: a method, how much it keeps, its options.

    spent: what was measured of each task, or of several that were measured together; metrics: by task everything that
    lmms-eval has a number for, under its own names; untrained: what a reader has to know of a method that nobody has
    trained; source: the file that it was read from.
    """

    key: str
    method: str
    label: str
    keep: int | float | None
    scores: Mapping[str, TaskScore]
    spent: Mapping[str, Costs]
    source: Path
    categories: tuple[Category, ...] = ()
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    untrained: str = ""

    @property
    def unpruned(self) -> bool:
        """Whether it is the model as it is."""
        return self.method == UNPRUNED

    @property
    def costs(self) -> Costs:
        """The mean over tasks, as that of scores; None where one of them has no number."""
        means = {}
        for one in fields(Costs):
            told = [value for costs in self.spent.values() if (value := getattr(costs, one.name)) is not None]
            whole = told and len(told) == len(self.spent)
            means[one.name] = math.fsum(told) / len(told) if whole else None
        return Costs(**means)

    @property
    def name(self) -> str:
        """The label and the keep, as a sentence names it."""
        if self.unpruned:
            return "unpruned"
        return self.label if self.keep is None else f"{self.label} {show_keep(self.keep)}"


@dataclass(frozen=True)
class Run:
    """A file of results: identity is what every number in it depends on beside its setting."""

    path: Path
    model: str
    identity: Mapping[str, Any]
    rows: tuple[Row, ...]
    questions: Mapping[str, int]
    created: str = ""
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def kept_of(ours: TaskScore | None, unpruned: TaskScore | None) -> Share | None:
    """What is left of the unpruned score: with its paired error where both answered the same questions, without one
    elsewhere; None where there is nothing to compare."""
    if ours is None or unpruned is None or unpruned.value <= 0:
        return None
    pairs = paired(ours, unpruned)
    return Share(ours.value / unpruned.value, None) if pairs is None else share_kept(*pairs)


def paired(ours: TaskScore, other: TaskScore) -> tuple[list[float], list[float]] | None:
    """The scores of both on the same questions in one order, None where they did not answer the same ones."""
    if not ours.answers or ours.answers.keys() != other.answers.keys():
        return None
    names = sorted(ours.answers)
    return [ours.answers[name] for name in names], [other.answers[name] for name in names]
