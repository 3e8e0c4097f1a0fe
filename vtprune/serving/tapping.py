"""One encoder layer, whatever computes it: the queries, keys and values that its attention is given, and a place where
what it puts out may be changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from einops import rearrange
from torch import Tensor, nn

NAMES = ("query", "key", "value")


class Tap:
    """Notes what an attention module is given while somebody listens; heads: how many it has."""

    def __init__(self, attention: nn.Module, heads: int) -> None:
        self.heads = heads
        self._noted: list[tuple[Tensor, ...]] | None = None
        attention.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._noted is not None:
            given = dict(zip(NAMES, args, strict=False)) | kwargs
            self._noted.append(tuple(given[name] for name in NAMES))

    @contextmanager
    def listening(self) -> Iterator[list[tuple[Tensor, ...]]]:
        """Within the block the module's queries, keys and values, (B, H, N, d) each once `by_head` has been asked."""
        noted: list[tuple[Tensor, ...]] = []
        self._noted = noted
        try:
            yield noted
        finally:
            self._noted = None

    def by_head(self, noted: list[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor, Tensor]:
        """The one call's queries, keys and values as (B, H, N, d)."""
        (found,) = noted
        flat = "b n (h d) -> b h n d"
        one, two, three = (
            rearrange(states, flat if states.ndim == 3 else "b n h d -> b h n d", h=self.heads) for states in found
        )
        return one, two, three


class Outlet:
    """The states between two modules, which may be changed while somebody says how: what `layer` puts out, or, where
    vLLM passes over its hooks, what `reader` is given."""

    def __init__(self, layer: nn.Module | None = None, *, reader: nn.Module | None = None) -> None:
        self._change: Callable[[Tensor], Tensor] | None = None
        if layer is not None:
            layer.register_forward_hook(self._put_out)
        if reader is not None:
            reader.register_forward_pre_hook(self._given)

    def _given(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        return None if self._change is None else (self._change(args[0]), *args[1:])

    def _put_out(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._change is None:
            return None
        return (self._change(output[0]), *output[1:]) if isinstance(output, tuple) else self._change(output)

    @contextmanager
    def changed(self, change: Callable[[Tensor], Tensor] | None) -> Iterator[None]:
        """Within the block the next module is given what `change` makes of the layer's states, of the same shape."""
        self._change = change
        try:
            yield
        finally:
            self._change = None
