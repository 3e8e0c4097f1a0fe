"""Finds the cases in a folder, runs them, and prints a line for each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.golden import (
    cdpruner,
    dart,
    divprune,
    dycoke,
    fastv,
    flowcut,
    fopru,
    gammamod,
    holitom,
    holov,
    iared2,
    mue,
    mustdrop,
    pmod,
    prumerge,
    pyramiddrop,
    sparsevlm,
    spatten,
    tome,
    vflowopt,
    vidcom2,
    visionzip,
    vispruner,
    yopo,
)
from tests.golden.case import Case, Mismatch, UnknownCase

METHODS: dict[str, Callable[[Case], None]] = {
    "cdpruner": cdpruner.run,
    "dart": dart.run,
    "divprune": divprune.run,
    "dycoke": dycoke.run,
    "fastv": fastv.run,
    "flowcut": flowcut.run,
    "fopru": fopru.run,
    "gammamod": gammamod.run,
    "holitom": holitom.run,
    "holov": holov.run,
    "iared2": iared2.run,
    "mue": mue.run,
    "mustdrop": mustdrop.run,
    "pmod": pmod.run,
    "prumerge": prumerge.run,
    "pyramiddrop": pyramiddrop.run,
    "sparsevlm": sparsevlm.run,
    "spatten": spatten.run,
    "tome": tome.run,
    "vflowopt": vflowopt.run,
    "vidcom2": vidcom2.run,
    "visionzip": visionzip.run,
    "vispruner": vispruner.run,
    "yopo": yopo.run,
}


@dataclass(frozen=True)
class Outcome:
    """What became of one case: status is "ok", "FAIL" or "UNKNOWN"."""

    method: str
    case: str
    status: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.status:8}{self.method}/{self.case}" + (f": {self.reason}" if self.reason else "")


def run_folder(folder: str | Path) -> Iterator[Outcome]:
    """Outcomes of all cases of the method folders in `folder`, or of `folder` as one method's folder."""
    folder = Path(os.path.abspath(folder))
    if not folder.is_dir():
        yield Outcome(folder.name, "", "UNKNOWN", f"{folder} is not a folder")
        return
    methods = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if case_files(folder) or not methods:
        yield from run_method(folder)
    for method in methods:
        yield from run_method(method)


def run_method(folder: Path) -> Iterator[Outcome]:
    """Outcomes of all cases in the folder of one method, which is the folder's name."""
    files = case_files(folder)
    if not files:
        yield Outcome(folder.name, "", "UNKNOWN", "no cases in this folder")
    for path in files:
        yield run_case(folder.name, path)


def case_files(folder: Path) -> list[Path]:
    """Everything in a folder but hidden files and what describes it."""
    files = (path for path in folder.iterdir() if not path.is_dir())
    return sorted(path for path in files if not path.name.startswith((".", "README")))


def run_case(method: str, path: Path) -> Outcome:
    """The outcome of one file; any error in a method is a failure of that case."""
    if method not in METHODS:
        return Outcome(method, path.name, "UNKNOWN", f"no cases of {method!r} are known")
    try:
        METHODS[method](Case.load(path))
    except UnknownCase as error:
        return Outcome(method, path.name, "UNKNOWN", str(error))
    except Mismatch as error:
        return Outcome(method, path.name, "FAIL", str(error))
    except Exception as error:
        return Outcome(method, path.name, "FAIL", f"{type(error).__name__}: {error}")
    return Outcome(method, path.name, "ok")


def main(folder: str | Path) -> int:
    """Prints the outcomes and a count; 1 unless every case is ok."""
    counts = {"ok": 0, "FAIL": 0, "UNKNOWN": 0}
    for outcome in run_folder(folder):
        print(outcome, flush=True)
        counts[outcome.status] += 1
    print(f"{counts['ok']} ok, {counts['FAIL']} failed, {counts['UNKNOWN']} unknown")
    return 0 if counts["ok"] == sum(counts.values()) else 1
