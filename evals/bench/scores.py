"""From lmms-eval's results to the scores of a setting, overall and by category."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from vtprune.errors import RunError


@dataclass(frozen=True)
class Score:
    """One number of one task: stderr is None where lmms-eval has none for the metric."""

    name: str
    task: str
    metric: str
    value: float
    stderr: float | None
    count: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dict(vars(self))


def standard_error(values: list[float]) -> float | None:
    """Of the mean; a binomial one (p(1-p)/n) for right-or-wrong scores."""
    count = len(values)
    if count < 2:
        return None
    mean = sum(values) / count
    return math.sqrt(sum((value - mean) ** 2 for value in values) / count / count)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def all_metrics(results: dict[str, Any]) -> dict[str, float]:
    """Everything that lmms-eval has a number for, under its own names."""
    return {key: float(value) for key, value in results.items() if "," in key and _number(value) is not None}


def main_metric(task: str, results: dict[str, Any]) -> tuple[str, float, float | None]:
    """The first metric of a task that has a number: (name, value, standard error)."""
    for key, value in results.items():
        metric, found, variant = key.partition(",")
        number = _number(value)
        if found and number is not None and "_stderr" not in metric:
            stderr = _number(results.get(f"{metric}_stderr_clt,{variant}"))
            return metric, number, stderr
    raise RunError(f"{task}: lmms-eval returned no number for it")


def sample_scores(samples: list[dict[str, Any]], metric: str) -> list[float | None]:
    """The metric of each sample, None where it is not a number."""
    return [_number(sample.get(metric)) for sample in samples]


def task_scores(task: str, results: dict[str, Any], samples: list[dict[str, Any]]) -> list[Score]:
    """The task's main metric, and the same by category where its samples have one."""
    metric, value, stderr = main_metric(task, results)
    numbers = sample_scores(samples, metric)
    if None not in numbers:
        stderr = standard_error([number for number in numbers if number is not None])
    scores = [Score(task, task, metric, value, stderr=stderr, count=len(samples))]
    groups: dict[str, list[float]] = defaultdict(list)
    for sample, number in zip(samples, numbers, strict=True):
        category = sample["doc"].get("category")
        if isinstance(category, str) and number is not None:
            groups[category].append(number)
    for category, values in sorted(groups.items()):
        mean = sum(values) / len(values)
        scores.append(Score(category, task, metric, mean, stderr=standard_error(values), count=len(values)))
    return scores
