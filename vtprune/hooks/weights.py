"""The weights that methods bring to a model: on it, on disk as safetensors, and checked against the model they fit."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.adapters import config_hash, model_type
from vtprune.adapters.base import Adapter
from vtprune.adapters.offloading import held_weights, working_device
from vtprune.errors import UncheckedBaseWarning, VTPruneError
from vtprune.files import read_tensors, write_tensors
from vtprune.hooks.base_sample import BaseSample, sample_base
from vtprune.method.config import WEIGHTS_NAME
from vtprune.method.pruner import Pruner
from vtprune.method.stages import Trained

# The submodule of a wrapped model that holds them.
SUBMODULE = "vtprune_weights"
FORMAT, VERSION = "vtprune-weights", "1"


def make_modules(pruners: Sequence[Pruner], adapter: Adapter) -> dict[int, nn.Module]:
    """The modules that the pruners bring, by their place in the list, of the decoder's type and on its device."""
    found: dict[int, nn.Module] = {}
    weight = next(parameter for parameter in adapter.language_model.parameters() if parameter.is_floating_point())
    for order, pruner in enumerate(pruners):
        if isinstance(pruner, Trained):
            found[order] = pruner.make_module().to(device=working_device(adapter.language_model), dtype=weight.dtype)
    return found


def attach(core: Any, modules: dict[int, nn.Module]) -> None:
    """Puts the modules on the model, in its mode, so that they are trained, moved and synchronised with it."""
    if modules:
        brought = nn.ModuleDict({str(order): module for order, module in modules.items()})
        core.add_module(SUBMODULE, brought.train(core.training))


def detach(core: Any) -> None:
    """Takes them off again."""
    core._modules.pop(SUBMODULE, None)


def untrained(pruners: Sequence[Pruner]) -> str:
    """What a message says of the methods that bring weights, where nothing has trained them; "" where none does."""
    found = {pruner.name: pruner.untrained for pruner in pruners if isinstance(pruner, Trained)}
    return "; ".join(f"{name} is untrained{': ' if what else ''}{what}" for name, what in found.items())


def write_weights(modules: dict[int, nn.Module], folder: Path, core: Any) -> None:
    """Writes the modules' weights, and a sample of the base model's, whole or not at all.

    Raises VTPruneError where the folder cannot be written.
    """
    tensors = {
        f"{order}.{name}": tensor.contiguous()
        for order, module in modules.items()
        for name, tensor in held_weights(module).items()
    }
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "base": config_hash(core),
        "model_type": model_type(core),
        **sample_base(core, SUBMODULE).metadata(),
    }
    write_tensors(folder / WEIGHTS_NAME, tensors, metadata)


def read_weights(modules: dict[int, nn.Module], folder: Path, core: Any) -> None:
    """Reads what `write_weights` wrote into these modules.

    Raises VTPruneError, naming the file, if it is missing, cut short, of another base model, or of other modules, and
    for modules whose weights accelerate keeps elsewhere; warns where only the base's architecture could be checked.
    """
    path = folder / WEIGHTS_NAME
    tensors, metadata = _read(path)
    _check_base(metadata, core, path)
    _fill(modules, tensors, path)


def read_module(module: nn.Module, folder: Path, kind: str) -> None:
    """Reads the weights of a folder's one method into its module, for a base that is at hand as a config alone, whose
    `model_type` is `kind`: nothing says whether the base's weights are those that it was trained on.

    Raises VTPruneError as `read_weights` does.
    """
    path = folder / WEIGHTS_NAME
    tensors, metadata = _read(path)
    if metadata.get("model_type") != kind:
        raise VTPruneError(f"{path} was trained on a {metadata.get('model_type')}, and this is a {kind}")
    _fill({0: module}, tensors, path)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.exists():
        raise VTPruneError(f"no {WEIGHTS_NAME} in {path.parent}")
    tensors, metadata = read_tensors(path, "a safetensors file (cut short?)")
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        raise VTPruneError(f"{path} does not hold weights of vtprune's methods")
    return tensors, metadata


def _check_base(metadata: dict[str, str], core: Any, path: Path) -> None:
    """Raises VTPruneError for another base than the one that the file's weights were trained on."""
    own = config_hash(core)
    if metadata.get("base") != own:
        raise VTPruneError(
            f"{path} was trained on another base model ({metadata.get('model_type')}, config {metadata.get('base')}; "
            f"this one is {model_type(core)}, config {own}); load it on the base that it was trained on"
        )
    saved, found = BaseSample.from_metadata(metadata), sample_base(core, SUBMODULE)
    if saved is not None and saved.adapted and not found.adapted:
        raise VTPruneError(
            f"{path} was trained with PEFT adapters on its base, and this model has none; load them first: "
            "PeftModel.from_pretrained(base, adapter)"
        )
    same = None if saved is None else saved.matches(found)
    if same is None:
        reason = "says nothing of its base's weights" if saved is None else "tells of weights that are not found here"
        warnings.warn(
            f"{path} {reason}, so it cannot be checked that this is the base that it was trained on, only that the "
            "architecture is the same; vtprune.save(model, folder) writes it anew",
            UncheckedBaseWarning,
            stacklevel=4,
        )
    elif not same:
        raise VTPruneError(
            f"{path} was trained on another base model: the architecture is the same, but its weights differ from "
            "this model's; load it on the base that it was trained on"
        )


def _fill(modules: dict[int, nn.Module], tensors: dict[str, Tensor], path: Path) -> None:
    wanted = {f"{o}.{name}": t for o, module in modules.items() for name, t in module.state_dict().items()}
    missing, extra = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    shapes = [name for name in wanted if name in tensors and tensors[name].shape != wanted[name].shape]
    if missing or extra or shapes:
        raise VTPruneError(
            f"{path} does not fit the methods of this model: missing {missing[:3]}, unknown {extra[:3]}, of another "
            f"shape {shapes[:3]}; wrap it with the settings that the weights were trained with"
        )
    if any(target.is_meta for target in wanted.values()):
        raise VTPruneError(
            "the weights of this model's methods are offloaded, where nothing can be read into them; unwrap the model "
            f"and wrap it again with vtprune.wrap(model, {str(path.parent)!r})"
        )
    with torch.no_grad():
        for name, target in wanted.items():
            target.copy_(tensors[name].to(target))
