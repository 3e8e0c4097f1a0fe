"""Checkpoints of a running training: one safetensors file, written whole or not at all, from which a run goes on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, FiniteFloat, TypeAdapter
from torch import Tensor, nn
from typing_extensions import TypedDict

from vtprune.errors import FileError, VTPruneError
from vtprune.files import read_tensors, write_tensors
from vtprune.json_files import parse
from vtprune.training.parameters import brought, trained

FOLDER, FILE = "checkpoint", "state.safetensors"
FORMAT, VERSION = "vtprune-training", "1"
MOMENTS = ("exp_avg", "exp_avg_sq")
WEIGHT, RANDOM = "weight:", "random:"
WHAT, AGAIN = "a whole checkpoint (cut short?)", "; delete it to start afresh"


class Point(TypedDict):
    """A point of the curve."""

    step: int
    loss: FiniteFloat
    auxiliary: FiniteFloat
    rate: FiniteFloat


class Validation(TypedDict):
    """A validation."""

    step: int
    loss: FiniteFloat


class Made(TypedDict):
    """`Progress` as a checkpoint has it."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]

    step: int
    samples: int
    tokens: int
    seconds: FiniteFloat
    curve: list[Point]
    validation: list[Validation]


class Rest(TypedDict):
    """What a checkpoint holds beside its tensors."""

    progress: Made
    settings: dict[str, Any]
    optimizer_steps: dict[str, FiniteFloat]


REST = TypeAdapter(Rest)


@dataclass
class Progress:
    """How far a run has come: steps done, samples seen, answer tokens learnt from, seconds spent, the curve so far.

    curve: {"step", "loss", "auxiliary", "rate"} a log line; validation: {"step", "loss"}.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)


def random_state(device: torch.device) -> Tensor:
    """(n,) uint8: torch's generator, and that of the GPU where one is used, as one row."""
    state = torch.get_rng_state()
    return torch.cat([state, torch.cuda.get_rng_state(device)]) if device.type == "cuda" else state


def restore_random_state(state: Tensor, device: torch.device) -> None:
    """Puts it back."""
    length = torch.get_rng_state().numel()
    torch.set_rng_state(state[:length].clone())
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[length:].clone(), device)


def save_state(
    folder: Path,
    model: Any,
    optimizer: torch.optim.Optimizer,
    *,
    progress: Progress,
    settings: dict[str, Any],
    random: Tensor,
) -> None:
    """Replaces the checkpoint of `folder`: weights, moments, random states (processes, n), and the rest as JSON.

    Raises WriteError where it cannot be written; the one before is then still whole.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in _weights(model).items():
        tensors[WEIGHT + name] = tensor.detach().contiguous().cpu()
    steps: dict[str, float] = {}
    for name, weight in trained(model).items():
        entry = optimizer.state.get(weight)
        if entry:
            steps[name] = float(entry["step"])
            tensors.update({f"{key}:{name}": entry[key].contiguous().cpu() for key in MOMENTS})
    tensors.update({f"{RANDOM}{process}": row.contiguous().cpu() for process, row in enumerate(random)})
    rest = {"progress": asdict(progress), "settings": settings, "optimizer_steps": steps}
    metadata = {"format": FORMAT, "version": VERSION, "state": json.dumps(rest, allow_nan=False)}
    write_tensors(folder / FOLDER / FILE, tensors, metadata)


def read_settings(folder: Path) -> dict[str, Any] | None:
    """The settings of the run that a checkpoint belongs to, or None where there is no checkpoint."""
    if not (folder / FOLDER / FILE).exists():
        return None
    settings: dict[str, Any] = _open(folder)[1]["settings"]
    return settings


def load_state(
    folder: Path, model: Any, optimizer: torch.optim.Optimizer, *, device: torch.device, process: int
) -> Progress:
    """Puts a checkpoint's weights, moments and random state back; raises VTPruneError where it does not fit."""
    tensors, rest = _open(folder)
    weights, steps = _weights(model), rest["optimizer_steps"]
    needed = {WEIGHT + name: weight.shape for name, weight in weights.items()}
    if not steps.keys() <= trained(model).keys():
        raise FileError(f"{folder / FOLDER / FILE} does not fit this model and method; give another --output")
    needed |= {f"{key}:{name}": trained(model)[name].shape for name in steps for key in MOMENTS}
    needed[f"{RANDOM}{process}"] = random_state(device).shape
    if any(name not in tensors or tensors[name].shape != shape for name, shape in needed.items()):
        raise VTPruneError(f"{folder / FOLDER / FILE} does not fit this model and method; give another --output")
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(tensors[WEIGHT + name])
    for name, weight in trained(model).items():
        if name in steps:
            moments = {key: tensors[f"{key}:{name}"].to(weight) for key in MOMENTS}
            optimizer.state[weight] = {"step": torch.tensor(steps[name]), **moments}
    restore_random_state(tensors[f"{RANDOM}{process}"], device)
    return Progress(**rest["progress"])


def _weights(model: Any) -> dict[str, Tensor]:
    """What a run changes: trained weights, and the buffers of the method's modules."""
    found: dict[str, Tensor] = dict(trained(model))
    module: nn.Module | None = brought(model)
    if module is not None:
        kept = module.state_dict()
        found |= {f"buffer.{name}": buffer for name, buffer in module.named_buffers() if name in kept}
    return found


def _open(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    path = folder / FOLDER / FILE
    tensors, metadata = read_tensors(path, WHAT, AGAIN)
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        raise VTPruneError(f"{path} is not a checkpoint that this version of vtprune reads")
    rest: dict[str, Any] = parse(REST, metadata.get("state", ""), path, WHAT, hint=AGAIN)
    return tensors, rest
