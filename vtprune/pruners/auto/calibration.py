"""calibration.json: what `vtprune calibrate` measured on a model, and what can be promised by it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import FiniteFloat, TypeAdapter
from typing_extensions import TypedDict

from vtprune.errors import FileError, InputError
from vtprune.json_files import read_json
from vtprune.pruners.auto.ladder import Table, best_ladder
from vtprune.pruners.auto.promise import Settled, prove

CALIBRATION_NAME = "calibration.json"
FORMAT, VERSION = "vtprune-calibration", 1
WHAT = "a calibration as `vtprune calibrate` writes it"

Row = list[FiniteFloat | int]


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
    """A table as it is written down: numbers that were fp32 with the digits that tell them apart."""
    found = {name: values.tolist() for name, values in vars(table).items()}
    for name in ("probability", "margin", "losses"):
        found[name] = [[float(f"{value:.9g}") for value in row] for row in found[name]]
    for name in ("flops", "encoder", "kv"):
        found[name] = [[round(value) for value in row] for row in found[name]]
    return found  # type: ignore[return-value]


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

    Levels are chosen on the samples for that, and `prove` has the others. task: that of one task alone. Raises
    InputError for too few samples, and for a task that was not calibrated.
    """
    tuning, table = table_of(data["tuning"]), table_of(data["calibration"])
    if task is not None:
        known = sorted(set(table.tasks.tolist()))
        if task not in known:
            names = ", ".join(one for one in known if one) or "none"
            raise InputError(f"task: {task!r} was not calibrated; tasks are {names}")
        table = table.where(table.tasks == task)
        own = tuning.where(tuning.tasks == task)
        tuning = own if len(own) else tuning
    shared = data["shared"]
    ladder = best_ladder(tuning, 1 - agreement, shared=shared)[0] if adaptive else None
    return prove(
        table, data["keeps"], ladder, shared=shared, agreement=agreement, confidence=confidence, task=task or ""
    )


def settled_in(folder: Path, **options: Any) -> tuple[CalibrationFile, Settled]:
    """The calibration in a folder, which nobody may change, and what `settle` makes of it with these options; raises
    what `read_calibration` and `settle` raise. As long as the file stays as it is it is read once, and its ladders are
    compared once: wrapping a model again costs nothing."""
    path = folder / CALIBRATION_NAME
    found = path.stat() if path.is_file() else None
    return _settled(folder, None if found is None else (found.st_mtime_ns, found.st_size, found.st_ino), **options)


@functools.lru_cache(maxsize=8)
def _settled(folder: Path, _stamp: object, **options: Any) -> tuple[CalibrationFile, Settled]:
    data = read_calibration(folder)
    return data, settle(data, **options)
