"""Planned decoder layers: vision goes through fewer heads, a window of neighbours, or fewer channels of the MLP."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from vtprune.adapters.base import Adapter
from vtprune.adapters.offloading import loaded
from vtprune.cache.adopting import cache_in
from vtprune.decoder.prompt import ImageSpan
from vtprune.decoder.run import DecoderRun
from vtprune.errors import UnsupportedModelError, VTPruneError
from vtprune.hooks.state import PLAN, ThreadState
from vtprune.method.answers import VisionPlan
from vtprune.method.plan import Plans
from vtprune.method.pruner import Pruner
from vtprune.method.stages import InAttention
from vtprune.tensors.apart import Apart, mask_rows, neighbours, of_heads, rows_of, windowed_attention
from vtprune.tensors.compaction import gather_tokens
from vtprune.tensors.rotary import rotate

# The parts of a gated MLP.
GATED = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Window:
    """The tokens of one image in a layer: its row, where they begin among the row's vision tokens (padding counts) and
    in its columns, and the neighbours (N, s) of each, by their place among the image's, -1 for none."""

    row: int
    first: int
    column: int
    near: Tensor


@dataclass(frozen=True)
class Planned:
    """What a layer under way does with vision, and where that stands."""

    plan: VisionPlan
    apart: Apart
    windows: tuple[Window, ...] = ()


class PlannedLayers:
    """The hooks' work for the one method of a list that plans layers, if there is one.

    Raises UnsupportedModelError where the model's attention or MLP cannot be taken apart, by the method's name.
    """

    def __init__(self, adapter: Adapter, pruners: Sequence[Pruner], plans: Plans, state: ThreadState) -> None:
        found = [
            (order, one) for order, one in enumerate(pruners) if isinstance(one, InAttention) and one.planned_layers()
        ]
        self.pruner: InAttention | None = found[0][1] if found else None
        self._order, self._plans = found[0][0] if found else -1, plans
        self.layers = frozenset(self.pruner.planned_layers()) if self.pruner else frozenset()
        self.plans = {layer: self.pruner.vision_plan(layer) for layer in self.layers} if self.pruner else {}
        self._adapter, self._state = adapter, state
        self._modules: list[Any] = list(adapter.decoder_layers)
        if self.pruner is not None:
            for layer, plan in self.plans.items():
                self._check(self.pruner.name, self._modules[layer], plan)

    def _check(self, name: str, layer: Any, plan: VisionPlan) -> None:
        adapter = self._adapter
        if adapter.flash or adapter.windows:
            what = "flash attention" if adapter.flash else "sliding windows"
            raise UnsupportedModelError(
                f"{name}: heads and rows of a layer attend to different tokens, which {what} cannot say; load a model "
                "without sliding windows with attn_implementation='sdpa' or 'eager'"
            )
        parts: list[Any] = [*adapter.decoder_projections(layer).modules().values(), adapter.decoder_output(layer)]
        if plan.mlp is not None:
            mlp = adapter.decoder_mlp(layer)
            parts += [getattr(mlp, part, None) for part in GATED]
        wrong = [part for part in parts if type(part) is not nn.Linear]
        if wrong:
            found = "this MLP has none" if wrong[0] is None else f"one of these is a {type(wrong[0]).__name__}"
            raise UnsupportedModelError(
                f"{name} computes with parts of the weights of torch.nn.Linear (of attention, of a gated MLP), and "
                f"{found}"
            )

    def at(self, run: DecoderRun, index: int) -> Planned | None:
        """What layer `index` is told in a forward that brings images, None where it computes none of their tokens."""
        if index not in self.layers:
            return None
        kept = [self._computed(span, index) for span in run.spans]
        if not any(kept):
            return None
        plan = self.plans[index]
        windows = self._windows(run, plan, index, kept) if plan.window is not None else ()
        if not windows:
            plan = replace(plan, window=None)
        return Planned(plan, run.apart(kept), windows)

    def _computed(self, span: ImageSpan, index: int) -> int:
        """How many of an image's tokens a layer computes: those alive, unless the method itself has them skip it."""
        alive = span.layers[index].numel()
        budget = self._plans.of(span.shown).routed(self._order, index, span.entered.numel())
        return 0 if budget == 0 else alive

    def _windows(self, run: DecoderRun, plan: VisionPlan, index: int, kept: list[int]) -> tuple[Window, ...]:
        """The windows of the images; none where each sees all that the model itself lets it see."""
        shown = [span for span, count in zip(run.spans, kept, strict=True) if count]
        if plan.causal and all(covers(plan, span.image.grid) for span in shown):
            return ()
        counts = [0] * run.prompt.batch
        for span, count in zip(run.spans, kept, strict=True):
            counts[span.row] += count
        packed, found = run.given.places is not None, []
        first = [max(counts) - count for count in counts]
        for span in shown:
            near = self._near(span, plan)
            column = run.column_after(span, kept, packed=packed) - len(near)
            found.append(Window(span.row, first[span.row], column, near))
            first[span.row] += len(near)
            span.seen[index] = run.before(span, kept) + near.shape[1]
        return tuple(found)

    def _near(self, span: ImageSpan, plan: VisionPlan) -> Tensor:
        """(N, s) the neighbours of the tokens that an image has left."""
        assert self.pruner is not None
        assert plan.window is not None
        grid, kept = span.image.grid, span.kept
        if len(span.image.parts) > 1 or grid[0] > 1 or span.structural.size:
            raise VTPruneError(
                f"{self.pruner.name}: window={plan.window} is of neighbours on one grid, and this is a video or a "
                "picture in crops; use window=None"
            )
        table = _table(grid[1:], plan.window, plan.causal).to(kept.device)
        # What stands last is where -1 finds itself.
        place = torch.full((span.image.total + 1,), -1, dtype=torch.long, device=kept.device)
        place[kept] = torch.arange(kept.numel(), device=kept.device)
        return place[table[kept]]

    def attention_forward(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The forward of a planned layer's attention: the model's own, unless the plan has heads or windows."""
        planned: Planned | None = kwargs.pop(PLAN, None)
        self._state.planned = planned
        if planned is None or not planned.plan.attends:
            return forward(*args, **kwargs)
        return Attending(self._adapter, self._modules[index], planned).forward(index, *args, **kwargs), None

    def mlp_forward(self, module: Any, forward: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
        """The forward of a planned layer's MLP: vision goes through its first channels alone."""
        planned: Planned | None = self._state.planned
        self._state.planned = None
        if planned is None or planned.plan.mlp is None:
            return forward(states)
        text, vision = planned.apart.split(states)
        return planned.apart.join(forward(text), first_channels(module, vision, planned.plan.mlp))


class Attending:
    """The attention of one layer whose vision tokens have fewer heads, or windows."""

    def __init__(self, adapter: Adapter, layer: Any, planned: Planned) -> None:
        sizes = adapter.cost.decoder
        self._planned, self._apart, self._scale = planned, planned.apart, adapter.decoder_scale
        self._module: Any = adapter.decoder_attention(layer)
        self._projections = adapter.decoder_projections(layer).modules()
        self._norms, self._output = adapter.decoder_norms(layer).modules(), adapter.decoder_output(layer)
        self._heads, self._size, share = sizes.heads, sizes.head_size, sizes.heads // sizes.kv_heads
        every = tuple(range(sizes.kv_heads))
        # Key-value heads that read vision and those that do not, and the query heads that ask with each.
        self._reading = every if planned.plan.heads is None else planned.plan.heads
        self._cut = tuple(head for head in every if head not in self._reading)
        self._asking, self._mute = (
            tuple(head * share + one for head in heads for one in range(share)) for heads in (self._reading, self._cut)
        )

    def forward(
        self,
        index: int,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """(B, n, D) what the layer's attention puts out."""
        text, vision = self._apart.split(hidden_states)
        asked, answered = self._channels(self._asking, vision), self._channels(self._reading, vision)
        query, value = self._projections["q"], self._projections["v"]
        with loaded(query), loaded(value):
            queries = rows_of(vision, query.weight, query.bias, asked)
            values = rows_of(vision, value.weight, value.bias, answered)
        spoken = value(text)
        # Keys without values: what text gives vision in the other heads finds nothing there.
        values = spoken.new_zeros(*vision.shape[:2], spoken.shape[-1]).index_copy(-1, answered, values)
        turn = tuple(part.expand(len(hidden_states), *part.shape[1:]) for part in position_embeddings)
        words = self._turned("q", query(text), [gather_tokens(part, self._apart.text) for part in turn])
        queries = self._turned("q", queries, [gather_tokens(part, self._apart.vision) for part in turn])
        keys = self._turned("k", self._projections["k"](hidden_states), turn)
        held = self._split(self._apart.join(spoken, values)).transpose(1, 2)
        cache = cache_in(kwargs)
        if cache is not None:
            keys, held = cache.update(keys, held, index)
        found, seen = self._found(words, queries, (keys, held), attention_mask)
        output = self._output
        with loaded(output):
            columns = output.weight.index_select(1, asked)
            looked = linear(seen.flatten(2), columns, output.bias)
        return self._apart.join(output(found.flatten(2)), looked)

    def _found(
        self, words: Tensor, queries: Tensor, held: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(B, t, H, d) what text finds, (B, v, h, d) what vision finds; words, queries: (B, H, t, d) and (B, h, v, d)
        theirs; held: keys and values (B, Hkv, k, d) of all."""
        apart, length = self._apart, self._apart.order.shape[1]
        asking, reading = self._index(self._asking, words), self._index(self._reading, words)
        own = held if not self._cut else tuple(part[:, reading] for part in held)
        found = words.new_zeros(words.shape[0], words.shape[2], self._heads, self._size)
        needs_rows = self._cut or self._planned.windows
        rows = mask_rows(mask, apart.text, queries=length, keys=held[0].shape[2]) if needs_rows else None
        seen = queries.transpose(1, 2)
        if self._planned.windows:
            seen = self._windowed(queries, own, mask)
        if self._planned.windows and self._asking:
            found = found.index_copy(2, asking, self._attended(words[:, asking], own, rows))
        elif self._asking:
            both = apart.join(words[:, asking].transpose(1, 2), seen).transpose(1, 2)
            spoken, seen = apart.split(self._attended(both, own, mask))
            found = found.index_copy(2, asking, spoken)
        if self._cut:
            mute, cut = self._index(self._mute, words), self._index(self._cut, words)
            others = tuple(part[:, cut] for part in held)
            found = found.index_copy(2, mute, self._attended(words[:, mute], others, rows))
        return found, seen

    def _attended(self, query: Tensor, held: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
        """(B, q, h, d) by the model's own kind of attention."""
        module = self._module
        known = sys.modules[type(module).__module__]
        attend = known.ALL_ATTENTION_FUNCTIONS.get_interface(
            module.config._attn_implementation, known.eager_attention_forward
        )
        dropout = module.attention_dropout if module.training else 0.0
        found: Tensor = attend(module, query, *held, mask, dropout=dropout, scaling=module.scaling)[0]
        return found

    def _windowed(self, query: Tensor, held: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
        """(B, v, h, d) what vision tokens find in their windows."""
        batch, heads, count, size = query.shape
        found = query.new_zeros(batch, count, heads, size)
        past = held[0].shape[2] - self._apart.order.shape[1]
        for one in self._planned.windows if heads else ():
            start, rows = past + one.column, slice(one.first, one.first + len(one.near))
            found[one.row, rows] = windowed_attention(
                query[one.row, :, rows],
                key=held[0][one.row],
                value=held[1][one.row],
                near=torch.where(one.near < 0, one.near, one.near + start),
                start=start,
                seen=None if mask is None else mask[min(one.row, len(mask) - 1), 0, one.column, :start],
                scale=self._scale,
            )
        return found

    def _split(self, states: Tensor) -> Tensor:
        """(B, n, heads, d) of (B, n, heads * d)."""
        return states.unflatten(-1, (states.shape[-1] // self._size, self._size))

    def _turned(self, tap: str, states: Tensor, turn: Sequence[Tensor]) -> Tensor:
        """(B, heads, n, d) queries or keys, normed where the model norms them, with rotary embedding."""
        heads, norm = self._split(states), self._norms.get(tap)
        heads = heads if norm is None else norm(heads)
        cos, sin = (part.unsqueeze(1) for part in turn)
        return rotate(heads.transpose(1, 2), cos, sin)

    def _index(self, heads: tuple[int, ...], like: Tensor) -> Tensor:
        return of_heads(heads, 1, like.device)

    def _channels(self, heads: tuple[int, ...], like: Tensor) -> Tensor:
        return of_heads(heads, self._size, like.device)


def first_channels(module: Any, states: Tensor, width: int) -> Tensor:
    """What a gated MLP makes of states (..., D) with the first `width` of its channels alone."""
    gate, up, down = (getattr(module, part) for part in GATED)
    with loaded(gate), loaded(up), loaded(down):
        opened, raised = (
            linear(states, part.weight[:width], None if part.bias is None else part.bias[:width])
            for part in (gate, up)
        )
        return linear(module.act_fn(opened) * raised, down.weight[:, :width], down.bias)


def covers(plan: VisionPlan, grid: tuple[int, int, int]) -> bool:
    """Whether a window reaches from every token of a grid to every other."""
    assert plan.window is not None
    return grid[0] == 1 and (plan.window - 1) // 2 >= max(grid[1:]) - 1


@functools.lru_cache(maxsize=64)
def _table(grid: tuple[int, int], window: int, causal: bool) -> Tensor:
    return neighbours(grid, window, causal=causal)
