"""Feeding a prompt and its decode steps to a model, token by token, on a cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import vtprune
from tests.fuzz.architectures import IMAGE, VIDEO, Architecture
from tests.fuzz.prompts import STEPS, Prompt, is_vision
from tests.models import PAST


@dataclass
class Run:
    """logits: (B, L + STEPS, V); prefill: the report after the prompt, None of an unwrapped model; steps: after each
    token that followed."""

    logits: Tensor
    cache: Any
    prefill: vtprune.Report | None = None
    steps: tuple[vtprune.Report, ...] = ()


@torch.no_grad()
def run(shape: Architecture, model: Any, prompt: Prompt, *, wrapped: bool, positions: Tensor | None = None) -> Run:
    """Runs the prompt as a user would: text positions for LLaVA, whose `forward` knows nothing of padding, none for
    Qwen; an attention mask where the prompt has one. positions: others, (..., B, L + STEPS)."""
    if positions is None and not shape.is_qwen:
        positions = prompt.positions
    cache, logits, reports = DynamicCache(), [], []
    inputs: dict[str, Tensor] = dict(prompt.inputs)
    for step in range(STEPS + 1):
        end = prompt.length + step
        start = end - 1 if step else 0
        if step:
            inputs = {"input_ids": prompt.steps[:, step - 1 : step]}
        if "attention_mask" in prompt.inputs:
            inputs["attention_mask"] = prompt.real[:, :end].long()
        if positions is not None:
            inputs["position_ids"] = positions[..., start:end]
        logits.append(model(**inputs, **{PAST: cache}, use_cache=True).logits)
        if wrapped:
            reports.append(vtprune.report(model))
    if not wrapped:
        return Run(torch.cat(logits, dim=1), cache)
    return Run(torch.cat(logits, dim=1), cache, reports[0], tuple(reports[1:]))


@torch.no_grad()
def image_features(model: Any, prompt: Prompt) -> Tensor | None:
    """(vision tokens, D) what a model's vision side makes of images and videos, in the order of their placeholders;
    None where there are none."""
    ids = prompt.inputs["input_ids"]
    found = {}
    for kind, token, pixels in (("image", IMAGE, "pixel_values"), ("video", VIDEO, "pixel_values_videos")):
        if pixels in prompt.inputs:
            grids = {name: prompt.inputs[name] for name in (f"{kind}_grid_thw",) if name in prompt.inputs}
            encode = getattr(model.model, f"get_{kind}_features")
            found[token] = torch.cat(list(encode(prompt.inputs[pixels], **grids).pooler_output))
    if not found:
        return None
    whole = ids.new_zeros(*ids.shape, next(iter(found.values())).shape[-1], dtype=torch.float64)
    for token, features in found.items():
        whole[ids == token] = features
    return whole[is_vision(ids)]
