"""From lmms-eval's results to the scores of a setting, overall and by category."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, replace
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


def metric_names(results: dict[str, Any]) -> list[str]:
    """The metrics of a task that have a number, in its order."""
    found = [key.partition(",")[0] for key, value in results.items() if "," in key and _number(value) is not None]
    return [name for name in dict.fromkeys(found) if "_stderr" not in name]


def main_metric(task: str, results: dict[str, Any], wanted: str | None = None) -> tuple[str, float, float | None]:
    """The wanted metric of a task, or its first one: (name, value, standard error).

    Raises RunError where the task has no number, or none of that name.
    """
    names = metric_names(results)
    if not names:
        raise RunError(f"{task}: lmms-eval returned no number for it")
    name = names[0] if wanted is None else wanted
    if name not in names:
        raise RunError(f"{task}: it has no metric {name!r}, it has {', '.join(names)}; give one of them as --metric")
    key = next(key for key in results if key.partition(",")[0] == name and _number(results[key]) is not None)
    variant = key.partition(",")[2]
    return name, float(results[key]), _number(results.get(f"{name}_stderr_clt,{variant}"))


def sample_scores(samples: list[dict[str, Any]], metric: str) -> list[float | None]:
    """The metric of each sample, None where it is not a number: many tasks write a sample's score beside its
    category, to make more of it than a mean."""
    found = [sample.get(metric) for sample in samples]
    return [_number(value.get("score") if isinstance(value, dict) else value) for value in found]


def task_scores(
    task: str, results: dict[str, Any], samples: list[dict[str, Any]], wanted: str | None = None
) -> list[Score]:
    """The task's main metric (the wanted one, or its first), and the same by category where its samples have one."""
    metric, value, stderr = main_metric(task, results, wanted)
    numbers = sample_scores(samples, metric)
    scores = [Score(task, task, metric, value, stderr=stderr, count=len(samples))]
    known = [number for number in numbers if number is not None]
    # A number that is no mean of its samples' scores has no error of theirs, and no parts.
    if not known or not math.isclose(sum(known) / len(known), value, rel_tol=1e-6, abs_tol=1e-9):
        return scores
    scores[0] = replace(scores[0], stderr=standard_error(known))
    groups: dict[str, list[float]] = defaultdict(list)
    for sample, number in zip(samples, numbers, strict=True):
        category = sample["doc"].get("category")
        if isinstance(category, str) and number is not None:
            groups[category].append(number)
    for category, values in sorted(groups.items()):
        mean = sum(values) / len(values)
        scores.append(Score(category, task, metric, mean, stderr=standard_error(values), count=len(values)))
    return scores
