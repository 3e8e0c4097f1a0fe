"""Hooks of a vision encoder that stands alone: what it pools is made of the tokens that are left."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtprune.adapters import tower_for
from vtprune.adapters.open_clip import OpenClipTower
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
from vtprune.tensors.attention import split_heads

Pooling = Callable[[Tensor], tuple[Tensor, Tensor]]


class TowerHooks(EncoderHooks):
    """What happens in open_clip's ViT."""

    def __init__(
        self, tower: OpenClipTower, plans: Plans, facts: ModelFacts, *, state: ThreadState, taps: Taps
    ) -> None:
        super().__init__(tower, plans, facts, state=state, taps=taps)
        self.tower = tower
        # What methods read before a decoder, nobody reads here.
        self.reads = self.reads_last = self.weighs = False
        self.tapped = {index for index, _, _ in self.scored}
        self.last: TowerPass | None = None

    def forward(self, original: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        """What stands for the tower's forward: within it tokens drop out and merge between the blocks."""

        @functools.wraps(original)
        def forward(x: Tensor) -> Any:
            if self.tower.blocks.grad_checkpointing and torch.is_grad_enabled():
                raise VTPruneError(
                    "open_clip's gradient checkpointing runs blocks again without their tokens' record; switch it off "
                    "(set_grad_checkpointing(False)) while the model is wrapped"
                )
            encoding = self.tower.start(x)
            encoding.proportional = self.sized
            with self.under_way(encoding):
                output = original(x)
            encoding.checks.settle()
            images = encoding.images(list(x), self.token)
            self.last = TowerPass(self.tower.cost, self.tower.pooled_macs, self.plans, images)
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

    def attention(self, index: int, module: nn.MultiheadAttention, original: Callable[..., Any]) -> Callable[..., Any]:
        """What stands for the forward of a block's attention where a method looks at the block: the same, with
        queries, keys and values that can be seen."""

        @functools.wraps(original)
        def forward(query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
            encoding, sink = self.state.encoding, self.state.sink()
            if sink is None or not isinstance(encoding, BlockEncoding) or not self.asks(encoding, index):
                answer: tuple[Tensor, None] = original(query, *args, **kwargs)
                return answer
            made = F.linear(encoding.turned(query), module.in_proj_weight, module.in_proj_bias).chunk(3, dim=-1)
            sink.update(zip("qkv", made, strict=True))
            q, k, v = (split_heads(one, module.num_heads) for one in made)
            mask = kwargs.get("attn_mask")
            if mask is not None:
                mask = mask.unflatten(0, (-1, module.num_heads))
            dropout = module.dropout if module.training else 0.0
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
            return encoding.turned(module.out_proj(mixed.transpose(1, 2).flatten(2))), None

        return forward

    def after_blocks(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Brings what the last block put out to the full length."""
        encoding = self.state.encoding
        if not isinstance(encoding, BlockEncoding) or not isinstance(output, Tensor):
            return None
        return encoding.whole(output)

    def pooling(
        self, original: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """What stands for the pooling: the mean is that of the tokens that are left, each weighed by the patches
        that it stands for; tokens that are gone are zeros."""

        @functools.wraps(original)
        def pool(x: Tensor) -> tuple[Tensor, Tensor]:
            pooled, tokens = original(x)
            encoding = self.state.encoding
            if not isinstance(encoding, BlockEncoding) or not encoding.dropped:
                return pooled, tokens
            left, sizes = (part[..., None] for part in encoding.full_sizes())
            if self.tower.tower.pool_type == "avg":
                sizes = sizes.to(tokens.dtype)
                pooled = (tokens * sizes).sum(dim=1) / sizes.sum(dim=1)
            return pooled, tokens.masked_fill(~left, 0)

        return pool


class TowerWrapping(Installed):
    """The hooks and overrides of one wrapped tower."""

    def __init__(self, tower: OpenClipTower, pruners: list[Pruner], facts: ModelFacts, *, given: list[Pruner]) -> None:
        super().__init__(pruners, given, {})
        state = ThreadState()
        self._hooks = hooks = TowerHooks(tower, Plans(pruners, given), facts, state=state, taps=Taps(state.sink))
        self.refuse_copies(tower.model)
        visual = tower.tower
        self.override(visual, "forward", hooks.forward(visual.forward))
        self.override(visual, "_global_pool", hooks.pooling(visual._global_pool))
        self.after(tower.blocks, hooks.after_blocks)
        for index, layer in enumerate(tower.encoder_layers):
            if hooks.prunes or index in hooks.tapped:
                self.before(layer, functools.partial(hooks.before_layer, index))
            if index in hooks.opened:
                norm, mlp = tower.encoder_mlp(layer)
                self.before(norm, functools.partial(hooks.before_mlp, index))
                self.after(mlp, functools.partial(hooks.after_mlp, index))
            if index in hooks.tapped:
                attention: Any = layer.attn
                self.override(attention, "forward", hooks.attention(index, attention, attention.forward))
                self.after(layer, functools.partial(hooks.after_layer, index))

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
    """What `select` needs of images (B, 3, H, W), from an open_clip model: its tokens after one of its blocks.

    Raises UnsupportedModelError for another model, and VTPruneError for a block that it does not have.
    """
    tower = tower_for(model)
    if tower is None:
        raise UnsupportedModelError(f"encoder_tokens takes open_clip models, got {type(model).__name__}")
    blocks = tower.tower.transformer.resblocks
    if not -len(blocks) <= layer < len(blocks):
        raise VTPruneError(f"layer={layer}: this tower has {len(blocks)} blocks")
    block, caught = blocks[layer], dict[str, Tensor]()
    hooks = (
        block.ln_1.register_forward_hook(lambda module, args, output: caught.update(normed=output)),
        block.register_forward_hook(lambda module, args, output: caught.update(output=output)),
    )
    try:
        tower.tower(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    encoding = tower.start(pixels)
    normed, output = (encoding.turned(caught[name]) for name in ("normed", "output"))
    made = F.linear(normed, block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, dim=-1)
    query, key, value = (split_heads(states, block.attn.num_heads) for states in made)
    scale = tower.encoder_scale
    return [
        EncoderTokens(output[b, 1:], LayerSignals(query[b], key[b], value[b], scale=scale, prefix=1, group=1), grid)
        for b, grid in enumerate(encoding.grids)
    ]
