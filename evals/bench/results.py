"""results.json: everything that the cells of a grid found, written whole after each of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vtprune.errors import BusyError, FileError, RunError
from vtprune.evals.bench.cells import FOLDER, METRICS, Cell, busy
from vtprune.evals.bench.records import RESULTS
from vtprune.evals.run_file import RunFile
from vtprune.evals.settings import Setting
from vtprune.files import held, refuse_foreign, set_aside, write_text

FORMAT = 2
FILE, TABLE, PLOT = "results.json", "table.md", "pareto.png"
WHAT = "a results file"
AGAIN = "; give another --output, or --no-resume to start afresh and keep the old one beside it"
# Seconds that a run waits for others that write into the folder: at its start, and with a record in its hands.
JOINING, MERGING = 30.0, 600.0


class Results:
    """The content of results.json, kept on disk as it grows; several runs of one configuration may fill it together.

    config: what every number in the file depends on; settings: {key of a Setting: its record}; order: the keys of this
    run's settings as its tables show them; moved: where earlier results were put, if there were some of other code, or
    a fresh start was asked for. Raises InputError for results of another configuration, for a file that holds none,
    and for tables that are not of a bench.
    """

    def __init__(self, folder: Path, config: dict[str, Any], *, resume: bool) -> None:
        self.folder, self.path, self.config = folder, folder / FILE, config
        self.order: list[str] = []
        self._file = RunFile(self.path, RESULTS, format=FORMAT, what=WHAT, again=AGAIN, check=_check_tasks)
        self.data = self._file.begun(config, questions=[], settings={})
        self._command = self.data["command"]
        self.moved: Path | None = None
        # Whether the file on the disk is this run's own; and how it looked when it was last read or written.
        self._joined, self._seen = False, (0, 0)
        with held(folder, JOINING):
            if not (folder / FOLDER).exists():
                refuse_foreign(folder, FILE, (TABLE, PLOT))
            if self.path.exists():
                old, stamp = self._file.read(config, afresh=not resume)
                if old is None:
                    self.moved = self._move_away(stamp)
                    # At once, so that a run that had read the old ones sees that they are no longer there.
                    self._save()
                else:
                    self.data, self._joined, self._seen = old, True, self._look()
            elif not resume and (folder / FOLDER).exists():
                self._move_cells("old")

    def _move_away(self, stamp: str) -> Path:
        """Keeps earlier results under another name: they are not to be compared with new ones."""
        self._move_cells(stamp)
        for name in (TABLE, PLOT):
            if self.path.with_name(name).exists():
                set_aside(self.path.with_name(name), stamp)
        return set_aside(self.path, stamp)

    def _move_cells(self, stamp: str) -> None:
        if busy(self.folder):
            raise BusyError(
                f"output: another run is writing into {self.folder}; wait until it has ended, or give another --output"
            )
        if (self.folder / FOLDER).exists():
            set_aside(self.folder / FOLDER, stamp)

    def cell(self, setting: Setting) -> Cell:
        """The folder of a setting."""
        return Cell.of(self.folder, self.config, setting)

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """The records so far."""
        settings: dict[str, dict[str, Any]] = self.data["settings"]
        return settings

    def set(self, key: str, record: dict[str, Any], questions: list[dict[str, Any]]) -> None:
        """Adds a record to what is in the file; raises RunError for one that was asked other questions than those."""
        with held(self.folder, MERGING):
            self._join()
            known = self.data["questions"]
            if known and [q["doc_id"] for q in known] != [q["doc_id"] for q in questions]:
                raise RunError("this setting was asked other questions than the ones before it")
            self.data["questions"] = known or questions
            self.settings[key] = record
            self._save()

    def recover(self, settings: Sequence[Setting], here: dict[str, Any]) -> int:
        """Takes in the cells that are whole while the file knows nothing of them: it was lost, or a run was killed
        between the two. Returns how many; those of another kind of machine than `here` are left as they are."""
        count = 0
        for setting in settings:
            if setting.key() in self.settings or not (self.cell(setting).folder / METRICS).exists():
                continue
            with self.cell(setting).claimed() as mine:
                found = self.cell(setting).read() if mine else None
                if found is not None and not other_machine(found.about.get("machine", {}), here):
                    self.set(setting.key(), found.record, [sample["question"] for sample in found.samples])
                    count += 1
        return count

    def join(self) -> None:
        """Takes in what other runs have added meanwhile; raises RunError where another run began the file afresh."""
        if self._look() != self._seen:
            with held(self.folder, MERGING):
                self._join()

    def _look(self) -> tuple[int, int]:
        """Changes whenever the file does."""
        try:
            status = self.path.stat()
        except OSError:
            return 0, 0
        return status.st_mtime_ns, status.st_ino

    def _join(self) -> None:
        if not self.path.exists() or self._look() == self._seen:
            return
        found, _ = self._file.read(self.config, afresh=False)
        if found is None or (self._joined and found.get("created") != self.data.get("created")):
            raise RunError(f"{self.path} is no longer of this run: another one has begun it afresh meanwhile")
        self.data["created"] = found.get("created", self.data["created"])
        self.data["questions"] = self.data["questions"] or found["questions"]
        self.data["settings"] = {**found["settings"], **self.settings}
        for name in ("left_out", "untrained"):
            self.data[name] = {**found.get(name, {}), **self.data.get(name, {})}
        self.data["commands"] = found.get("commands", [found.get("command", "")])
        self._joined, self._seen = True, self._look()

    def save(self) -> None:
        """Writes the file with what others have added; raises WriteError where that fails, and leaves the old one."""
        with held(self.folder, MERGING):
            self._join()
            self._save()

    def _save(self) -> None:
        place = {key: at for at, key in enumerate(self.order)}
        ordered = sorted(self.settings.items(), key=lambda item: place.get(item[0], len(place)))
        self.data["settings"] = dict(ordered)
        commands = [*self.data.get("commands", [self.data.get("command", "")]), self._command]
        self.data["commands"] = list(dict.fromkeys(commands))
        write_text(self.path, json.dumps(self.data, indent=1, ensure_ascii=False, default=str))
        self._joined, self._seen = True, self._look()


def other_machine(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What of two machines makes their numbers differ: dtype auto is not the same everywhere."""
    return [
        f"{name} was {there[name]} and is {here[name]} here"
        for name in ("dtype", "device", "gpu")
        if name in there and str(there[name]).partition(":")[0] != str(here.get(name)).partition(":")[0]
    ]


def _check_tasks(path: Path, data: dict[str, Any]) -> None:
    """Raises FileError where the settings of a file were not scored on the same tasks."""
    records = list(data["settings"].values())
    tasks = [{score["task"] for score in record["scores"] if score["name"] == score["task"]} for record in records]
    odd = [record["label"] for record, own in zip(records, tasks, strict=True) if not own or own != tasks[0]]
    if odd:
        raise FileError(f"{path} is not {WHAT}: {odd[0]} has scores of other tasks than the first setting{AGAIN}")
