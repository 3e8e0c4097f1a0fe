"""What settings would have answered and cost, computed from what each level did with each sample."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vtprune.pruners.auto.risk import mean_by, monotone

# Levels of one ladder at the most, below the whole model: more of them cost more attempts than they save.
STEPS = 3
# Thresholds that are tried, evenly spread over the scores of the samples that settings are chosen on.
THRESHOLDS = 200


@dataclass(frozen=True)
class Table:
    """What each of n samples did at each of k levels, rising, and in the whole model.

    pictures: (n,) which picture each sample is of; tasks: (n,) its task, "" for none; losses: (n, k) how far each
    answer differs from the whole model's; probability, margin: (n, k) of the answer's first token, and over the
    second one; flops, encoder, kv: (n, k + 1) FLOPs of the prefill, those of them in the tower, and bytes of the cache
    after the prompt, of the whole model in the last place; tokens: (n,) vision tokens of the whole prompt.
    """

    pictures: np.ndarray
    tasks: np.ndarray
    losses: np.ndarray
    probability: np.ndarray
    margin: np.ndarray
    flops: np.ndarray
    encoder: np.ndarray
    kv: np.ndarray
    tokens: np.ndarray

    def score(self, name: str) -> np.ndarray:
        """(n, k) how sure each level was, by the name of the score."""
        found: np.ndarray = getattr(self, name)
        return found

    def where(self, some: np.ndarray) -> Table:
        """The samples that (n,) bool says, or those at some places (m,), in their order."""
        return Table(**{name: values[some] for name, values in vars(self).items()})

    def __len__(self) -> int:
        return len(self.losses)


@dataclass(frozen=True)
class Outcome:
    """What settings, from the boldest to the whole model, would have done: (n, m) losses, FLOPs of all attempts, bytes
    of the cache that is left, and the level whose answer was given."""

    losses: np.ndarray
    flops: np.ndarray
    kv: np.ndarray
    taken: np.ndarray

    def by_picture(self, pictures: np.ndarray) -> np.ndarray:
        """(g, m) the mean losses of each picture."""
        return mean_by(pictures, self.losses)


def fixed(table: Table) -> Outcome:
    """One level for all: each in turn, and the whole model."""
    count, levels = table.losses.shape
    whole = np.zeros((count, 1))
    taken = np.broadcast_to(np.arange(levels + 1), (count, levels + 1))
    return Outcome(np.hstack([table.losses, whole]), table.flops, table.kv, taken)


def growing(table: Table, ladder: Sequence[int], thresholds: np.ndarray, *, score: str, shared: bool) -> Outcome:
    """The levels of a ladder one after another, until the first token of the answer is as sure as a threshold, which
    rise; then the whole model, for everything. shared: whether the tower runs once for all attempts."""
    rungs = [*ladder, table.losses.shape[1]]
    flops, encoder = table.flops[:, rungs], table.encoder[:, rungs]
    again = np.arange(len(rungs)) > 0
    spent = np.cumsum(flops - encoder * (again & shared), axis=1)
    sure = table.score(score)[:, ladder]
    accepted = np.concatenate(
        [sure[:, :, None] >= thresholds, np.ones((len(table), 1, len(thresholds)), dtype=bool)], axis=1
    )
    rung = accepted.argmax(axis=1)
    losses = np.hstack([table.losses, np.zeros((len(table), 1))])
    level = np.array(rungs)[rung]
    found = [
        np.take_along_axis(values, at, axis=1) for values, at in ((losses, level), (spent, rung), (table.kv, level))
    ]
    last = (losses[:, -1:], table.flops[:, -1:], table.kv[:, -1:])
    lost, costs, cached = (np.hstack(pair) for pair in zip(found, last, strict=True))
    whole = np.full((len(table), 1), table.losses.shape[1])
    return Outcome(lost, costs, cached, np.hstack([level, whole]))


def thresholds_of(table: Table, ladder: Sequence[int], score: str) -> np.ndarray:
    """(t,) rising thresholds, from one that accepts everything to one that accepts the surest sample alone."""
    sure = table.score(score)[:, ladder]
    spread = np.quantile(sure, np.linspace(0, 1, THRESHOLDS))
    return np.unique(np.concatenate([[0.0], spread]))


@dataclass(frozen=True)
class Ladder:
    """The levels of a growing setting by their places, by which score they are judged, and the thresholds that a
    calibration chooses among."""

    levels: tuple[int, ...]
    score: str
    thresholds: np.ndarray

    def outcome(self, table: Table, *, shared: bool) -> Outcome:
        """What it would do with samples at each threshold."""
        return growing(table, self.levels, self.thresholds, score=self.score, shared=shared)


def ladders(table: Table) -> Iterator[Ladder]:
    """All ladders of up to `STEPS` levels, with both scores."""
    levels = range(table.losses.shape[1])
    for steps in range(1, STEPS + 1):
        for some in itertools.combinations(levels, steps):
            for score in ("probability", "margin"):
                yield Ladder(some, score, thresholds_of(table, some, score))


def cheapest(outcome: Outcome, boldest: int) -> int:
    """The place of the setting with the fewest FLOPs from `boldest` on: what holds for that one holds for those that
    are more careful, and attempts, or what a method scores, may cost more than the whole model."""
    return boldest + int(outcome.flops[:, boldest:].sum(axis=0).argmin())


def cost_at(outcome: Outcome, pictures: np.ndarray, level: float) -> float:
    """The mean FLOPs of the cheapest setting that loses at most `level` on the very samples, as a share of the whole
    model's: what settings are compared by before anything is proved."""
    losses = monotone(outcome.by_picture(pictures)).mean(axis=0)
    chosen = cheapest(outcome, int((losses <= level).argmax()))
    return float(outcome.flops[:, chosen].sum() / outcome.flops[:, -1].sum())


def best_ladder(table: Table, level: float, *, shared: bool) -> tuple[Ladder, float]:
    """The cheapest ladder on these samples, and the share of the FLOPs that it costs there."""
    found = [(cost_at(one.outcome(table, shared=shared), table.pictures, level), one) for one in ladders(table)]
    cost, ladder = min(found, key=lambda pair: pair[0])
    return ladder, cost
