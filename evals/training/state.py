"""Checkpoints of a running training: weights and optimiser moments as safetensors, the rest as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Progress:
    """How far a training has come: the stage being trained, its steps done, and seconds spent so far."""

    stage: int = 0
    step: int = 0
    seconds: float = 0.0


def _weights(modules: nn.ModuleDict) -> dict[str, Tensor]:
    """All parameters once: tied ones appear under their first name only."""
    return {name: parameter.detach().contiguous() for name, parameter in modules.named_parameters()}


def _replace(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write beside and rename, so that an interruption leaves the old file whole."""
    draft = path.with_suffix(".draft")
    save_file(tensors, draft)
    draft.replace(path)


def save_state(folder: Path, modules: nn.ModuleDict, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """Write a checkpoint into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    moments, steps = {}, 0
    for name, parameter in modules.named_parameters():
        entry = optimizer.state.get(parameter)
        if entry:
            steps = int(entry["step"])
            moments.update({f"{name}:{key}": entry[key].contiguous() for key in MOMENTS})
    _replace(folder / "weights.safetensors", _weights(modules))
    _replace(folder / "optimizer.safetensors", moments)
    (folder / "progress.json").write_text(json.dumps({**asdict(progress), "optimizer_steps": steps}))


def load_weights(folder: Path, modules: nn.ModuleDict) -> Progress | None:
    """Load a checkpoint's weights if there is one, and say how far it had come."""
    if not (folder / "progress.json").exists():
        return None
    saved = load_file(folder / "weights.safetensors")
    with torch.no_grad():
        for name, parameter in modules.named_parameters():
            parameter.copy_(saved[name])
    values = json.loads((folder / "progress.json").read_text())
    return Progress(values["stage"], values["step"], values["seconds"])


def load_moments(folder: Path, modules: nn.ModuleDict, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's AdamW moments back for the parameters that the optimiser holds."""
    saved = load_file(folder / "optimizer.safetensors")
    steps = json.loads((folder / "progress.json").read_text())["optimizer_steps"]
    for name, parameter in modules.named_parameters():
        if parameter.requires_grad and f"{name}:{MOMENTS[0]}" in saved:
            entry = {key: saved[f"{name}:{key}"].to(parameter.device) for key in MOMENTS}
            optimizer.state[parameter] = {"step": torch.tensor(float(steps)), **entry}
