"""A pass of the prompt through the first decoder layers before the one that counts, for methods that select by it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from vtprune.adapters.base import Adapter
from vtprune.cache.adopting import with_cache
from vtprune.decoder.prompt import ImageSpan
from vtprune.decoder.run import DecoderRun
from vtprune.encoder.encoding import Call
from vtprune.hooks.scoring import one_column
from vtprune.hooks.state import RUN
from vtprune.method.views import DecoderLayer
from vtprune.tensors.compaction import fill_index


class ProbeEnd(Exception):
    """Ends the decoder's forward where a probe has seen enough."""


class ProbeRun(DecoderRun):
    """The prompt of another run as it stands, on its way to decoder layer `stop`, which is not run.

    Drops nothing, and writes to copies of the cache's layers: what they hold is shared, what is appended is not.
    hidden, embeddings: what layer `stop` would get, (B, n, D) and the rotary embeddings of its n tokens.
    """

    def __init__(self, run: DecoderRun, stop: int, new_cache: Callable[[], Cache]) -> None:
        layers, cache = None, None
        # The first turn has nothing to look back at, so its keys and values need not be held.
        if run.layers is not None and run.prompt.offset:
            layers, cache = [layer.twin() for layer in run.layers], new_cache()
            cache.layers = list(layers)
        super().__init__(run.prompt, [], layers, cache=cache, flash=run.flash, rotary=run.rotary, states=run.states)
        self.take_over(run)
        self._stop = stop
        self.hidden: Tensor | None = None
        self.embeddings: tuple[Tensor, Tensor] | None = None

    def layer_inputs(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """As any run's; raises ProbeEnd at layer `stop`."""
        args, kwargs = super().layer_inputs(index, args, kwargs)
        if index < self._stop:
            return args, kwargs
        self.hidden = args[0] if args else kwargs["hidden_states"]
        self.embeddings = kwargs["position_embeddings"]
        raise ProbeEnd


class _Passing(DynamicLayer):
    """A cache layer that holds nothing."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The keys and values as they are."""
        return key_states, value_states


@dataclass(frozen=True)
class Probe:
    """What decoder layer `layer` would compute from the prompt as it stands.

    query: (B, H, C, d) of each conversation's last token; key: (B, H, n, d) of all. first, last: (B, C) the columns
    where a conversation begins and its prompt ends; where: (B, L) the column of each place of the input, or None if
    they are the same. scale: softmax scale; depth: number of decoder layers.
    """

    layer: int
    depth: int
    scale: float
    query: Tensor
    key: Tensor
    first: list[list[int]]
    last: list[list[int]]
    where: Tensor | None

    def of(self, span: ImageSpan, text: Tensor, budget: int, *, after: int, text_after: int) -> DecoderLayer:
        """The layer as a method sees it, for one image and the places (T,) of its conversation's text; after,
        text_after: as in `DecoderLayer`."""
        row = span.row
        vision = span.standing
        if self.where is not None:
            vision, text = self.where[row].index_select(0, vision), self.where[row].index_select(0, text)
        key = self.key[row]
        return DecoderLayer(
            query=self.query[row, :, span.talk, None],
            key=key,
            value=key[:, :0],
            vision=vision,
            last=self.last[row][span.talk],
            scale=self.scale,
            total=span.image.total,
            indices=span.kept,
            budget=budget,
            index=self.layer,
            depth=self.depth,
            text=text,
            memory={},
            entered=span.kept.numel(),
            first=self.first[row][span.talk],
            after=after,
            text_after=text_after,
        )


@dataclass(frozen=True)
class Prober:
    """Runs the first layers of the decoder on the prompt of `run`, with the arguments of the decoder's call."""

    adapter: Adapter
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    run: DecoderRun

    @torch.no_grad()
    def at(self, layer: int) -> Probe:
        """The last query and all keys of decoder layer `layer`; layers 0 .. layer - 1 run."""
        run = ProbeRun(self.run, layer, self.adapter.new_cache)
        # Outputs that were asked for are those of the pass that counts.
        quiet: dict[str, Any] = {"output_hidden_states": False, "output_attentions": False}
        cache = run.cache
        if cache is None and self._says_nothing(self.kwargs.get("attention_mask")):
            # The model would wait for the device to find that out once more, or, without a cache, for whether several
            # conversations are packed into a row.
            quiet["attention_mask"], cache = None, Cache(layer_class_to_replicate=_Passing)
        quiet["use_cache"] = cache is not None
        # Not by way of the module's hooks: this is no forward of the decoder that anybody else should see.
        forward = self.module.forward
        with contextlib.suppress(ProbeEnd):
            forward(*self.args, **{**with_cache(forward, self.kwargs, cache), **quiet, RUN: run})
        assert run.hidden is not None
        assert run.embeddings is not None
        places = run.layout(layer).places
        first, last = self.run.ends([span.kept.numel() for span in self.run.spans], packed=places is not None)
        modules = list(self.adapter.decoder_layers)
        columns = one_column(last, run.hidden.device)
        query, key = self.adapter.query_and_keys(modules[layer], run.hidden, run.embeddings, columns)
        where = None if places is None else fill_index(places, run.prompt.length)
        return Probe(
            layer=layer,
            depth=len(modules),
            scale=self.adapter.decoder_scale,
            query=query,
            key=key,
            first=first,
            last=last,
            where=where,
        )

    def _says_nothing(self, mask: Any) -> bool:
        """Whether a mask marks no padding, as the host knows; layers of linear attention look into a cache."""
        plain = isinstance(mask, Tensor) and mask.ndim == 2 and not self.run.prompt.offset and not self.run.states
        return plain and bool((self.run.prompt.outline.number >= 0).all())
