"""The unwrapped model in one pass over prompt and steps, where tokens that were left out may return: each query sees
what its layer had computed by then."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import vtprune
from tests.fuzz.architectures import Architecture
from tests.fuzz.plan import Plan
from tests.fuzz.prompts import STEPS, Prompt
from tests.fuzz.reference import additive, embeddings_of, flow, positions_of

# The forward that computed what never was.
NEVER = 10**6


def allowed_by_layer(prompt: Prompt, report: vtprune.Report, plan: Plan) -> Tensor:
    """(layers, B, n, n) what each token of prompt and steps attends to. report: the one after the last step.

    Raises AssertionError where a layer computes a token twice, or attends to one that it has not computed.
    """
    depth, length = len(plan.kept), prompt.length
    total = length + STEPS
    order = torch.arange(total)
    # The forward in which a layer computed each token: 0 for the prefill.
    when = torch.full((depth, *prompt.real.shape), NEVER)
    when[:, :, :length][plan.kept] = 0
    when[:, :, length:] = torch.arange(1, STEPS + 1)
    # What each step attends to: text, and what the report says.
    chosen = (prompt.words & prompt.real)[None, :, None].expand(depth, -1, STEPS, -1).clone()
    for row, (sample, places) in enumerate(zip(report.samples, prompt.images, strict=True)):
        for image, own in zip(sample.images, places, strict=True):
            assert len(image.steps) in (0, STEPS), "the report has a step for each forward on the cache"
            if not image.steps:
                # Nothing was left out that might return: each step attends to all that the prefill computed.
                for layer, kept in enumerate(image.kept_per_layer):
                    assert kept == image.kept_per_layer[0], "what was left out has steps"
                    chosen[layer, row, :, own[kept]] = True
            for number, step in enumerate(image.steps):
                for layer in range(depth):
                    new = own[step.computed_per_layer[layer]]
                    assert bool((when[layer, row, new] == NEVER).all()), "a layer computed a token twice"
                    when[layer, row, new] = number + 1
                    seen = own[step.attended_per_layer[layer]]
                    assert bool((when[layer, row, seen] <= number + 1).all()), "attended to what was not computed"
                    chosen[layer, row, number, seen] = True
    real = prompt.real[None, :, None]
    allowed = (when[..., None, :] <= when[..., None]) & (when[..., None] < NEVER) & real
    allowed[:, :, length:] = chosen
    return allowed & (order <= order[:, None])


@torch.no_grad()
def run_returning(
    shape: Architecture,
    model: Any,
    prompt: Prompt,
    report: vtprune.Report,
    plan: Plan,
    *,
    features: Tensor | None,
) -> Tensor:
    """Logits (B, L + STEPS, V)."""
    allowed = allowed_by_layer(prompt, report, plan)
    handles = []

    def before(index: int) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
            states = flow(args[0], plan, index)
            return (states, *args[1:]), {**kwargs, "attention_mask": additive(allowed[index][:, None])}

        return hook

    try:
        for index, layer in enumerate(model.model.language_model.layers):
            handles.append(layer.register_forward_pre_hook(before(index), with_kwargs=True))
        logits: Tensor = model(
            inputs_embeds=embeddings_of(model, prompt, features),
            position_ids=positions_of(shape, model, prompt),
            attention_mask=prompt.real.long(),
            use_cache=False,
        ).logits
    finally:
        for handle in handles:
            handle.remove()
    return logits
