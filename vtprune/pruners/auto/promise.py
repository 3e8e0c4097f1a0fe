"""What can be promised of a setting: the cheapest one that samples vouch for, and how it would have done on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vtprune.method.growth import SCORES
from vtprune.pruners.auto.ladder import Ladder, Outcome, Table, cheapest, fixed, growing
from vtprune.pruners.auto.risk import (
    check_level,
    conformal,
    crc_bound,
    learn_then_test,
    ltt_bound,
    mean_by,
    monotone,
)

CONFORMAL = "conformal risk control, in expectation"
TESTED = "learn-then-test, with confidence"


@dataclass(frozen=True)
class Promise:
    """What a setting is vouched for.

    agreement: the least share of answers that are the whole model's; confidence: with which probability over
    calibrations, None: in expectation; theorem: which one says so; task: of which task it is alone, "" for all;
    pictures, samples: those that it was calibrated with; risk: the share of their answers that differed; bound: the
    theorem's, at most 1 - agreement; flops, kv: mean shares of the whole model's, all attempts counted; uneven: the
    share of pictures of which a more careful setting would have lost what this one kept; levels: how many samples each
    keep answered; by_task: risk, bound and pictures of each task, where there are several.
    """

    agreement: float
    confidence: float | None
    theorem: str
    task: str
    pictures: int
    samples: int
    risk: float
    bound: float
    flops: float
    kv: float
    uneven: float
    levels: dict[str, int]
    by_task: dict[str, dict[str, float]]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        """One sentence."""
        of = f" of {self.task}" if self.task else ""
        sure = "in expectation" if self.confidence is None else f"with a confidence of {self.confidence:g}"
        return (
            f"at least {self.agreement:.4g} of the answers{of} are the whole model's, {sure} "
            f"({self.theorem.partition(',')[0]}: {self.risk:.2%} differed of {self.samples} samples, "
            f"bound {self.bound:.2%})"
        )


@dataclass(frozen=True)
class Settled:
    """A setting and what is promised of it.

    levels: keeps to try one after another, the last one 1.0 unless it answers everything; threshold, score: how sure
    the first token of an answer has to be, by which score; outcome, chosen: what all settings would have done with the
    calibration's samples, and the place of this one.
    """

    levels: tuple[int | float, ...]
    promise: Promise
    outcome: Outcome
    chosen: int
    threshold: float = 0.0
    score: str = SCORES[0]

    def on(self, table: Table, keeps: Sequence[int | float], *, shared: bool) -> Outcome:
        """What it does with other samples: the only place of each row."""
        if len(self.levels) == 1:
            whole = fixed(table)
            at = len(keeps) if self.levels == (1.0,) else list(keeps).index(self.levels[0])
            return Outcome(*(values[:, [at]] for values in vars(whole).values()))
        places = [list(keeps).index(level) for level in self.levels[:-1]]
        found = growing(table, places, np.array([self.threshold]), score=self.score, shared=shared)
        return Outcome(*(values[:, :1] for values in vars(found).values()))


def prove(
    table: Table,
    keeps: Sequence[int | float],
    ladder: Ladder | None,
    *,
    shared: bool,
    agreement: float,
    confidence: float | None = None,
    task: str = "",
) -> Settled:
    """The cheapest setting for which `agreement` can be proved by these samples: a threshold of a ladder, one of the
    keeps where there is none, or the whole model where no other can be vouched for, or costs less.

    Both theorems vouch for every setting that is more careful than the boldest one that they find, whichever of them
    is taken: losses that never rise are no higher there, and it was tested before. Where it must hold for each of
    several tasks, the most careful of their settings is that one (conformal risk control, proposition 5). Raises
    InputError for too few samples.
    """
    level, delta = 1 - agreement, None if confidence is None else 1 - confidence
    outcome = fixed(table) if ladder is None else ladder.outcome(table, shared=shared)
    chosen = 0
    for name, losses in _by_task(outcome, table).items():
        check_level(level, delta, len(losses), f" of {name}" if name else "")
        own = conformal(monotone(losses), level) if delta is None else learn_then_test(losses, level, delta)
        chosen = max(chosen, own)
    chosen = cheapest(outcome, chosen)
    promise = _promise(outcome, table, chosen, keeps, agreement=agreement, confidence=confidence, task=task)
    if chosen == outcome.losses.shape[1] - 1:
        return Settled((1.0,), promise, outcome, chosen)
    if ladder is None:
        return Settled((keeps[chosen],), promise, outcome, chosen)
    levels = (*(keeps[place] for place in ladder.levels), 1.0)
    threshold = float(ladder.thresholds[chosen])
    return Settled(levels, promise, outcome, chosen, threshold=threshold, score=ladder.score)


def _by_task(outcome: Outcome, table: Table) -> dict[str, np.ndarray]:
    """(g, m) the losses of the pictures of each task."""
    names = np.unique(table.tasks).tolist()
    places = {name: table.tasks == name for name in names}
    return {name: mean_by(table.pictures[own], outcome.losses[own]) for name, own in places.items()}


def _promise(
    outcome: Outcome,
    table: Table,
    chosen: int,
    keeps: Sequence[int | float],
    *,
    agreement: float,
    confidence: float | None,
    task: str,
) -> Promise:
    losses = outcome.by_picture(table.pictures)
    smooth = monotone(losses)
    names = [*(f"{keep:g}" for keep in keeps), "1"]
    taken, counts = np.unique(outcome.taken[:, chosen], return_counts=True)

    def bound(of: np.ndarray) -> float:
        if confidence is None:
            return float(crc_bound(monotone(of))[chosen])
        return ltt_bound(of[:, chosen], 1 - confidence)

    by_task = {
        name: {"pictures": len(own), "risk": float(own[:, chosen].mean()), "bound": bound(own)}
        for name, own in _by_task(outcome, table).items()
    }
    return Promise(
        agreement=agreement,
        confidence=confidence,
        theorem=CONFORMAL if confidence is None else TESTED,
        task=task,
        pictures=len(losses),
        samples=len(table),
        risk=float(losses[:, chosen].mean()),
        bound=bound(losses),
        flops=float(outcome.flops[:, chosen].sum() / table.flops[:, -1].sum()),
        kv=float(outcome.kv[:, chosen].sum() / table.kv[:, -1].sum()),
        uneven=float((smooth[:, chosen] > losses[:, chosen]).mean()),
        levels={names[level]: int(count) for level, count in zip(taken, counts, strict=True)},
        by_task=by_task if len(by_task) > 1 else {},
    )
