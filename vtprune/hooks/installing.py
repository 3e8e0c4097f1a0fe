"""Hooks and overrides on the modules of one instance, which come off again without a trace."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from vtprune.errors import VTPruneError
from vtprune.method.pruner import Pruner
from vtprune.report.report import Report

MISSING = object()


class Installed(ABC):
    """What `wrap` puts on one model, all on its instance, none on a class.

    given: what it was asked for; pruners: the same, bound to the model; modules: the weights that they brought.
    """

    def __init__(self, pruners: list[Pruner], given: list[Pruner], modules: dict[int, nn.Module]) -> None:
        self.pruners, self.given, self.modules = pruners, given, modules
        self.name = "+".join(pruner.name for pruner in pruners)
        self._handles: list[RemovableHandle] = []
        self._overridden: list[tuple[Any, str, Any, Override]] = []

    @abstractmethod
    def report(self) -> Report | None:
        """Of the model's last forward or generation, whichever thread ran it; None before the first one."""

    def override(self, owner: Any, name: str, replacement: Callable[..., Any]) -> None:
        """Replaces a method of one object until `remove`."""
        override = Override(getattr(owner, name), torch.compiler.disable(replacement))
        self._overridden.append((owner, name, owner.__dict__.get(name, MISSING), override))
        owner.__dict__[name] = override

    def before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Runs a hook before a module, with its keyword arguments."""
        # Shapes depend on the data, so a compiler must not trace the hooks; it breaks its graph around them.
        self.refuse_copies(module)
        self._handles.append(module.register_forward_pre_hook(torch.compiler.disable(hook), with_kwargs=True))

    def after(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Runs a hook after a module, with its keyword arguments."""
        # always_call: what a layer opened is closed again when something raises half-way.
        hook = torch.compiler.disable(hook)
        self.refuse_copies(module)
        self._handles.append(module.register_forward_hook(hook, with_kwargs=True, always_call=True))

    def remove(self) -> None:
        """Takes every hook and override off."""
        for handle in self._handles:
            handle.remove()
        for owner, name, before, override in reversed(self._overridden):
            override.active = False
            if owner.__dict__.get(name) is not override:
                # Somebody, as accelerate does, has put a method of their own around it, which stays.
                continue
            if before is MISSING:
                owner.__dict__.pop(name, None)
            else:
                owner.__dict__[name] = before

    def refuse_copies(self, module: nn.Module) -> None:
        """Pickling and copying look here first, and would stumble over a hook, or share it, later."""
        if not isinstance(module.__dict__.get("__reduce_ex__"), Override):
            self.override(module, "__reduce_ex__", refuse_copy)


def refuse_copy(*args: Any) -> Any:
    """Raises VTPruneError, for whatever would copy or pickle a model with its hooks."""
    raise VTPruneError("a wrapped model cannot be copied or pickled; call vtprune.unwrap(model) first")


class Override:
    """A method that stands for another one of the same object while it is active."""

    def __init__(self, original: Callable[..., Any], replacement: Callable[..., Any]) -> None:
        functools.update_wrapper(self, replacement)
        self.original, self.replacement, self.active = original, replacement, True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self.replacement if self.active else self.original)(*args, **kwargs)
