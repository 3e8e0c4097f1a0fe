"""Checkpoints of a running training: weights and optimiser moments as safetensors, the rest as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import FiniteFloat, TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typing_extensions import TypedDict

from vtprune.errors import FileError, VTPruneError
from vtprune.files import write_json, write_with
from vtprune.json_files import read_json

MOMENTS = ("exp_avg", "exp_avg_sq")
FILE, WHAT = "progress.json", "a whole checkpoint of this training"
AGAIN = "; remove its folder to start afresh"


class State(TypedDict):
    """progress.json: `Progress`, the steps of the optimiser, and what the run was asked for."""

    stage: int
    step: int
    seconds: FiniteFloat
    optimizer_steps: int
    settings: dict[str, Any]


STATE = TypeAdapter(State)


@dataclass
class Progress:
    """How far a training has come: the stage being trained, its steps done, and seconds spent so far."""

    stage: int = 0
    step: int = 0
    seconds: float = 0.0


def _weights(modules: nn.ModuleDict) -> dict[str, Tensor]:
    """All parameters once: tied ones appear under their first name only."""
    return {name: parameter.detach().contiguous() for name, parameter in modules.named_parameters()}


def _tensors(path: Path) -> dict[str, Tensor]:
    """Raises FileError for a file that is missing or cut short."""
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise FileError(f"{path} is not {WHAT}: {error}{AGAIN}") from error
    return tensors


def _state(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(STATE, folder / FILE, WHAT, AGAIN)
    return found


def save_state(
    folder: Path,
    modules: nn.ModuleDict,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    settings: dict[str, Any],
) -> None:
    """Write a checkpoint into a folder; settings: what a run must share with the one that it goes on from."""
    moments, steps = {}, 0
    for name, parameter in modules.named_parameters():
        entry = optimizer.state.get(parameter)
        if entry:
            steps = int(entry["step"])
            moments.update({f"{name}:{key}": entry[key].contiguous() for key in MOMENTS})
    write_with(folder / "weights.safetensors", lambda part: save_file(_weights(modules), part))
    write_with(folder / "optimizer.safetensors", lambda part: save_file(moments, part))
    write_json(folder / FILE, {**asdict(progress), "optimizer_steps": steps, "settings": settings})


def load_weights(folder: Path, modules: nn.ModuleDict, settings: dict[str, Any]) -> Progress | None:
    """Load a checkpoint's weights if there is one, and say how far it had come.

    Raises VTPruneError for that of a run with other settings, and for one that is cut short.
    """
    if not (folder / FILE).exists():
        return None
    values = _state(folder)
    old = values["settings"]
    changed = [
        f"{name} was {old.get(name)!r} and is now {new!r}" for name, new in settings.items() if old.get(name) != new
    ]
    if changed:
        raise VTPruneError(f"output: {folder} holds another run ({'; '.join(changed)}); give another --output")
    saved = _tensors(folder / "weights.safetensors")
    own = dict(modules.named_parameters())
    odd = [name for name, one in own.items() if name not in saved or saved[name].shape != one.shape]
    if odd:
        raise FileError(f"{folder / 'weights.safetensors'} does not fit this model: {odd[0]}{AGAIN}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(saved[name])
    return Progress(values["stage"], values["step"], values["seconds"])


def load_moments(folder: Path, modules: nn.ModuleDict, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's AdamW moments back for the parameters that the optimiser holds."""
    saved = _tensors(folder / "optimizer.safetensors")
    steps = _state(folder)["optimizer_steps"]
    for name, parameter in modules.named_parameters():
        if parameter.requires_grad and f"{name}:{MOMENTS[0]}" in saved:
            entry = {key: saved[f"{name}:{key}"].to(parameter.device) for key in MOMENTS}
            optimizer.state[parameter] = {"step": torch.tensor(float(steps)), **entry}
