"""What a method says that runs another one at rising budgets, until an answer is sure enough."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vtprune.method.pruner import Pruner

# How sure a model is of the first token of an answer: its probability, and by how much it leads the second one.
SCORES = ("probability", "margin")


@dataclass(frozen=True)
class Origin:
    """With what a growing setting was calibrated, and so where its promise holds.

    base: numbers of the model's weights (`BaseSample.metadata`); dtype: its name; most_tokens: vision tokens of the
    largest prompt; generation: options of `generate` by name.
    """

    base: Mapping[str, str]
    dtype: str
    most_tokens: int
    generation: Mapping[str, object]


@dataclass(frozen=True)
class Growth:
    """One method at several levels.

    method: at the level `fixed`, where forwards run that no `generate` makes; levels: keeps in the order in which
    they are tried, the last one for whatever is left; threshold: how sure, by `score`, the first token of an answer
    has to be at any level but the last; origin: None where nobody calibrated it; promise: what it is vouched for.
    """

    method: Pruner
    levels: tuple[int | float, ...]
    threshold: float
    score: str
    fixed: int | float
    origin: Origin | None = None
    promise: str = ""
