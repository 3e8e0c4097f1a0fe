"""Where a model's weights lie: on one device, or spread over several, some perhaps in memory or on a disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from vtprune.errors import InputError

# What transformers works out by itself; beside these there are devices and maps of modules.
SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")
# Places of a map that hold weights and compute nothing.
WAITING = ("cpu", "disk")


def check_device(device: str, what: str = "device") -> str:
    """The same text; raises InputError, under the name of `what`, for a device that is unknown or not there."""
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise InputError(f"{what}: unknown device {device!r}; try cpu, cuda, cuda:1 or auto") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"{what}: {device} was asked for, but torch {torch.__version__} finds no CUDA device")
    return device


def read_device_map(given: str | Mapping[str, Any]) -> str | dict[str, Any]:
    """A map as `from_pretrained` takes it: auto (or another of SPREADS), a device, or {module: device}, as JSON where
    it is a text; a number is that of a CUDA device, disk stands for weights that are read when they are needed.

    Raises InputError for anything else.
    """
    if isinstance(given, str):
        text = given.strip()
        if not text.startswith("{"):
            return text if text in SPREADS else check_device(text, "device_map")
        try:
            given = json.loads(text)
        except ValueError as error:
            raise InputError(
                f'device_map: {text!r} is no JSON object of modules and devices, as {{"": "cpu"}}: {error}'
            ) from error
    assert isinstance(given, Mapping)
    if not given:
        raise InputError('device_map: it is empty; {"": "cpu"} puts everything in one place')
    for module, device in given.items():
        if isinstance(device, bool) or not isinstance(device, int | str | torch.device):
            raise InputError(f"device_map: {module or 'the model'} goes to a device or its number, got {device!r}")
        if device != "disk":
            check_device(f"cuda:{device}" if isinstance(device, int) else str(device), "device_map")
    return dict(given)


def accelerators_of(model: Any) -> list[torch.device]:
    """The devices that compute a model beside the CPU, [] where there are none."""
    spread = getattr(model, "hf_device_map", None) or {"": model.device}
    found = [torch.device(place) for place in spread.values() if str(place) not in WAITING]
    return [place for place in dict.fromkeys(found) if place.type not in ("cpu", "meta")]


def device_of(model: Any) -> torch.device:
    """Where a model's inputs go; its own `device` says nothing where its first weights wait elsewhere."""
    device: torch.device = model.device
    if device.type != "meta":
        return device
    return next(iter(accelerators_of(model)), torch.device("cpu"))
