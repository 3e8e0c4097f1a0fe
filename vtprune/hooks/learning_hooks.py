"""Hooks for methods with weights of their own: routed layers with their gates, and what is added to the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from vtprune.decoder.run import DecoderRun
from vtprune.hooks.state import GATE, ThreadState


class LearningHooks:
    """The hooks of a wrapped model whose methods bring weights."""

    def __init__(self, state: ThreadState) -> None:
        self.state = state

    def routed_forward(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The forward of a layer for the tokens that it computes; the others come back as they were."""
        run = self.state.running
        packed = run.packed if isinstance(run, DecoderRun) else None
        if packed is None:
            return forward(*args, **kwargs)
        output = packed.states if packed.empty else forward(*args, **{**kwargs, GATE: packed.gate})
        if isinstance(output, tuple):
            return (packed.unpack(output[0]), *output[1:])
        return packed.unpack(output)

    def before_attention(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Takes the gate from the arguments, which gradient checkpointing hands to the layer again, for its MLP."""
        self.state.gate = kwargs.get(GATE)
        return args, {name: value for name, value in kwargs.items() if name != GATE}

    def after_mlp(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        """Multiplies what the MLP of a routed layer adds to each token by its gate."""
        gate, self.state.gate = self.state.gate, None
        return None if gate is None or output is None else output * gate[..., None].to(output)

    def open_loss(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.state.loss = None
        if kwargs.get("labels") is not None:
            self.state.labels = kwargs["labels"]

    def add_loss(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Adds what methods add to the loss of a forward with labels."""
        self.state.labels = None
        loss = self.state.loss
        if loss is None or output is None or kwargs.get("labels") is None:
            return None
        if isinstance(output, tuple):
            return (output[0] + loss.to(output[0]), *output[1:])
        output.loss = output.loss + loss.to(output.loss)
        return output
