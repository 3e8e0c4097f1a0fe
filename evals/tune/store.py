"""The folder of a search: search.json, written whole after every trial, the best setting, the unpruned states."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NotRequired

from pydantic import FiniteFloat, TypeAdapter
from torch import Tensor
from typing_extensions import TypedDict

from vtprune.errors import FileError, VTPruneError
from vtprune.evals.run_file import WORDS, Head, RunFile
from vtprune.files import (
    move_into,
    read_tensors,
    refuse_foreign,
    write_tensors,
    write_text,
)
from vtprune.method.config import CONFIG_NAME, from_dict, save_config
from vtprune.method.texts import parse_method
from vtprune.provenance import code_fingerprint

FORMAT = 1
FILE = "search.json"
PLOT = "search.png"
STATES = "unpruned.safetensors"
# What a trial may have come to: an objective, a budget or model that refuses the setting, or not a number.
MEASURED, INFEASIBLE, FAILED = "measured", "infeasible", "failed"
NAMES = {**WORDS, "data": "the samples"}

WHAT = "the file of a search"
AGAIN = "; give another --output, or --restart to start afresh and keep the old one beside it"

Trial = dict[str, Any]


class TrialRecord(TypedDict):
    """A trial of search.json."""

    number: int
    params: dict[str, Any]
    state: Literal["measured", "infeasible", "failed"]
    objective: FiniteFloat | None
    reason: str | None
    pruner: dict[str, Any]
    kept: NotRequired[FiniteFloat]
    tokens: NotRequired[FiniteFloat]
    flops_share: NotRequired[FiniteFloat]
    least_flops: NotRequired[FiniteFloat | None]


class Held(TypedDict):
    """A setting on the held-out samples."""

    objective: FiniteFloat | None


class Check(TypedDict):
    """What the held-out samples said."""

    trial: int
    samples: int
    defaults: Held | None
    found: Held | None
    gain: NotRequired[FiniteFloat]
    gain_stderr: NotRequired[FiniteFloat | None]


class SearchFile(Head):
    """search.json."""

    trials: list[TrialRecord]
    best: int | None
    check: Check | None


SEARCH = TypeAdapter(SearchFile)


def search_fingerprint() -> str:
    """Identifies the code that a trial depends on: vtprune's, the search's own, and the libraries."""
    from importlib.metadata import version

    digest = sha256(f"{code_fingerprint()} {version('optuna')} {version('scipy')}".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _check_trials(path: Path, data: dict[str, Any]) -> None:
    """Raises FileError where trials are not such as a search goes on from, though their JSON is of the right shape."""
    trials = data["trials"]
    for place, trial in enumerate(trials):
        measured = {"objective", "kept", "tokens", "flops_share"}
        if trial["number"] != place:
            raise FileError(f"{path} is cut short: trials.{place}.number is {trial['number']}{AGAIN}")
        if trial["state"] == MEASURED and any(trial.get(name) is None for name in measured):
            raise FileError(f"{path} is not {WHAT}: trials.{place} is measured but lacks a number{AGAIN}")
        try:
            pruner = from_dict(trial["pruner"])
        except VTPruneError as error:
            raise FileError(f"{path} is not {WHAT}: trials.{place}.pruner: {error}{AGAIN}") from error
        if isinstance(pruner, list) or pruner.name != parse_method(str(data["config"].get("method")))[0]:
            raise FileError(f"{path} is not {WHAT}: trials.{place}.pruner is another method{AGAIN}")
    if data["best"] is not None and not 0 <= data["best"] < len(trials):
        raise FileError(f"{path} is cut short: best is trial {data['best']} of {len(trials)}{AGAIN}")


class Search:
    """The content of search.json, kept on disk as it grows.

    config: what every trial depends on; moved: where an earlier search was put, if there was one of other
    code, or `restart` asked for it. Raises InputError for a search of another configuration.
    """

    def __init__(self, folder: Path, config: dict[str, Any], *, restart: bool) -> None:
        self.folder, self.path, self.config = folder, folder / FILE, config
        file = RunFile(
            self.path, SEARCH, format=FORMAT, what=WHAT, again=AGAIN, check=_check_trials, run="search", words=NAMES
        )
        self.data = file.begun(config, trials=[], best=None, check=None)
        self.moved: Path | None = None
        if not self.path.exists():
            refuse_foreign(folder, FILE, (CONFIG_NAME, PLOT, *self._foreign_states()))
            return
        old, stamp = file.read(config, afresh=restart)
        if old is None:
            # All that the old search left, so that none of it poses as the new one's.
            left = [folder / name for name in (FILE, CONFIG_NAME, PLOT)]
            self.moved = move_into(folder / f"search-{stamp}", left)
        else:
            self.data = old

    def _foreign_states(self) -> tuple[str, ...]:
        """The file of the unpruned states, where there is one that no search has written."""
        path = self.folder / STATES
        if not path.exists():
            return ()
        try:
            return () if "identity" in read_tensors(path, "the unpruned states")[1] else (STATES,)
        except FileError:
            return (STATES,)

    @property
    def trials(self) -> list[Trial]:
        """The trials so far; the first one is the method's defaults."""
        trials: list[Trial] = self.data["trials"]
        return trials

    @property
    def best(self) -> Trial | None:
        """The trial with the highest objective (the first of equals), or None if none has one."""
        measured = [trial for trial in self.trials if trial["state"] == MEASURED]
        return max(measured, key=lambda trial: trial["objective"], default=None)

    def add(self, trial: Trial) -> None:
        """Appends a trial and writes the file."""
        self.trials.append(trial)
        best = self.best
        self.data["best"] = None if best is None else best["number"]
        self.save()

    def save_best(self) -> None:
        """Writes the best setting's vtprune_config.json, also where a run was ended before it could."""
        if self.best is not None:
            save_config(from_dict(self.best["pruner"]), self.folder)

    def save(self) -> None:
        """Writes the file; raises RunError where that fails, and leaves the old one in place."""
        write_text(self.path, json.dumps(self.data, indent=1, ensure_ascii=False, allow_nan=False))

    def _identity(self) -> str:
        return sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()

    def load_states(self) -> dict[str, Tensor] | None:
        """The unpruned states by set, or None where they are not of this configuration, or not whole."""
        try:
            states, metadata = read_tensors(self.folder / STATES, "the unpruned states")
        except FileError:
            return None
        return states if metadata.get("identity") == self._identity() else None

    def save_states(self, states: dict[str, Tensor]) -> None:
        """Writes them for a later run; raises RunError."""
        write_tensors(self.folder / STATES, states, {"identity": self._identity()})
