"""The shapes of what vtprune writes as JSON and reads back, so that a damaged file is told from a whole one."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from pydantic import ConfigDict, FiniteFloat, TypeAdapter
from typing_extensions import TypedDict

Keep = int | FiniteFloat | None


class Entry(TypedDict):
    """A line of a journal: one answer, under the key of its question."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]

    key: str
    text: str
    input_tokens: int
    output_tokens: int
    seconds: FiniteFloat
    cost: dict[str, FiniteFloat | str | None]


class Score(TypedDict):
    """A number of a setting: its task's (then both names are the same), or a category's."""

    name: str
    task: str
    metric: str
    value: FiniteFloat
    stderr: FiniteFloat | None


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


class Question(TypedDict):
    """What every setting was asked."""

    doc_id: int | str


class ResultsHead(TypedDict):
    """What every results.json has, of whatever version."""

    format: int
    config: dict[str, Any]


class ResultsFile(ResultsHead):
    """results.json."""

    questions: list[Question]
    settings: dict[str, Record]


class Trial(TypedDict):
    """A trial of search.json."""

    number: int
    params: dict[str, Any]
    state: Literal["measured", "infeasible", "failed"]
    objective: FiniteFloat | None
    reason: str | None
    pruner: dict[str, Any]
    kept: NotRequired[FiniteFloat]
    tokens: NotRequired[FiniteFloat]
    flops_share: NotRequired[FiniteFloat]
    least_flops: NotRequired[FiniteFloat | None]


class Held(TypedDict):
    """A setting on the held-out samples."""

    objective: FiniteFloat | None


class Check(TypedDict):
    """What the held-out samples said."""

    trial: int
    samples: int
    defaults: Held | None
    found: Held | None
    gain: NotRequired[FiniteFloat]
    gain_stderr: NotRequired[FiniteFloat | None]


class SearchHead(TypedDict):
    """What every search.json has, of whatever version."""

    format: int
    config: dict[str, Any]


class SearchFile(SearchHead):
    """search.json."""

    trials: list[Trial]
    best: int | None
    check: Check | None


class Ranks(TypedDict):
    """The file that `vtprune arank` writes."""

    format: Literal["vtprune-arank"]
    arank: list[FiniteFloat]
    layers: list[int]


class Captioned(TypedDict):
    """A line of metadata.jsonl."""

    file_name: str
    question: NotRequired[str | None]


ENTRY = TypeAdapter(Entry)
RESULTS_HEAD, RESULTS = TypeAdapter(ResultsHead), TypeAdapter(ResultsFile)
SEARCH_HEAD, SEARCH = TypeAdapter(SearchHead), TypeAdapter(SearchFile)
RANKS, CAPTIONED = TypeAdapter(Ranks), TypeAdapter(Captioned)
