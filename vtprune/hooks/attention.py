"""Planned decoder layers: vision goes through fewer heads, a window of neighbours, or fewer channels of the MLP.

A plan may say which heads these are, or only how many: then the layers before it are listened to, and the method ranks
the heads of each row by what they put out there.
"""

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
from vtprune.decoder.heads import Listening
from vtprune.decoder.prompt import ImageSpan
from vtprune.decoder.run import DecoderRun
from vtprune.errors import UnsupportedModelError, VTPruneError
from vtprune.hooks.state import PLAN, ThreadState
from vtprune.method.answers import VisionPlan
from vtprune.method.plan import Plans
from vtprune.method.pruner import Pruner
from vtprune.method.stages import InAttention
from vtprune.tensors.apart import (
    Apart,
    HeadsApart,
    columns_of,
    fixed_heads,
    heads_of,
    mask_rows,
    neighbours,
    rows_of,
    windowed_attention,
    with_heads,
)
from vtprune.tensors.attention import full_precision
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
    """What a layer under way does with vision, and where that stands.

    heads: those that a `count` of the plan is about; listening: who is told what its heads put out; tapped: whether a
    method reads its queries, keys and values.
    """

    plan: VisionPlan
    apart: Apart
    windows: tuple[Window, ...] = ()
    heads: HeadsApart | None = None
    listening: Listening | None = None
    tapped: bool = False


class PlannedLayers:
    """The hooks' work for the one method of a list that plans layers, if there is one; tapped: the layers whose
    projections methods read.

    Raises UnsupportedModelError where the model's attention or MLP cannot be taken apart, by the method's name.
    """

    def __init__(
        self,
        adapter: Adapter,
        pruners: Sequence[Pruner],
        plans: Plans,
        *,
        tapped: frozenset[int],
        state: ThreadState,
    ) -> None:
        found = [
            (order, one) for order, one in enumerate(pruners) if isinstance(one, InAttention) and one.planned_layers()
        ]
        self.pruner: InAttention | None = found[0][1] if found else None
        self._order, self._plans = found[0][0] if found else -1, plans
        own = self.pruner
        self.plans = {} if own is None else {layer: own.vision_plan(layer) for layer in own.planned_layers()}
        self.watched = frozenset(own.watched_layers() if own else ())
        self.layers = self.watched | self.plans.keys()
        self._adapter, self._state, self._tapped = adapter, state, tapped
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
                f"{found}; adapters are merged into the weights first (PEFT: merge_and_unload)"
            )

    def at(self, run: DecoderRun, index: int) -> Planned | None:
        """What layer `index` is told in a forward that brings images, None where it computes none of their tokens."""
        if index not in self.layers:
            return None
        kept = [self._computed(span, index) for span in run.spans]
        if not any(kept):
            return None
        plan = self.plans.get(index)
        if plan is None:
            plan = VisionPlan()
        else:
            # What replaced a projection since (PEFT's adapters) would be passed over.
            assert self.pruner is not None
            self._check(self.pruner.name, self._modules[index], plan)
        windows = self._windows(run, plan, index, kept) if plan.window is not None else ()
        if not windows:
            plan = replace(plan, window=None)
        heads = None if plan.count is None else self._narrowed(run, plan.count)
        listening = self._listening(run, index) if index in self.watched else None
        return Planned(plan, run.apart(kept), windows, heads, listening=listening, tapped=index in self._tapped)

    def _narrowed(self, run: DecoderRun, count: int) -> HeadsApart | None:
        """The heads that read vision in each row of a forward, so many of those that did in the layer before."""
        assert self.pruner is not None
        cascade = run.cascade
        if cascade.left is None or count < cascade.left.reading.shape[1]:
            device = cascade.given[-1].device
            with full_precision(device), run.checks.collecting():
                scores = self.pruner.rank_heads(torch.stack([one.to(device) for one in cascade.given]))
            cascade.narrow(scores, count)
        return cascade.left

    def _listening(self, run: DecoderRun, index: int) -> Listening:
        """Who is told what a layer's heads put out for the prompt of each row."""
        assert self.pruner is not None
        if run.prompt.conversations.most > 1:
            raise VTPruneError(
                f"{self.pruner.name} ranks the heads of a row by its prompt, and one row holds several conversations "
                "here; give each of them a row of its own"
            )
        sizes, given = self._adapter.decoder_sizes, run.given.places
        first, last = run.ends([span.layers[index].numel() for span in run.spans], packed=given is not None)
        device = run.prompt.device
        start, end = (torch.tensor([row[0] for row in ends], device=device)[:, None] for ends in (first, last))
        column = torch.arange(run.prompt.length if given is None else given.shape[1], device=device)
        return Listening(run.cascade, (column >= start) & (column <= end), sizes.kv_heads, sizes.head_size)

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
        if planned is not None and planned.plan.attends:
            attending = Attending(self._adapter, self._modules[index], planned)
            found = attending.forward(index, *args, **kwargs)
            if planned.tapped:
                self._state.show_taps(attending.taps)
            return found, None
        if planned is None or planned.listening is None:
            return forward(*args, **kwargs)
        self._state.listening = planned.listening
        try:
            output = forward(*args, **kwargs)
            heard = self._state.listening is None
        finally:
            self._state.listening = None
        if not heard:
            raise VTPruneError(
                f"decoder layer {index} ran without the hook on its output projection that a method reads its heads "
                "by; wrap the model again after modules of it were replaced"
            )
        return output

    def before_output(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Tells who listens what the heads of a layer put out."""
        listening, self._state.listening = self._state.listening, None
        if listening is not None:
            listening.whole(args[0])

    def mlp_forward(self, module: Any, forward: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
        """The forward of a planned layer's MLP: vision goes through its first channels alone."""
        planned: Planned | None = self._state.planned
        self._state.planned = None
        if planned is None or planned.plan.mlp is None:
            return forward(states)
        text, vision = planned.apart.split(states)
        return planned.apart.join(forward(text), first_channels(module, vision, planned.plan.mlp))


class Attending:
    """The attention of one layer whose vision tokens have fewer heads, or windows; taps: what its projections put out
    of the heads that read vision, as methods read it."""

    def __init__(self, adapter: Adapter, layer: Any, planned: Planned) -> None:
        sizes = adapter.decoder_sizes
        self._planned, self._apart, self._scale = planned, planned.apart, adapter.decoder_scale
        self._module: Any = adapter.decoder_attention(layer)
        self._projections = adapter.decoder_projections(layer).modules()
        self._norms, self._output = adapter.decoder_norms(layer).modules(), adapter.decoder_output(layer)
        self._heads, self._kv_heads, self._size = sizes.heads, sizes.kv_heads, sizes.head_size
        self.taps: dict[str, Tensor] = {}

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
        heads = self._reading(hidden_states.device)
        share = self._heads // self._kv_heads
        query, value = self._projections["q"], self._projections["v"]
        asked, answered = (heads.part_of("reading", width) for width in (share * self._size, self._size))
        with loaded(query), loaded(value):
            queries = self._normed("q", rows_of(vision, query.weight, query.bias, asked))
            values = rows_of(vision, value.weight, value.bias, answered)
        words, spoken = self._normed("q", query(text)), self._split(value(text))
        # Keys without values: what text gives vision in the other heads finds nothing there.
        silent = spoken.new_zeros(*vision.shape[:2], *spoken.shape[2:])
        held = self._apart.join(spoken, with_heads(silent, heads.reading, self._split(values)))
        keys = self._normed("k", self._projections["k"](hidden_states))
        if self._planned.tapped:
            own = heads_of(words.transpose(1, 2), heads.part_of("reading", share)).transpose(1, 2)
            self.taps = {"q": self._apart.join(own, queries)}
            for name, states in (("k", keys), ("v", held)):
                self.taps[name] = heads_of(states.transpose(1, 2), heads.reading).transpose(1, 2)
        turn = tuple(part.expand(len(hidden_states), *part.shape[1:]) for part in position_embeddings)
        words = _turned(words, [gather_tokens(part, self._apart.text) for part in turn])
        queries = _turned(queries, [gather_tokens(part, self._apart.vision) for part in turn])
        keys, held = _turned(keys, turn), held.transpose(1, 2)
        cache = cache_in(kwargs)
        if cache is not None:
            keys, held = cache.update(keys, held, index)
        found, seen = self._found(words, queries, (keys, held), attention_mask, heads=heads)
        if self._planned.listening is not None:
            self._planned.listening.in_parts(self._apart, found, seen, heads.reading)
        output = self._output
        with loaded(output):
            looked = columns_of(seen.flatten(2), output.weight, output.bias, asked)
        return self._apart.join(output(found.flatten(2)), looked)

    def _reading(self, device: torch.device) -> HeadsApart:
        """The key-value heads that read vision, and the others."""
        chosen, plan = self._planned.heads, self._planned.plan
        if chosen is None:
            fixed = tuple(range(self._kv_heads)) if plan.heads is None else plan.heads
            return fixed_heads(fixed, self._kv_heads, device)
        if chosen.reading.device == device:
            return chosen
        return HeadsApart(chosen.reading.to(device), chosen.cut.to(device))

    def _found(
        self,
        words: Tensor,
        queries: Tensor,
        held: tuple[Tensor, Tensor],
        mask: Tensor | None,
        *,
        heads: HeadsApart,
    ) -> tuple[Tensor, Tensor]:
        """(B, t, H, d) what text finds, (B, v, h, d) what vision finds; words, queries: (B, H, t, d) and (B, h, v, d)
        theirs; held: keys and values (B, Hkv, k, d) of all."""
        apart, length, share = self._apart, self._apart.order.shape[1], self._heads // self._kv_heads
        asking, reads, cuts = heads.part_of("reading", share), heads.reading.shape[1], heads.cut.shape[1]
        own = tuple(heads_of(part, heads.reading) for part in held) if cuts else held
        found = words.new_zeros(words.shape[0], words.shape[2], self._heads, self._size)
        needs_rows = cuts or self._planned.windows
        rows = mask_rows(mask, apart.text, queries=length, keys=held[0].shape[2]) if needs_rows else None
        seen = queries.transpose(1, 2)
        if self._planned.windows:
            seen = self._windowed(queries, own, mask)
        if self._planned.windows and reads:
            found = with_heads(found, asking, self._attended(heads_of(words, asking), own, rows))
        elif reads:
            both = apart.join(heads_of(words, asking).transpose(1, 2), seen).transpose(1, 2)
            spoken, seen = apart.split(self._attended(both, own, mask))
            found = with_heads(found, asking, spoken)
        if cuts:
            mute, others = heads.part_of("cut", share), tuple(heads_of(part, heads.cut) for part in held)
            found = with_heads(found, mute, self._attended(heads_of(words, mute), others, rows))
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

    def _normed(self, tap: str, states: Tensor) -> Tensor:
        """(B, n, heads, d) queries or keys, normed where the model norms them."""
        heads, norm = self._split(states), self._norms.get(tap)
        return heads if norm is None else norm(heads)


def _turned(states: Tensor, turn: Sequence[Tensor]) -> Tensor:
    """(B, heads, n, d) of queries or keys (B, n, heads, d), with rotary embedding."""
    cos, sin = (part.unsqueeze(1) for part in turn)
    return rotate(states.transpose(1, 2), cos, sin)


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
