"""results.json: everything that a run found, written whole after every setting."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from vtprune.errors import FileError
from vtprune.evals.bench.failures import InputError
from vtprune.evals.bench.records import RESULTS, RESULTS_HEAD
from vtprune.files import refuse_foreign, set_aside, write_text
from vtprune.json_files import read_json
from vtprune.loading.model import is_local

FORMAT = 2
FILE, TABLE, PLOT = "results.json", "table.md", "pareto.png"
UNFINISHED = ".answers-"
WHAT = "a results file"
AGAIN = "; give another --output, or --no-resume to start afresh and keep the old one beside it"
# Above this size a checkpoint file is known by its size and time, not by its content.
HASHED_WHOLE = 1 << 26
# How a message names the parts of `config` that are fingerprints.
WORDS = {"data": "the bundled data", "model_files": "the checkpoint"}
PACKAGES = ("vtprune", "torch", "torchvision", "transformers", "lmms-eval")


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine(model: Any) -> dict[str, Any]:
    """Where the milliseconds were measured, and in which dtype."""
    device: torch.device = model.device
    facts: dict[str, Any] = {
        "platform": platform.platform(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def _processor() -> str:
    """The CPU's own name where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def model_fingerprint(pretrained: str) -> str:
    """Identifies a checkpoint folder by its files (large ones by size and time); "" for a model id."""
    if not is_local(pretrained):
        return ""
    digest = sha256()
    for path in sorted(path for path in Path(pretrained).rglob("*") if path.is_file()):
        status = path.stat()
        large = status.st_size > HASHED_WHOLE
        digest.update(path.name.encode())
        digest.update(f"{status.st_size} {status.st_mtime_ns}".encode() if large else path.read_bytes())
    return digest.hexdigest()[:16]


def code_fingerprint() -> str:
    """Identifies vtprune's source and the libraries' versions: after a change old numbers do not count."""
    import vtprune
    from vtprune import adapters

    digest = sha256(json.dumps(versions()).encode())
    for package in (vtprune, adapters):
        for folder in package.__path__:
            for path in sorted(Path(folder).rglob("*.py")):
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


class Results:
    """The content of results.json, kept on disk as it grows.

    config: what every number in the file depends on; settings: {key of a Setting: its record}; moved: where
    earlier results were put, if there were some of other code, or a fresh start was asked for. Raises InputError for
    results of another configuration, for a file that holds none, and for tables that are not of a bench.
    """

    def __init__(self, folder: Path, config: dict[str, Any], *, resume: bool) -> None:
        self.path = folder / FILE
        self.config = config
        self.data: dict[str, Any] = {
            "format": FORMAT,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "config": config,
            "command": " ".join(sys.argv),
            "questions": [],
            "settings": {},
        }
        self.moved: Path | None = None
        refuse_foreign(folder, FILE, (TABLE, PLOT))
        if not resume:
            self._start_afresh()
        elif self.path.exists():
            old = self._load()
            if old["config"]["code"] == config["code"]:
                self.data = old
            else:
                self.moved = self._move_away(_stamp(old))

    def _load(self) -> dict[str, Any]:
        """The old content, of this configuration; it is known to be whole where it is of this code, too."""
        try:
            head: dict[str, Any] = read_json(RESULTS_HEAD, self.path, WHAT, AGAIN)
            if head["format"] != FORMAT:
                raise FileError(f"{self.path} has another format than this version writes{AGAIN}")
            old = head["config"] = {"code": "", **head["config"]}
            changed = [
                f"{WORDS.get(name, name)} was {old.get(name)!r} and is now {self.config.get(name)!r}"
                for name in sorted(old.keys() | self.config.keys())
                if name != "code" and old.get(name) != self.config.get(name)
            ]
            if changed:
                raise FileError(f"{self.path} holds another run ({'; '.join(changed)}){AGAIN}")
            if old["code"] != self.config["code"]:
                return head
            data: dict[str, Any] = read_json(RESULTS, self.path, WHAT, AGAIN)
            _check_tasks(self.path, list(data["settings"].values()))
        except FileError as error:
            raise InputError(f"output: {error}") from error
        return data

    def _start_afresh(self) -> None:
        """Keeps earlier results and answers under other names, whatever state they are in."""
        if self.path.exists():
            try:
                old: dict[str, Any] = read_json(RESULTS_HEAD, self.path, WHAT)
            except FileError:
                old = {}
            self.moved = self._move_away(_stamp(old))
        for path in self.path.parent.glob(f"{UNFINISHED}*"):
            set_aside(path, "old")

    def _move_away(self, stamp: str) -> Path:
        """Keeps earlier results under another name: they are not to be compared with new ones."""
        for name in (TABLE, PLOT):
            if self.path.with_name(name).exists():
                set_aside(self.path.with_name(name), stamp)
        return set_aside(self.path, stamp)

    def unfinished(self, key: str) -> Path:
        """Where the answers of a setting are noted until its record is written."""
        run = sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()[:8]
        return self.path.with_name(f"{UNFINISHED}{run}-{key}.jsonl")

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """The records so far."""
        settings: dict[str, dict[str, Any]] = self.data["settings"]
        return settings

    def set(self, key: str, record: dict[str, Any]) -> None:
        """Adds a record and writes the file."""
        self.settings[key] = record
        self.save()

    def save(self) -> None:
        """Writes the file; raises WriteError where that fails, and leaves the old one in place."""
        write_text(self.path, json.dumps(self.data, indent=1, ensure_ascii=False, default=str))


def _stamp(old: dict[str, Any]) -> str:
    """When results were begun, as digits."""
    return re.sub(r"[^0-9]", "", str(old.get("created", "")))[:14] or "old"


def _check_tasks(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Raises FileError where the settings of a file were not scored on the same tasks."""
    tasks = [{score["task"] for score in record["scores"] if score["name"] == score["task"]} for record in records]
    odd = [record["label"] for record, own in zip(records, tasks, strict=True) if not own or own != tasks[0]]
    if odd:
        raise FileError(f"{path} is not {WHAT}: {odd[0]} has scores of other tasks than the first setting{AGAIN}")
