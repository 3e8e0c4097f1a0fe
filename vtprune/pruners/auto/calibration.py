"""calibration.json: what `vtprune calibrate` measured on a model, and what can be promised by it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import FiniteFloat, TypeAdapter
from typing_extensions import TypedDict

from vtprune.errors import FileError, InputError
from vtprune.json_files import read_json
from vtprune.pruners.auto.ladder import Outcome, Table, best_ladder, fixed
from vtprune.pruners.auto.risk import (
    check_level,
    conformal,
    crc_bound,
    learn_then_test,
    ltt_bound,
    monotone,
)

CALIBRATION_NAME = "calibration.json"
FORMAT, VERSION = "vtprune-calibration", 1
WHAT = "a calibration as `vtprune calibrate` writes it"
CONFORMAL = "conformal risk control, in expectation"
TESTED = "learn-then-test, with confidence"

Row = list[FiniteFloat]


class TableFile(TypedDict):
    """`Table`, sample by sample."""

    pictures: list[int]
    tasks: list[str]
    losses: list[Row]
    probability: list[Row]
    margin: list[Row]
    flops: list[Row]
    encoder: list[Row]
    kv: list[Row]
    tokens: list[int]


class CalibrationFile(TypedDict):
    """calibration.json. keeps: the levels below the whole model, rising; shared: whether the tower's work is the same
    at all of them; tuning, calibration: the samples that settings are chosen on, and those that vouch for one."""

    format: str
    version: int
    model: str
    base: dict[str, str]
    dtype: str
    processor: str
    generation: dict[str, Any]
    loss: str
    source: str
    seed: int
    method: dict[str, Any]
    keeps: list[int | FiniteFloat]
    shared: bool
    tuning: TableFile
    calibration: TableFile


CALIBRATION = TypeAdapter(CalibrationFile)


@dataclass(frozen=True)
class Promise:
    """What a setting is vouched for.

    agreement: the least share of answers that are the whole model's; confidence: with which probability over
    calibrations, None: in expectation; theorem: which one says so; task: of which task it is alone, "" for all;
    pictures, samples: those that it was calibrated with; risk: the share of their answers that differed; bound: the
    theorem's, at most 1 - agreement; flops, kv: mean shares of the whole model's, all attempts counted; uneven: the
    share of pictures of which a more careful setting would have lost what this one kept; levels: how many samples each
    keep answered; by_task: risk, bound and samples of each task, where there are several.
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
    threshold: float
    score: str
    promise: Promise
    outcome: Outcome
    chosen: int


def read_calibration(folder: Path) -> CalibrationFile:
    """The calibration in a folder; raises FileError for a file that is none, or of another version."""
    path = folder / CALIBRATION_NAME
    hint = "; run vtprune calibrate"
    data: CalibrationFile = read_json(CALIBRATION, path, WHAT, hint)
    if (data["format"], data["version"]) != (FORMAT, VERSION):
        raise FileError(f"{path} is of version {data['version']!r}, and this vtprune reads {VERSION}{hint}")
    levels = len(data["keeps"])
    for name in ("tuning", "calibration"):
        _check_table(data[name], levels, path, name)
    return data


def _check_table(table: TableFile, levels: int, path: Path, name: str) -> None:
    count = len(table["losses"])
    for column, values in table.items():
        width = {"losses": levels, "probability": levels, "margin": levels, "flops": levels + 1}.get(column)
        width = levels + 1 if column in ("encoder", "kv") else width
        rows: Any = values
        if len(rows) != count or (width is not None and any(len(row) != width for row in rows)):
            raise FileError(f"{path} is not {WHAT}: {name}.{column} does not fit {count} samples and {levels} keeps")
    if not count:
        raise FileError(f"{path} is not {WHAT}: {name} holds no samples")


def to_file(table: Table) -> TableFile:
    """A table as it is written down."""
    return {name: values.tolist() for name, values in vars(table).items()}  # type: ignore[return-value]


def table_of(data: TableFile) -> Table:
    """The arrays of a table."""
    return Table(**{name: np.array(values) for name, values in data.items()})


def settle(
    data: CalibrationFile,
    *,
    agreement: float,
    confidence: float | None = None,
    adaptive: bool = True,
    task: str | None = None,
) -> Settled:
    """The cheapest setting of a calibrated method that keeps `agreement`, as far as this can be proved.

    Where it must hold for each of several tasks, the most careful of their settings is taken (conformal risk control,
    proposition 5); task: that of one alone. Where nothing but the whole model can be vouched for, it is the setting.
    Raises InputError for too few samples, and for a task that was not calibrated.
    """
    level = 1 - agreement
    delta = None if confidence is None else 1 - confidence
    tuning, table = table_of(data["tuning"]), table_of(data["calibration"])
    if task is not None:
        known = sorted(set(table.tasks.tolist()))
        if task not in known:
            names = ", ".join(one for one in known if one) or "none"
            raise InputError(f"task: {task!r} was not calibrated; tasks are {names}")
        table = table.where(table.tasks == task)
        own = tuning.where(tuning.tasks == task)
        tuning = own if len(own) else tuning
    keeps: list[int | float] = list(data["keeps"])
    if adaptive:
        ladder, _ = best_ladder(tuning, level, shared=data["shared"])
        outcome = ladder.outcome(table, shared=data["shared"])
    else:
        outcome = fixed(table)
    parts = {str(name): table.tasks == name for name in np.unique(table.tasks)}
    chosen = max(_choose(outcome, table, some, level, delta, name) for name, some in parts.items())
    promise = _promise(outcome, table, chosen, keeps, agreement=agreement, confidence=confidence, task=task)
    whole = chosen == outcome.losses.shape[1] - 1
    if whole:
        return Settled((1.0,), 0.0, "probability", promise, outcome, chosen)
    if not adaptive:
        return Settled((keeps[chosen],), 0.0, "probability", promise, outcome, chosen)
    threshold = float(ladder.thresholds[chosen])
    rungs: tuple[int | float, ...] = tuple(keeps[place] for place in ladder.levels)
    return Settled((*rungs, 1.0), threshold, ladder.score, promise, outcome, chosen)


def _choose(outcome: Outcome, table: Table, some: np.ndarray, level: float, delta: float | None, task: str) -> int:
    """The setting of the samples that (n,) bool says, those of one task."""
    losses = Outcome(*(values[some] for values in vars(outcome).values())).by_picture(table.pictures[some])
    check_level(level, delta, len(losses), f" of {task}" if task else "")
    if delta is None:
        return conformal(monotone(losses), level)
    return learn_then_test(losses, level, delta)


def _promise(
    outcome: Outcome,
    table: Table,
    chosen: int,
    keeps: list[int | float],
    *,
    agreement: float,
    confidence: float | None,
    task: str | None,
) -> Promise:
    losses = outcome.by_picture(table.pictures)
    smooth = monotone(losses)
    names = [*(f"{keep:g}" for keep in keeps), "1"]
    taken, counts = np.unique(outcome.taken[:, chosen], return_counts=True)

    def bound(of: np.ndarray) -> float:
        if confidence is None:
            return float(crc_bound(monotone(of))[chosen])
        return ltt_bound(of[:, chosen], 1 - confidence)

    by_task = {}
    for name in np.unique(table.tasks).tolist():
        some = table.tasks == name
        own = Outcome(*(values[some] for values in vars(outcome).values())).by_picture(table.pictures[some])
        by_task[name] = {"samples": int(some.sum()), "risk": float(own[:, chosen].mean()), "bound": bound(own)}
    return Promise(
        agreement=agreement,
        confidence=confidence,
        theorem=CONFORMAL if confidence is None else TESTED,
        task=task or "",
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
