"""A look at each decoder layer once it has run, for what measures a model and changes nothing in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


def after_layers(layers: Iterable[nn.Module], tell: Callable[[int, dict[str, Any]], object]) -> list[RemovableHandle]:
    """Calls `tell` with the number of a layer and the keyword arguments that it ran with; the handles take the hooks
    off again."""

    def teller(index: int) -> Callable[..., None]:
        def after(module: nn.Module, args: Any, arguments: dict[str, Any], output: Any) -> None:
            tell(index, arguments)

        return after

    return [layer.register_forward_hook(teller(index), with_kwargs=True) for index, layer in enumerate(layers)]
