"""What follows from a group's numbers: shares kept, the Pareto front, losses by category, wins against baselines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vtprune.evals.paired import Difference, Share, difference, holm, mean_share
from vtprune.evals.report.reading import Group
from vtprune.evals.report.runs import Row, kept_of, paired
from vtprune.evals.settings import BASELINES, DOWNSCALE

DULL = (*BASELINES, DOWNSCALE)
# A win is a difference whose p-value is below this after Holm's correction over its table.
ALPHA = 0.05


@dataclass(frozen=True)
class Duel:
    """A setting against a baseline on the same questions at the same keep; p is corrected over the table."""

    row: Row
    baseline: Row
    found: Difference
    p: float

    @property
    def verdict(self) -> str:
        """win, loss, or tie."""
        if self.p >= ALPHA:
            return "tie"
        return "win" if self.found.mean > 0 else "loss"


def is_dull(row: Row) -> bool:
    """Whether it is a baseline as it comes, without options."""
    return row.method in DULL and row.label == row.method


def overall_share(group: Group, row: Row) -> Share | None:
    """What is left of the unpruned scores, the mean over the group's tasks on which the unpruned model scores above 0;
    None where one of them is missing."""
    if group.unpruned is None:
        return None
    full = group.unpruned.scores
    tasks = [task for task in group.tasks if task not in nothing_to_lose(group)]
    shares = [kept_of(row.scores.get(task), full.get(task)) for task in tasks]
    known = [share for share in shares if share is not None]
    return mean_share(known) if known and len(known) == len(shares) else None


def nothing_to_lose(group: Group) -> list[str]:
    """The tasks on which the unpruned model scores 0 or less: of that no share can be left."""
    full = {} if group.unpruned is None else group.unpruned.scores
    return [task for task in group.tasks if task in full and full[task].value <= 0]


def duels(group: Group, task: str) -> list[Duel]:
    """Every method against every baseline that kept as much, on one task."""
    pairs = [
        (row, baseline, both)
        for row in group.rows
        if not row.unpruned and not is_dull(row) and row.keep is not None
        for baseline in group.rows
        if is_dull(baseline) and _same(row.keep, baseline.keep)
        if task in row.scores and task in baseline.scores
        if (both := paired(row.scores[task], baseline.scores[task])) is not None
    ]
    found = [difference(*both) for _, _, both in pairs]
    corrected = holm([one.p for one in found])
    return [Duel(row, baseline, one, p) for (row, baseline, _), one, p in zip(pairs, found, corrected, strict=True)]


def _same(one: int | float | None, other: int | float | None) -> bool:
    """1 token and 1.0, all of them, differ."""
    return type(one) is type(other) and one == other


def front(
    rows: Sequence[Row], cost: Callable[[Row], float | None], height: Callable[[Row], float | None]
) -> list[Row]:
    """The rows for whose cost nothing is higher, and for whose height nothing is cheaper; cheapest first."""
    known = [
        (spent, reached, row)
        for row in rows
        if (spent := cost(row)) is not None and (reached := height(row)) is not None
    ]
    known.sort(key=lambda one: (one[0], -one[1]))
    best, kept = (0.0, float("-inf")), []
    for spent, reached, row in known:
        if reached > best[1] or (spent, reached) == best:
            best = (spent, reached)
            kept.append(row)
    return kept


def category_losses(group: Group, task: str) -> tuple[list[str], dict[str, list[float | None]]]:
    """The categories of a task, and by the key of each pruned row its change of each against the unpruned model."""
    if group.unpruned is None:
        return [], {}
    full = {one.name: one.value for one in group.unpruned.categories if one.task == task}
    changes: dict[str, list[float | None]] = {}
    for row in group.rows:
        own = {one.name: one.value for one in row.categories if one.task == task}
        if not row.unpruned and own:
            changes[row.key] = [own[name] - value if name in own else None for name, value in full.items()]
    return list(full), changes
