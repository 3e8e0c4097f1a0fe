"""Checkpoints of a running training: weights and optimiser moments as safetensors, the rest as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import FiniteFloat, TypeAdapter
from torch import Tensor, nn
from typing_extensions import TypedDict

from vtprune.errors import FileError
from vtprune.files import read_tensors, refuse_changed, write_json, write_tensors
from vtprune.json_files import read_json

MOMENTS = ("exp_avg", "exp_avg_sq")
FILE, WEIGHTS, MOMENTS_FILE = "progress.json", "weights.safetensors", "optimizer.safetensors"
WHAT = "a whole checkpoint of this training"
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
    write_tensors(folder / WEIGHTS, _weights(modules))
    write_tensors(folder / MOMENTS_FILE, moments)
    write_json(folder / FILE, {**asdict(progress), "optimizer_steps": steps, "settings": settings})


def load_weights(folder: Path, modules: nn.ModuleDict, settings: dict[str, Any]) -> Progress | None:
    """Load a checkpoint's weights if there is one, and say how far it had come.

    Raises VTPruneError for that of a run with other settings, and for one that is cut short.
    """
    if not (folder / FILE).exists():
        return None
    values = _state(folder)
    refuse_changed(f"output: {folder}", values["settings"], settings)
    saved, _ = read_tensors(folder / WEIGHTS, WHAT, AGAIN)
    own = dict(modules.named_parameters())
    odd = [name for name, one in own.items() if name not in saved or saved[name].shape != one.shape]
    if odd:
        raise FileError(f"{folder / WEIGHTS} does not fit this model: {odd[0]}{AGAIN}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(saved[name])
    return Progress(values["stage"], values["step"], values["seconds"])


def load_moments(folder: Path, modules: nn.ModuleDict, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's AdamW moments back for the parameters that the optimiser holds."""
    saved, _ = read_tensors(folder / MOMENTS_FILE, WHAT, AGAIN)
    steps = _state(folder)["optimizer_steps"]
    for name, parameter in modules.named_parameters():
        if parameter.requires_grad and f"{name}:{MOMENTS[0]}" in saved:
            entry = {key: saved[f"{name}:{key}"].to(parameter.device) for key in MOMENTS}
            optimizer.state[parameter] = {"step": torch.tensor(float(steps)), **entry}
