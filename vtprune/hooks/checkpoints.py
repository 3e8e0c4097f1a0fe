"""Gradient checkpointing of the layers that hooks stand around: gradients reach all that a layer is given and gives.

A checkpoint runs a layer's forward again in the backward pass. The hooks around the layer stay outside of it, so that
what they decide is decided once; what hooks inside the layer need is among the layer's arguments. A reentrant
checkpoint knows only the tensors of its positional arguments and of its output, so the others go through it as these.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.hooks.state import ThreadState

FUNCTION = "_gradient_checkpointing_func"
# The argument that carries a layer's checkpoint past the layer's hooks, to its forward.
CHECKPOINT = "vtprune_checkpoint"


@functools.cache
def around_hooks() -> bool:
    """Whether a checkpoint holds the call of a layer, hooks and all, as in older transformers releases; in newer ones
    it holds the forward."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return "__call__" in vars(GradientCheckpointingLayer)


def drops_cache(module: Any) -> bool:
    """Whether the layers of this decoder, or this layer, run without a cache now, since they are checkpointed."""
    checkpointed = module.training and getattr(module, "gradient_checkpointing", False)
    return bool(checkpointed and (around_hooks() or torch.is_grad_enabled()))


class Boundary:
    """The checkpointing function of one layer; original: the one that the model was given; exports: whether gradients
    reach what is tapped of the layer."""

    def __init__(self, original: Callable[..., Any], state: ThreadState, *, exports: bool) -> None:
        self.original, self._state, self._exports = original, state, exports

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        if around_hooks():
            return function(*args, **{CHECKPOINT: self})
        return self.run(function, args)

    def run(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """The function of these arguments, checkpointed; of its own keyword arguments the tensors with a gradient go
        in as arguments of the checkpoint."""
        keywords = function.keywords if isinstance(function, functools.partial) else {}
        named = {name: value for name, value in keywords.items() if isinstance(value, Tensor) and value.requires_grad}
        single, names = True, list[str]()

        def body(*given: Any) -> Any:
            nonlocal single
            own = dict(zip(named, given[len(args) :], strict=True))
            with self._state.tapping(self._exports) as taps:
                output = function(*given[: len(args)], **own)
            single, names[:] = not isinstance(output, tuple), taps
            parts = (output,) if single else output
            return (*parts, *taps.values()) if len(parts) + len(taps) > 1 else parts[0]

        output = self.original(body, *args, *named.values())
        if not names:
            return output if single or isinstance(output, tuple) else (output,)
        output, values = output[: -len(names)], output[-len(names) :]
        self._state.show_taps(dict(zip(names, values, strict=True)))
        return output[0] if single else output


class Checkpoints:
    """The boundaries of some layers; exported: those of which gradients reach the taps."""

    def __init__(
        self, layers: Iterable[nn.Module], state: ThreadState, exported: frozenset[int] = frozenset()
    ) -> None:
        self._layers, self._state, self._exported = list(layers), state, exported

    def refresh(self) -> None:
        """Takes checkpointing functions that were set since into boundaries."""
        for index, layer in enumerate(self._layers):
            function = vars(layer).get(FUNCTION)
            if function is not None and not isinstance(function, Boundary):
                boundary = Boundary(function, self._state, exports=index in self._exported)
                setattr(layer, FUNCTION, boundary)

    def remove(self) -> None:
        """Leaves the layers with the functions that they were given."""
        for layer in self._layers:
            function = vars(layer).get(FUNCTION)
            if isinstance(function, Boundary):
                setattr(layer, FUNCTION, function.original)

    def forwards(self) -> list[tuple[Any, str, Callable[..., Any]]]:
        """Methods to replace, as (object, name, replacement), where a checkpoint holds the hooks of a layer, too."""
        if not around_hooks():
            return []
        return [(layer, "forward", functools.partial(_forward, layer.forward)) for layer in self._layers]


def _forward(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    boundary = kwargs.pop(CHECKPOINT, None)
    if boundary is None:
        return forward(*args, **kwargs)
    return boundary.run(functools.partial(forward, **kwargs), args)
