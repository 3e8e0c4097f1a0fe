"""Where a number comes from: versions, the machine, and what identifies a model's files and this code."""

from __future__ import annotations

import json
import os
import platform
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__version__ = version("vtprune")

# Above this size a checkpoint file is known by its size and time, not by its content.
HASHED_WHOLE = 1 << 26
PACKAGES = ("vtprune", "torch", "torchvision", "transformers", "lmms-eval")
# Whose source decides what a model computes under a method; the folder in it that does not is not installed either.
SOURCES, PAGES = ("vtprune", "vtprune.adapters"), "docs"


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine(model: Any) -> dict[str, Any]:
    """Where the milliseconds were measured, and in which dtype."""
    # Not at the top: `vtprune --version` asks this module too.
    import torch

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
    if not Path(pretrained).is_dir():
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
    digest = sha256(json.dumps(versions()).encode())
    for package in SOURCES:
        spec = find_spec(package)
        assert spec is not None
        for folder in spec.submodule_search_locations or ():
            for path in sorted(Path(folder).rglob("*.py")):
                if path.relative_to(folder).parts[0] != PAGES:
                    digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]
