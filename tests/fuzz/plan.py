"""A report, read as masks over the places of a prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import vtprune
from tests.fuzz.prompts import Prompt


@dataclass
class Flow:
    """Before a decoder layer the vectors at places `members` of a row flow into place `into`, times `weights`."""

    row: int
    into: int
    members: Tensor
    weights: Tensor


@dataclass
class Plan:
    """kept, cached: (layers, B, L) the places that each layer computes in the prefill, and that its cache holds after
    it, by the report; flows: what merges before each layer, in order; vision: (B, L) the places of images."""

    kept: Tensor
    cached: Tensor
    flows: list[list[Flow]]
    vision: Tensor

    @property
    def skipped(self) -> Tensor:
        """(layers, B, L) what a layer does not compute and a later one does, or reads: it skips this layer."""
        later = torch.zeros_like(self.kept)
        for layer in reversed(range(len(later) - 1)):
            later[layer] = later[layer + 1] | self.kept[layer + 1]
        return (later | self.cached) & ~self.kept


def plan_of(prompt: Prompt, report: vtprune.Report) -> Plan:
    """The plan of the prefill that a report is about."""
    real = prompt.real[:, : prompt.length]
    depth = len(report.tokens_per_layer)
    vision = torch.zeros_like(real)
    kept, cached = (real.expand(depth, -1, -1).clone() for _ in range(2))
    flows: list[list[Flow]] = [[] for _ in range(depth)]
    for row, (sample, places) in enumerate(zip(report.samples, prompt.images, strict=True)):
        for image, own in zip(sample.images, places, strict=True):
            vision[row, own] = True
            for table, tokens in ((kept, image.kept_per_layer), (cached, image.cached_per_layer)):
                table[:, row, own] = False
                for layer in range(depth):
                    table[layer, row, own[tokens[layer]]] = True
            for merge in image.merged:
                if merge.stage == "decoder":
                    weights = torch.tensor(merge.weights, dtype=torch.float64)
                    flows[merge.layer].append(Flow(row, int(own[merge.into]), own[merge.members], weights))
    return Plan(kept, cached, flows, vision)


def heads_of(prompt: Prompt, report: vtprune.Report, plan: Plan, key_heads: int) -> Tensor:
    """(layers, B, Hkv, L) the places of the prompt that each head of a cache holds, where heads were cut apart."""
    held = plan.cached[:, :, None].expand(-1, -1, key_heads, -1).clone()
    for row, (sample, places) in enumerate(zip(report.samples, prompt.images, strict=True)):
        for image, own in zip(sample.images, places, strict=True):
            for layer, heads in enumerate(image.cached_per_head):
                for head, tokens in enumerate(heads):
                    held[layer, row, head, own] = False
                    held[layer, row, head, own[tokens]] = True
    return held
