"""results.json of `vtprune bench`, read against its shape."""

from __future__ import annotations

import math
import os
import shlex
from pathlib import Path
from typing import Any, NotRequired

from pydantic import FiniteFloat, TypeAdapter
from typing_extensions import TypedDict

from vtprune.errors import FileError
from vtprune.evals.bench.records import RESULTS
from vtprune.evals.bench.results import FILE, FORMAT
from vtprune.evals.report.runs import Category, Costs, Row, Run, TaskScore
from vtprune.evals.run_file import HEAD
from vtprune.json_files import parse, read_file

WHAT = "a results file of vtprune bench"


class Asked(TypedDict):
    """A question, and of which task it is."""

    task: str


class Answered(TypedDict):
    """What a setting answered."""

    correct: NotRequired[list[FiniteFloat | None]]
    metrics: NotRequired[dict[str, dict[str, FiniteFloat]]]


class Further(TypedDict):
    """What the report reads of results.json beside its tables' numbers."""

    questions: list[Asked]
    settings: dict[str, Answered]
    versions: NotRequired[dict[str, str]]
    machine: NotRequired[dict[str, Any]]
    left_out: NotRequired[dict[str, str]]
    untrained: NotRequired[dict[str, str]]
    command: NotRequired[str]
    commands: NotRequired[list[str]]
    created: NotRequired[str]


FURTHER = TypeAdapter(Further)


def read_bench(path: Path) -> Run:
    """The run that a results.json holds; raises FileError for a broken one, an empty one, and another format."""
    content = read_file(path, WHAT)
    head = parse(HEAD, content, path, WHAT)
    if head["format"] != FORMAT:
        raise FileError(f"{path} has format {head['format']}, and this version reads format {FORMAT}; run it again")
    parse(RESULTS, content, path, WHAT)
    data: dict[str, Any] = parse(FURTHER, content, path, WHAT)
    if not data["settings"]:
        raise FileError(f"{path} holds no finished setting; let its vtprune bench go on")
    machine = data.get("machine", {})
    config = {**data["config"], "run by": "vtprune bench", "dtype": machine.get("dtype", data["config"].get("dtype"))}
    untrained = data.get("untrained", {})
    asked = [(one["task"], f"{one['task']}/{one['doc_id']}") for one in data["questions"]]
    counts: dict[str, int] = {}
    for task, _ in asked:
        counts[task] = counts.get(task, 0) + 1
    return Run(
        path=path,
        model=str(config.get("model", "unnamed model")),
        identity=config,
        rows=tuple(_row(key, one, asked, path=path, untrained=untrained) for key, one in data["settings"].items()),
        questions=counts,
        created=data.get("created", ""),
        command="\n".join(plain_command(text) for text in data.get("commands", [data.get("command", "")])),
        versions=data.get("versions", {}),
        machine=machine,
        notes=tuple(f"Left out: {name}: {reason}." for name, reason in data.get("left_out", {}).items()),
    )


def is_bench(path: Path) -> bool:
    """Whether a file has the name of such results."""
    return path.name == FILE


def plain_command(text: str) -> str:
    """A command as it is typed, without the folder of its program."""
    program, _, rest = text.partition(" ")
    return f"{os.path.basename(program)} {rest}".strip()


def quoted(parts: list[str]) -> str:
    """Words as a shell takes them."""
    return " ".join(shlex.quote(part) for part in parts)


def _row(key: str, one: dict[str, Any], asked: list[tuple[str, str]], *, path: Path, untrained: dict[str, str]) -> Row:
    numbers = one.get("correct", [])
    if numbers and len(numbers) != len(asked):
        raise FileError(f"{path} is not {WHAT}: {one['label']} has {len(numbers)} answers to {len(asked)} questions")
    answers: dict[str, dict[str, float]] = {}
    holes = set()
    for (task, question), number in zip(asked, numbers, strict=bool(numbers)):
        if number is None:
            holes.add(task)
        else:
            answers.setdefault(task, {})[question] = number
    main = [score for score in one["scores"] if score["name"] == score["task"]]
    scores = {
        score["task"]: task_score(score, {} if score["task"] in holes else answers.get(score["task"], {}))
        for score in main
    }
    if not scores:
        raise FileError(f"{path} is not {WHAT}: {one['label']} has no score")
    tokens, prefill = one["tokens"], one["prefill"]
    return Row(
        key=key,
        method=one["method"],
        label=one["label"],
        keep=one["keep"],
        scores=scores,
        spent={
            "+".join(scores): Costs(
                before=tokens["before"],
                kept=tokens["kept"],
                published=tokens.get("published"),
                flops=one["flops"]["share"],
                kv=one["kv"]["share"],
                kv_end=one["kv"]["end_share"],
                prefill_ms=prefill["ms"],
                prefill_ratio=prefill["ratio"],
            )
        },
        source=path,
        categories=tuple(
            Category(score["task"], score["name"], score["value"])
            for score in one["scores"]
            if score["name"] != score["task"]
        ),
        metrics=one.get("metrics", {}),
        untrained=untrained.get(one["label"], ""),
    )


def task_score(score: dict[str, Any], answers: dict[str, float]) -> TaskScore:
    """A task's number, with the answers where it is their mean: sums and F1 scores are not."""
    mean = math.fsum(answers.values()) / len(answers) if answers else math.nan
    own = math.isclose(mean, score["value"], rel_tol=1e-6, abs_tol=1e-9)
    return TaskScore(score["metric"], score["value"], score["stderr"], answers if own else {})
