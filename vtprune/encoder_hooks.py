"""Hooks of the vision encoder: tokens drop out between its layers, features come back at the full length."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.adapters.base import Adapter
from vtprune.encoding import Encoding
from vtprune.pruner import ModelFacts, Pruner
from vtprune.state import FRAME, RECORD, RUN, ThreadState
from vtprune.stream import EncoderLayer
from vtprune.taps import Taps


class EncoderHooks:
    """The encoder's side of a wrapped model."""

    def __init__(
        self, adapter: Adapter, pruners: list[Pruner], facts: ModelFacts, state: ThreadState, taps: Taps
    ) -> None:
        self.adapter, self.pruners, self.facts, self.state, self.taps = adapter, pruners, facts, state, taps
        self.token = object()
        depth = facts.encoder_depth
        scored = {index for pruner in pruners for index in pruner.encoder_layers(depth)}
        self.reads = any(pruner.reads_encoder for pruner in pruners)
        # Layers whose inputs are cut: all of them or none; layers whose q, k and v are read.
        self.prunes = bool(scored)
        self.tapped = scored | ({depth - 1} if self.reads else set())
        self._features_signature = inspect.signature(adapter.inner.get_image_features)

    def _budget(self, tokens: int) -> int:
        depth = self.facts.encoder_depth
        budgets = [pruner.encoder_budget(tokens) for pruner in self.pruners if pruner.encoder_layers(depth)]
        return min(budgets, default=tokens)

    def image_features(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def get_image_features(*args: Any, **kwargs: Any) -> Any:
            kwargs.pop(FRAME, None)
            arguments = self._features_signature.bind(*args, **kwargs).arguments
            arguments = {**arguments, **arguments.pop("kwargs", {})}
            self.taps.refresh()
            encoding = self.adapter.start_encoding(arguments, self._budget)
            with self._encoding(encoding):
                output = original(*args, **kwargs)
            images = encoding.images(self.adapter.pixels(arguments), self.token)
            features = output[1] if isinstance(output, tuple) else output.pooler_output
            # Features may be expanded for beams or handed in later; their records travel with the tensors.
            for tensor, image in zip(features, images, strict=True):
                setattr(tensor, RECORD, image)
            if self.state.frame is not None:
                self.state.frame.images = images
            return output

        return get_image_features

    @contextmanager
    def _encoding(self, encoding: Encoding) -> Iterator[None]:
        outer, self.state.encoding = self.state.encoding, encoding
        try:
            yield
        finally:
            self.state.encoding = outer

    def open_encoder(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if self.state.encoding is None or not self.prunes:
            return None
        return args, {**kwargs, RUN: self.state.encoding}

    def before_layer(self, index: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        encoding = kwargs.pop(RUN, self.state.encoding)
        if index in self.tapped:
            self.state.enter(encoding)
        if encoding is None or not self.prunes:
            return None
        args, kwargs = encoding.layer_inputs(index, args, kwargs)
        encoding.note_layer(index, kwargs)
        return args, kwargs

    def after_layer(self, index: int, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        encoding = self.state.leave()
        if not isinstance(encoding, Encoding) or output is None or index >= self.facts.encoder_depth:
            return
        depth = self.facts.encoder_depth
        scoring = [pruner for pruner in self.pruners if index in pruner.encoder_layers(depth)]
        decide = functools.partial(self._decide, scoring) if scoring else None
        with torch.no_grad():
            encoding.after_layer(index, kwargs, decide, self.reads, self.adapter.encoder_scale)

    def _decide(self, scoring: list[Pruner], layer: EncoderLayer) -> Tensor | None:
        keep: Tensor | None = None
        for pruner in scoring:
            chosen = pruner.prune_encoder(layer)
            if chosen is not None:
                keep = chosen if keep is None else keep & chosen
        return keep

    def before_projector(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if self.state.encoding is None or not args:
            return None
        return (self.state.encoding.projector_input(args[0]), *args[1:]), kwargs

    def after_projector(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if self.state.encoding is None or output is None:
            return None
        return self.state.encoding.projector_output(output)
