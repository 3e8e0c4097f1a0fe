"""Forward hooks that hand the outputs of projection modules to the run that is under way in this thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Sink = Callable[[], dict[str, Tensor] | None]
# Finds the modules of one layer, by tap.
Find = Callable[[], dict[str, nn.Module]]


class Taps:
    """Hooks on the projections of some layers; `refresh` follows modules that PEFT or a quantiser replaced."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._find: dict[str, list[Find]] = {}
        self._hooked: dict[tuple[str, int, str], tuple[nn.Module, RemovableHandle]] = {}
        self._lock = threading.Lock()

    def follow(self, group: str, find: Callable[[], list[Find]]) -> None:
        """Hooks the modules of a group that these functions find, now and at every refresh; once for each group."""
        if group in self._find:
            return
        with self._lock:
            if group not in self._find:
                found = find()
                self._hook_all(group, found)
                # Only now, since other threads take a group that is known for one that is hooked.
                self._find = {**self._find, group: found}

    def refresh(self) -> None:
        """Moves the hooks to the modules that stand in the layers now."""
        with self._lock:
            for group, found in self._find.items():
                self._hook_all(group, found)

    def _hook_all(self, group: str, found: list[Find]) -> None:
        for index, find in enumerate(found):
            for name, module in find().items():
                self._hook((group, index, name), module)

    def _hook(self, key: tuple[str, int, str], module: nn.Module) -> None:
        old = self._hooked.get(key)
        if old is not None and old[0] is module:
            return
        if old is not None:
            old[1].remove()
        self._hooked[key] = module, module.register_forward_hook(self._catch(key[2]))

    def _catch(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def catch(module: nn.Module, args: Any, output: Tensor) -> None:
            sink = self._sink()
            if sink is not None:
                sink[name] = output

        return catch

    def remove(self) -> None:
        """Takes all hooks off."""
        for _, handle in self._hooked.values():
            handle.remove()
        self._hooked.clear()
