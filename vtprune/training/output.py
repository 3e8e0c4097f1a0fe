"""What a finished run leaves: the method, what was trained of the base, training.json and the plots."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import FiniteFloat, TypeAdapter
from torch import Tensor
from typing_extensions import TypedDict

from vtprune.adapters import core_model
from vtprune.files import write_bytes, write_folder, write_text
from vtprune.hooks.weights import SUBMODULE
from vtprune.json_files import read_json
from vtprune.provenance import machine, versions
from vtprune.training.config import TrainConfig
from vtprune.training.plots import loss_png, routed_png
from vtprune.training.state import FOLDER, Point, Progress
from vtprune.wrap import is_wrapped, report, save

LOG, LOSS_PLOT, ROUTED_PLOT, ADAPTER = "training.json", "loss.png", "routed.png", "adapter"
LEARNT, FINISHED = "training", "finished"
AGAIN = "; give another --output"


class LogFile(TypedDict):
    """training.json, so far as a later run reads it."""

    state: Literal["training", "finished"]
    settings: dict[str, Any]
    steps: int
    samples: int
    answer_tokens: int
    seconds: FiniteFloat
    curve: list[Point]


LOG_FILE = TypeAdapter(LogFile)


def write_log(
    folder: Path, settings: dict[str, Any], progress: Progress, model: Any, *, shares: list[float] | None = None
) -> None:
    """Writes training.json: settings, versions, machine, curves; `shares`: what each decoder layer computes, once the
    run has ended."""
    data = {
        "format": 1,
        "state": LEARNT if shares is None else FINISHED,
        "settings": settings,
        "command": " ".join(sys.argv),
        "versions": versions(),
        "machine": machine(model),
        "steps": progress.step,
        "samples": progress.samples,
        "answer_tokens": progress.tokens,
        "seconds": round(progress.seconds, 1),
        "curve": progress.curve,
        "validation": progress.validation,
        "computed": shares or [],
    }
    write_text(folder / LOG, json.dumps(data, indent=1, allow_nan=False))


def read_log(folder: Path) -> dict[str, Any] | None:
    """The content of training.json, or None where there is none; raises FileError for one that is none."""
    path = folder / LOG
    if not path.exists():
        return None
    data: dict[str, Any] = read_json(LOG_FILE, path, "the log of a training run (cut short?)", AGAIN)
    return data


def write_outputs(
    model: Any,
    processor: Any,
    config: TrainConfig,
    *,
    base_dtype: torch.dtype,
    progress: Progress,
    shares: list[float],
) -> None:
    """Writes what was trained, so that the base loads as any model does and `vtprune.wrap(model, folder)` follows.

    base_dtype: in which the base's weights are written. Raises WriteError where there is no room; the checkpoint is
    then still there.
    """
    folder = config.output
    if config.train == "lora":
        write_folder(folder / ADAPTER, lambda draft: model.save_pretrained(draft))
    elif config.train != "routers":
        core: Any = core_model(model)
        weights = base_weights(core, base_dtype)
        write_folder(folder, lambda draft: _save_base(core, processor, weights, draft))
    if is_wrapped(model):
        save(model, folder)
    write_bytes(folder / LOSS_PLOT, loss_png(progress))
    if shares:
        write_bytes(folder / ROUTED_PLOT, routed_png(shares))


def drop_checkpoint(folder: Path) -> None:
    """Removes the checkpoint of a run that has ended."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)


def base_weights(core: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """The base model's own state dict, without what methods brought."""
    return {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in core.state_dict().items()
        if not name.startswith(f"{SUBMODULE}.")
    }


def computed_shares(model: Any) -> list[float]:
    """Which share of the vision tokens of the last forward each decoder layer computed."""
    if not is_wrapped(model):
        return []
    found = report(model)
    tokens = sum(image.tokens for sample in found.samples for image in sample.images)
    return [sum(row) / tokens for row in found.tokens_per_layer] if tokens else []


def _save_base(core: Any, processor: Any, weights: dict[str, Tensor], draft: Path) -> None:
    core.save_pretrained(draft, state_dict=weights)
    processor.save_pretrained(draft)
