"""Hooks of a vision encoder that stands alone, but for how it attends and pools."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.adapters import tower_for
from vtprune.adapters.tower import Tower
from vtprune.encoder.blocks import BlockEncoding
from vtprune.errors import UnsupportedModelError, VTPruneError
from vtprune.hooks.encoder import EncoderHooks
from vtprune.hooks.installing import Installed
from vtprune.hooks.state import ThreadState
from vtprune.hooks.taps import Taps
from vtprune.method.facts import ModelFacts
from vtprune.method.plan import Plans
from vtprune.method.pruner import Pruner
from vtprune.method.views import LayerSignals
from vtprune.report.report import Report
from vtprune.report.tower import TowerPass
from vtprune.tensors.attention import at_least_single, split_heads


class TowerHooks(EncoderHooks, ABC):
    """What happens in a ViT alone."""

    def __init__(self, tower: Tower, plans: Plans, facts: ModelFacts, *, state: ThreadState, taps: Taps) -> None:
        super().__init__(tower, plans, facts, state=state, taps=taps)
        self.tower = tower
        # What methods read before a decoder, nobody reads here.
        self.reads = self.reads_last = self.weighs = False
        self.tapped = {index for index, _, _ in self.scored}
        self.last: TowerPass | None = None

    def forward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """What stands for the tower's forward: within it tokens drop out and merge between the blocks."""

        @functools.wraps(original)
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if args or kwargs:
                raise VTPruneError("a wrapped tower makes the masks of its blocks itself; give it pixels alone")
            if self.tower.checkpoints and torch.is_grad_enabled():
                raise VTPruneError(
                    f"{self.tower.name}'s gradient checkpointing runs blocks again without their tokens' record; "
                    "switch it off (set_grad_checkpointing(False)) while the model is wrapped"
                )
            encoding = self.tower.start(x)
            encoding.proportional = self.sized
            with self.under_way(encoding):
                output = original(x)
            encoding.checks.settle()
            images = encoding.images(list(x), self.token)
            # A tower may take pictures of other sizes than its own.
            rows, columns = encoding.grids[0][1:]
            cost = replace(self.tower.cost, side=(rows, columns))
            self.last = TowerPass(cost, self.tower.pooled_macs(rows * columns), self.plans, images)
            return output

        return forward

    def before_layer(self, index: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        encoding = self.state.encoding
        if index in self.tapped:
            self.state.enter(encoding)
        if encoding is None:
            return None
        if index in self.opened:
            self.state.inside = encoding
        return self.cut(index, encoding, args, kwargs)

    def after_blocks(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Brings what the last block put out to the full length."""
        encoding = self.state.encoding
        if not isinstance(encoding, BlockEncoding) or not encoding.dropped or not isinstance(output, Tensor):
            return None
        return encoding.whole(output)

    @abstractmethod
    def install(self, installed: Installed, layers: dict[int, Any]) -> None:
        """Makes what pools leave out what is gone, and queries, keys and values of these layers seen."""


def weighted_mean(tokens: Tensor, weights: Tensor) -> Tensor:
    """(B, D) the mean of tokens (B, N, D) by weights (B, N), summed in fp32 or fp64."""
    whole, weights = at_least_single(tokens), weights[..., None]
    return ((whole * weights).sum(dim=1) / weights.sum(dim=1)).to(tokens.dtype)


class TowerWrapping(Installed):
    """The hooks and overrides of one wrapped tower."""

    def __init__(
        self, tower: Tower, pruners: list[Pruner], facts: ModelFacts, *, given: list[Pruner], kind: type[TowerHooks]
    ) -> None:
        super().__init__(pruners, given, {})
        state = ThreadState()
        self._hooks = hooks = kind(tower, Plans(pruners, given), facts, state=state, taps=Taps(state.sink))
        self.refuse_copies(tower.model)
        visual = tower.tower
        self.override(visual, "forward", hooks.forward(visual.forward))
        self.after(tower.blocks, hooks.after_blocks)
        for index, layer in enumerate(tower.encoder_layers):
            if hooks.prunes or index in hooks.tapped:
                self.before(layer, functools.partial(hooks.before_layer, index))
            if index in hooks.opened:
                norm, mlp = tower.encoder_mlp(layer)
                self.before(norm, functools.partial(hooks.before_mlp, index))
                self.after(mlp, functools.partial(hooks.after_mlp, index))
            if index in hooks.tapped:
                self.after(layer, functools.partial(hooks.after_layer, index))
        hooks.install(
            self, {index: layer for index, layer in enumerate(tower.encoder_layers) if index in hooks.tapped}
        )

    def report(self) -> Report | None:
        last = self._hooks.last
        return None if last is None else last.build()


@dataclass(frozen=True)
class EncoderTokens:
    """The tokens of one image at a layer of an encoder: features (N, D), the layer's queries, keys and values, and the
    grid (1, h, w)."""

    features: Tensor
    signals: LayerSignals
    grid: tuple[int, int, int]


@torch.no_grad()
def encoder_tokens(model: Any, pixels: Tensor, layer: int = -1) -> list[EncoderTokens]:
    """What `select` needs of images (B, 3, H, W), from a model of open_clip or timm: its tokens after one of its
    blocks.

    Raises UnsupportedModelError for another model, and VTPruneError for a block that it does not have.
    """
    tower = tower_for(model)
    if tower is None:
        raise UnsupportedModelError(f"encoder_tokens takes models of open_clip and timm, got {type(model).__name__}")
    blocks = list(tower.encoder_layers)
    if not -len(blocks) <= layer < len(blocks):
        raise VTPruneError(f"layer={layer}: this tower has {len(blocks)} blocks")
    block, caught = blocks[layer], dict[str, Tensor]()
    hooks = (
        tower.attention_norm(block).register_forward_hook(lambda module, args, output: caught.update(normed=output)),
        block.register_forward_hook(lambda module, args, output: caught.update(output=output)),
    )
    try:
        tower.tower(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    encoding = tower.start(pixels)
    normed, output = (encoding.turned(caught[name]) for name in ("normed", "output"))
    query, key, value = (split_heads(one, encoding.heads) for one in tower.attention_states(block, normed))
    scale, prefix = tower.encoder_scale, encoding.prefix
    return [
        EncoderTokens(
            output[b, prefix:], LayerSignals(query[b], key[b], value[b], scale=scale, prefix=prefix, group=1), grid
        )
        for b, grid in enumerate(encoding.grids)
    ]
