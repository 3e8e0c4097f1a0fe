"""gamma-MoD by hand: every token through every layer, in one pass over the prompt and its decode steps.

Nothing here uses vtprune's own routing, packing or caches: p is computed from the router's weights, what a layer does
not compute is masked out of it and put back as it was, and the MLP's output is multiplied by p.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.models import IMAGE
from tests.oracle import STEPS, _mask, embeddings_of, full_mask, next_tokens, planes_of, positions_of

# From p (B, L + STEPS), the ids, and which of them are no padding, to what a layer computes.
Rule = Callable[[Tensor, Tensor, Tensor], Tensor]


def best_of_each_image(count: Callable[[int], int]) -> Rule:
    """All text, and of each image (a run of placeholders) the `count` tokens with the highest p."""

    def rule(p: Tensor, ids: Tensor, real: Tensor) -> Tensor:
        kept = real.clone()
        for row in range(len(ids)):
            for places in runs(ids[row]):
                order = sorted(places, key=lambda place: (-float(p[row, place]), place))
                kept[row, order[count(len(places)) :]] = False
        return kept

    return rule


def above(prompt: float, step: float) -> Rule:
    """Every token of the prompt whose p is above `prompt`, every later one whose p is at least `step`."""

    def rule(p: Tensor, ids: Tensor, real: Tensor) -> Tensor:
        later = torch.arange(ids.shape[1]) >= ids.shape[1] - STEPS
        return real & torch.where(later, p >= step, p > prompt)

    return rule


def runs(ids: Tensor) -> list[list[int]]:
    """The places of each unbroken run of image placeholders."""
    found: list[list[int]] = []
    for place in (ids == IMAGE).nonzero().flatten().tolist():
        if found and found[-1][-1] == place - 1:
            found[-1].append(place)
        else:
            found.append([place])
    return found


@torch.no_grad()
def run_slow(
    kind: str,
    model: Any,
    inputs: dict[str, Tensor],
    weight: Tensor,
    layers: tuple[int, ...],
    rule: Rule,
    *,
    compact: bool = False,
) -> tuple[Tensor, dict[int, Tensor]]:
    """Logits (B, L + STEPS, V) of the unwrapped model with these layers routed, and what each of them computed.

    weight: (2, D) of the router. compact: whether each layer numbers what it computes without gaps.
    """
    ids = torch.cat([inputs["input_ids"], next_tokens(inputs["input_ids"].shape[0])], dim=1)
    embeds, decoder = embeddings_of(model, inputs, ids, None), model.model.language_model
    real = full_mask(inputs, STEPS).bool()
    found: dict[int, Tensor] = {}
    gates: dict[int, Tensor] = {}
    handles = []

    def before(index: int) -> Any:
        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            kept = real
            if index in layers:
                logits = module.input_layernorm(args[0]).float() @ weight.float().T
                gates[index] = logits.exp()[..., 1] / logits.exp().sum(dim=-1)
                kept = found[index] = rule(gates[index], ids, real)
            new = {**kwargs, "attention_mask": _mask(kept)}
            if compact:
                new["position_embeddings"] = decoder.rotary_emb(embeds, (kept.cumsum(dim=1) - 1).clamp(min=0))
            return args, new

        return hook

    def after(index: int) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> Tensor:
            return torch.where(found[index][..., None], output, args[0])

        return hook

    def gate(index: int) -> Any:
        return lambda module, args, output: output * gates[index][..., None]

    for index, layer in enumerate(decoder.layers):
        handles.append(layer.register_forward_pre_hook(before(index), with_kwargs=True))
        if index in layers:
            handles += [layer.register_forward_hook(after(index)), layer.mlp.register_forward_hook(gate(index))]
    try:
        positions = positions_of(kind, model, inputs, ids.shape[1])
        out = decoder(inputs_embeds=embeds, position_ids=positions, use_cache=False, **planes_of(model, inputs, ids))
    finally:
        for handle in handles:
            handle.remove()
    return model.lm_head(out.last_hidden_state), found
