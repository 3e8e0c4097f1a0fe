"""The shapes of results.json, so that a damaged file is told from a whole one."""

from __future__ import annotations

from typing import NotRequired

from pydantic import FiniteFloat, TypeAdapter
from typing_extensions import TypedDict

from vtprune.evals.run_file import Head

Keep = int | FiniteFloat | None


class Score(TypedDict):
    """A number of a setting: its task's (then both names are the same), or a category's."""

    name: str
    task: str
    metric: str
    value: FiniteFloat
    stderr: FiniteFloat | None
    count: NotRequired[int]


class Tokens(TypedDict):
    """Vision tokens a sample, before and after."""

    before: FiniteFloat
    kept: FiniteFloat
    published: NotRequired[FiniteFloat | None]


class Flops(TypedDict):
    """Shares of the unpruned prefill's FLOPs."""

    share: FiniteFloat
    scoring_share: FiniteFloat


class Cached(TypedDict):
    """Shares of the unpruned cache."""

    share: FiniteFloat
    end_share: FiniteFloat


class Prefill(TypedDict):
    """Milliseconds."""

    ms: FiniteFloat
    ratio: FiniteFloat
    over_scoreless_ms: FiniteFloat | None


class TaskCosts(TypedDict):
    """What one of several tasks cost."""

    tokens: Tokens
    flops: Flops
    kv: Cached


class Worst(TypedDict):
    """The dearest of the pictures that are hard to prune, and its share of the unpruned FLOPs."""

    picture: str
    share: FiniteFloat


class Record(TypedDict):
    """A setting of results.json."""

    method: str
    label: str
    keep: Keep
    scores: list[Score]
    tokens: Tokens
    flops: Flops
    kv: Cached
    prefill: Prefill
    correct: NotRequired[list[FiniteFloat | None]]
    metrics: NotRequired[dict[str, dict[str, FiniteFloat]]]
    by_task: NotRequired[dict[str, TaskCosts]]
    worst: NotRequired[Worst]


class Question(TypedDict):
    """What every setting was asked."""

    doc_id: int | str


class ResultsFile(Head):
    """results.json."""

    questions: list[Question]
    settings: dict[str, Record]


RESULTS, RECORD = TypeAdapter(ResultsFile), TypeAdapter(Record)
