"""Forward hooks that hand the outputs of projection modules to the run that is under way in this thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Sink = Callable[[], dict[str, Tensor] | None]


class Taps:
    """Hooks on the projections of some layers; `refresh` follows modules that PEFT or a quantiser replaced."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._find: list[Callable[[], dict[str, nn.Module]]] = []
        self._hooked: dict[tuple[int, str], tuple[nn.Module, RemovableHandle]] = {}
        self._lock = threading.Lock()

    def follow(self, find: list[Callable[[], dict[str, nn.Module]]]) -> None:
        """Hooks the modules that these functions find, now and at every refresh."""
        self._find = find
        self.refresh()

    def refresh(self) -> None:
        """Moves the hooks to the modules that stand in the layers now."""
        with self._lock:
            for index, find in enumerate(self._find):
                for name, module in find().items():
                    old = self._hooked.get((index, name))
                    if old is not None and old[0] is module:
                        continue
                    if old is not None:
                        old[1].remove()
                    handle = module.register_forward_hook(self._catch(name))
                    self._hooked[index, name] = (module, handle)

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
