"""Modules whose weights accelerate keeps elsewhere, on the CPU or on disk, until they run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# Where accelerate leaves what it does before and after a module's forward.
HOOK = "_hf_hook"


@contextmanager
def loaded(module: nn.Module) -> Iterator[None]:
    """Within the block a module has its weights, and those of its parts where accelerate brings them all at once for
    its forward, as it does before that."""
    if not hasattr(module, HOOK):
        yield
        return
    from accelerate.utils.modeling import align_module_device

    with align_module_device(module):
        yield


def working_device(module: nn.Module) -> torch.device:
    """Where the weights of a module's first part with any are while it runs."""
    for part in module.modules():
        for weight in part.parameters(recurse=False):
            if not weight.is_meta:
                return weight.device
            device = getattr(getattr(part, HOOK, None), "execution_device", None)
            if device is not None:
                return torch.device(device)
    return torch.device("cpu")


def held_weights(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of a module, on the CPU, wherever its weights are kept."""
    found: dict[str, Tensor] = {}
    for name, part in module.named_modules():
        with loaded(part):
            state = part.state_dict(prefix=f"{name}." if name else "")
        found.update((key, value.detach().cpu()) for key, value in state.items() if not value.is_meta)
    return found
