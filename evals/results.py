"""results.json: everything that a run found, written whole after every setting."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .failures import InputError, RunError, first_line
from .loading import is_local

FORMAT = 2
FILE = "results.json"
UNFINISHED = ".answers-"
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


def check_writable(folder: Path) -> None:
    """Creates the folder and a file in it; raises InputError where that does not work."""
    probe = folder / ".vtprune-probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise InputError(f"output: cannot write to {folder}: {error.strerror or error}") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces the file in one step; what was there stays when the disk is full. Raises RunError."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise RunError(f"cannot write {path}: {error.strerror or error}; what was there is kept") from error


class Results:
    """The content of results.json, kept on disk as it grows.

    config: what every number in the file depends on; settings: {key of a Setting: its record}; moved: where
    results of other code were put, if there were any. Raises InputError for results of another configuration.
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
        if resume and self.path.exists():
            old = self._load()
            if old["config"]["code"] == config["code"]:
                self.data = old
            else:
                self.moved = self._move_away(old)
        if not resume:
            for path in folder.glob(f"{UNFINISHED}*"):
                path.unlink()

    def _load(self) -> dict[str, Any]:
        again = "; give another --output, or --no-resume to start afresh"
        try:
            data: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
            old = {"code": "", **data["config"]}
            data["config"] = old
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"output: {self.path} is not a results file ({first_line(error)}){again}") from error
        if data.get("format") != FORMAT:
            raise InputError(f"output: {self.path} has another format than this version writes{again}")
        changed = [
            f"{WORDS.get(name, name)} was {old.get(name)!r} and is now {self.config.get(name)!r}"
            for name in sorted(old.keys() | self.config.keys())
            if name != "code" and old.get(name) != self.config.get(name)
        ]
        if changed:
            raise InputError(f"output: {self.path} holds another run ({'; '.join(changed)}){again}")
        return data

    def _move_away(self, old: dict[str, Any]) -> Path:
        """Keeps the results of other code under another name: they are not to be compared with new ones."""
        stamp = re.sub(r"[^0-9]", "", str(old.get("created", "")))[:14]
        target = self.path.with_name(f"results-{stamp}.json")
        try:
            self.path.rename(target)
        except OSError as error:
            raise InputError(f"output: cannot rename {self.path}: {error.strerror or error}") from error
        return target

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
        """Writes the file; raises RunError where that fails, and leaves the old one in place."""
        text = json.dumps(self.data, indent=1, ensure_ascii=False, default=str)
        write_atomically(self.path, text.encode())
