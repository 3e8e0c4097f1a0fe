"""The unwrapped model with what the report names as dropped masked out of attention, layer by layer, on a cache that
holds everything."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from tests.fuzz.architectures import Architecture
from tests.fuzz.gates import Gates
from tests.fuzz.plan import Plan
from tests.fuzz.prompts import STEPS, Prompt, is_vision
from tests.models import PAST


def positions_of(shape: Architecture, model: Any, prompt: Prompt) -> Tensor:
    """(B, L + STEPS), or (3, B, L + STEPS) where a model has three axes, of the unpruned prompt and its steps."""
    if not shape.is_qwen:
        return prompt.positions
    ids = prompt.inputs["input_ids"]
    sizes = {name: prompt.inputs.get(name) for name in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")}
    if sizes["image_grid_thw"] is None and sizes["video_grid_thw"] is None:
        # Where no row has an image, the model numbers all places, padding included.
        return torch.arange(prompt.length + STEPS).expand(3, len(ids), -1)
    places, deltas = model.model.get_rope_index(
        ids,
        mm_token_type_ids=prompt.inputs["mm_token_type_ids"],
        attention_mask=prompt.real[:, : prompt.length].long(),
        **sizes,
    )
    later = prompt.positions[:, prompt.length :] + deltas
    return torch.cat([places, later.expand(3, -1, -1)], dim=-1)


def embeddings_of(model: Any, prompt: Prompt, features: Tensor | None) -> Tensor:
    """(B, L + STEPS, D) of prompt and steps, features in the places of images."""
    ids = torch.cat([prompt.inputs["input_ids"], prompt.steps], dim=1)
    embeddings: Tensor = model.get_input_embeddings()(ids).clone()
    if features is not None:
        embeddings[is_vision(ids)] = features
    return embeddings


def additive(allowed: Tensor) -> Tensor:
    """A float mask (B, H, q, n) from what may be attended to (the last q of n tokens ask; each sees itself)."""
    queries, length = allowed.shape[-2:]
    itself = torch.ones(queries, length, dtype=torch.bool).tril(length - queries).triu(length - queries)
    return torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~(allowed | itself), float("-inf"))


def flow(states: Tensor, plan: Plan, layer: int) -> Tensor:
    """The layer's input (B, n, D) with what merges before it merged, one after the other: what one stage merged may
    flow on in the next."""
    if not plan.flows[layer]:
        return states
    states = states.clone()
    for one in plan.flows[layer]:
        states[one.row, one.into] = one.weights @ states[one.row, one.members]
    return states


class Masked:
    """One run of a model under masks.

    features: of all images, None for those that the model makes itself; compact: whether each layer numbers what it
    computes without gaps; gates: what routed layers multiply; evict: called with the cache once the first decode step
    is done, answers what the heads of each layer's cache hold from then on, (layers, B, Hkv, L).
    """

    def __init__(
        self,
        shape: Architecture,
        model: Any,
        prompt: Prompt,
        plan: Plan,
        *,
        features: Tensor | None,
        compact: bool = False,
        gates: Gates | None = None,
        evict: Callable[[DynamicCache], Tensor] | None = None,
    ) -> None:
        self.shape, self.model, self.prompt, self.plan = shape, model, prompt, plan
        self.features, self.compact, self.gates, self.evict = features, compact, gates, evict
        self.skipped = plan.skipped
        self.start, self.end = 0, prompt.length
        self.heads: Tensor | None = None
        self.gate: dict[int, Tensor] = {}

    @torch.no_grad()
    def run(self) -> Tensor:
        """Logits (B, L + STEPS, V)."""
        embeddings = embeddings_of(self.model, self.prompt, self.features)
        positions = positions_of(self.shape, self.model, self.prompt)
        cache, logits = DynamicCache(), []
        with self._hooks():
            for step in range(STEPS + 1):
                self.end = self.prompt.length + step
                self.start = self.end - 1 if step else 0
                out = self.model(
                    inputs_embeds=embeddings[:, self.start : self.end],
                    position_ids=positions[..., self.start : self.end],
                    attention_mask=self.prompt.real[:, : self.end].long(),
                    **{PAST: cache},
                    use_cache=True,
                )
                logits.append(out.logits)
                if step == 1 and self.evict is not None:
                    self.heads = self.evict(cache)
        return torch.cat(logits, dim=1)

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        with ExitStack() as stack:
            for index, layer in enumerate(self.model.model.language_model.layers):
                for handle in (
                    layer.register_forward_pre_hook(self._before(index), with_kwargs=True),
                    layer.register_forward_hook(self._after(index), with_kwargs=True),
                    layer.mlp.register_forward_hook(self._mlp(index)),
                ):
                    stack.callback(handle.remove)
            yield

    def _before(self, index: int) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
            states = flow(args[0], self.plan, index) if self.start == 0 else args[0]
            new = {**kwargs, "attention_mask": additive(self._allowed(index))}
            if self.compact:
                numbers = (self._held(index).long().cumsum(dim=1) - 1).clamp(min=0)[:, self.start :]
                new["position_embeddings"] = self.model.model.language_model.rotary_emb(states, numbers)
            if self.gates is not None:
                vision = self.plan.vision if self.start == 0 else torch.zeros(states.shape[:2], dtype=torch.bool)
                gate = self.gates.of(index, module, states, vision)
                self.gate = {} if gate is None else {index: gate}
            return (states, *args[1:]), new

        return hook

    def _held(self, index: int) -> Tensor:
        """(B, n) what the layer attends to: what it computed of the prompt, or read all the same, and every step."""
        cached = self.plan.cached[index]
        held = self.plan.kept[index] | cached if self.start == 0 else cached
        return torch.cat([held, self.prompt.real[:, self.prompt.length : self.end]], dim=1)

    def _allowed(self, index: int) -> Tensor:
        """(B, 1 or H, q, n)."""
        held = self._held(index)[:, None]
        if self.heads is not None:
            heads = self.heads[index].repeat_interleave(self.shape.heads // self.shape.key_heads, dim=1)
            later = held[..., self.prompt.length :].expand(-1, heads.shape[1], -1)
            held = torch.cat([heads, later], dim=-1)
        order = torch.arange(self.end)
        return held[:, :, None] & (order <= order[self.start :, None])

    def _mlp(self, index: int) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> Tensor:
            if self.gates is None or not self.gates.mlp or index not in self.gate:
                return output
            return output * self.gate[index]

        return hook

    def _after(self, index: int) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            gate = self.gate.get(index)
            before = args[0]
            if gate is not None and self.gates is not None and self.gates.branch:
                output = before + gate * (output - before)
            if self.start or not bool(self.skipped[index].any()):
                return output
            passing = before * gate if gate is not None and self.gates is not None and self.gates.skipped else before
            return torch.where(self.skipped[index][..., None], passing, output)

        return hook
