"""The folder of a search: search.json, written whole after every trial, the best setting, the unpruned states."""

from __future__ import annotations

import json
import re
import sys
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vtprune.errors import FileError, VTPruneError
from vtprune.evals.bench.failures import InputError
from vtprune.evals.bench.records import SEARCH, SEARCH_HEAD
from vtprune.evals.bench.results import WORDS, code_fingerprint
from vtprune.files import (
    move_into,
    refuse_foreign,
    write_text,
    write_with,
)
from vtprune.json_files import read_json
from vtprune.method.config import CONFIG_NAME, from_dict, save_config
from vtprune.method.texts import parse_method

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
        self.data: dict[str, Any] = {
            "format": FORMAT,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "config": config,
            "command": " ".join(sys.argv),
            "trials": [],
            "best": None,
            "check": None,
        }
        self.moved: Path | None = None
        if not self.path.exists():
            refuse_foreign(folder, FILE, (CONFIG_NAME, PLOT, *self._foreign_states()))
            return
        old = self._load(lenient=restart)
        if restart or old["config"]["code"] != config["code"]:
            self.moved = self._move_away(str(old.get("created", "")))
        else:
            self.data = old

    def _load(self, *, lenient: bool) -> dict[str, Any]:
        """The old content; unless `lenient` it must be whole and of this configuration."""
        try:
            head: dict[str, Any] = read_json(SEARCH_HEAD, self.path, WHAT, AGAIN)
        except FileError as error:
            if lenient:
                return {"config": {"code": ""}}
            raise InputError(f"output: {error}") from error
        old = head["config"] = {"code": "", **head["config"]}
        if lenient:
            return head
        try:
            if head["format"] != FORMAT:
                raise FileError(f"{self.path} is not as this version writes it{AGAIN}")
            changed = [
                f"{NAMES.get(name, name)} was {old.get(name)!r} and is now {self.config.get(name)!r}"
                for name in sorted(old.keys() | self.config.keys())
                if name != "code" and old.get(name) != self.config.get(name)
            ]
            if changed:
                raise FileError(f"{self.path} holds another search ({'; '.join(changed)}){AGAIN}")
            if old["code"] != self.config["code"]:
                return head
            data: dict[str, Any] = read_json(SEARCH, self.path, WHAT, AGAIN)
            _check_trials(self.path, data)
        except FileError as error:
            raise InputError(f"output: {error}") from error
        return data

    def _foreign_states(self) -> tuple[str, ...]:
        """The file of the unpruned states, where there is one that no search has written."""
        path = self.folder / STATES
        if not path.exists():
            return ()
        try:
            with safe_open(path, "pt") as file:
                return () if "identity" in (file.metadata() or {}) else (STATES,)
        except (OSError, SafetensorError):
            return (STATES,)

    def _move_away(self, created: str) -> Path:
        """Puts all that the old search left into a folder of its own, so that none of it poses as the new one's."""
        stem = "search-" + (re.sub(r"[^0-9]", "", created)[:14] or "old")
        target, count = self.folder / stem, 1
        while target.exists():
            count += 1
            target = self.folder / f"{stem}-{count}"
        move_into(target, [self.folder / name for name in (FILE, CONFIG_NAME, PLOT)])
        return target

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
            with safe_open(self.folder / STATES, "pt") as file:
                if (file.metadata() or {}).get("identity") != self._identity():
                    return None
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return None

    def save_states(self, states: dict[str, Tensor]) -> None:
        """Writes them for a later run; raises RunError."""
        metadata = {"identity": self._identity()}
        write_with(self.folder / STATES, lambda part: save_file(states, part, metadata=metadata))
