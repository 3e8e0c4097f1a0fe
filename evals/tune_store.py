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
from safetensors.torch import save
from torch import Tensor

from vtprune.config import CONFIG_NAME, from_dict, save_config

from .failures import InputError, first_line
from .results import WORDS, code_fingerprint, write_atomically

FORMAT = 1
FILE = "search.json"
PLOT = "search.png"
STATES = "unpruned.safetensors"
# What a trial may have come to: an objective, a budget or model that refuses the setting, or not a number.
MEASURED, INFEASIBLE, FAILED = "measured", "infeasible", "failed"
NAMES = {**WORDS, "data": "the samples"}

Trial = dict[str, Any]


def search_fingerprint() -> str:
    """Identifies the code that a trial depends on: vtprune's, the search's own, and the libraries."""
    from importlib.metadata import version

    digest = sha256(f"{code_fingerprint()} {version('optuna')} {version('scipy')}".encode())
    for path in sorted(Path(__file__).parent.glob("tune*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _whole(data: dict[str, Any]) -> bool:
    """Whether a file holds all that a search goes on from."""
    needed = {"number", "params", "state", "objective", "reason", "pruner"}
    trials = data["trials"]
    return {"best", "check"} <= data.keys() and all(needed <= trial.keys() for trial in trials)


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
            return
        old = self._load(lenient=restart)
        if restart or old["config"]["code"] != config["code"]:
            self.moved = self._move_away(str(old.get("created", "")))
        else:
            self.data = old

    def _load(self, *, lenient: bool) -> dict[str, Any]:
        """The old content; unless `lenient` it must be whole and of this configuration."""
        again = "; give another --output, or --restart to start afresh and keep the old one beside it"
        try:
            data: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
            old = data["config"] = {"code": "", **data["config"]}
            whole = data.get("format") == FORMAT and _whole(data)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if lenient:
                return {"config": {"code": ""}}
            raise InputError(
                f"output: {self.path} is not the file of a search ({first_line(error)}){again}"
            ) from error
        if lenient:
            return data
        if not whole:
            raise InputError(f"output: {self.path} is cut short, or not as this version writes it{again}")
        changed = [
            f"{NAMES.get(name, name)} was {old.get(name)!r} and is now {self.config.get(name)!r}"
            for name in sorted(old.keys() | self.config.keys())
            if name != "code" and old.get(name) != self.config.get(name)
        ]
        if changed:
            raise InputError(f"output: {self.path} holds another search ({'; '.join(changed)}){again}")
        return data

    def _move_away(self, created: str) -> Path:
        """Puts all that the old search left into a folder of its own, so that none of it poses as the new one's."""
        stem = "search-" + (re.sub(r"[^0-9]", "", created)[:14] or "old")
        target, count = self.folder / stem, 1
        while target.exists():
            count += 1
            target = self.folder / f"{stem}-{count}"
        try:
            target.mkdir()
            for name in (FILE, CONFIG_NAME, PLOT):
                if (self.folder / name).exists():
                    (self.folder / name).rename(target / name)
        except OSError as error:
            raise InputError(f"output: cannot move the old search in {self.folder}: {error.strerror}") from error
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
        write_atomically(self.path, json.dumps(self.data, indent=1, ensure_ascii=False, allow_nan=False).encode())

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
        write_atomically(self.folder / STATES, save(states, metadata={"identity": self._identity()}))
