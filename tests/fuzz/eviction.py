"""D2O's cut of a full cache, redone from the report: who is held by each head, and what the others flow into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import DynamicCache

import vtprune
from tests.fuzz.plan import Plan
from tests.fuzz.prompts import Prompt


def evictor(
    prompt: Prompt, plan: Plan, held: Tensor, rule: vtprune.D2O
) -> Callable[[DynamicCache], Tensor]:
    """For `Masked.evict`; held: (layers, B, Hkv, L), from the report."""

    def evict(cache: DynamicCache) -> Tensor:
        if rule.merge:
            for index, layer in enumerate(cache.layers):
                for row, places in enumerate(prompt.images):
                    for own in places:
                        _merge(layer, row, own[plan.cached[index, row, own]], held[index, row], rule)
        return held

    return evict


def _merge(layer: Any, row: int, own: Tensor, held: Tensor, rule: vtprune.D2O) -> None:
    """Evicted entries of one image in one layer flow into the nearest kept ones of their head, if near enough.

    own: the places of the image's entries before the cut; held: (Hkv, L).
    """
    stays = held[:, own]
    if bool(stays.all()):
        return
    keys, values = layer.keys[row], layer.values[row]
    alike, nearest = [], []
    for head, stay in enumerate(stays):
        directions = normalize(keys[head, own], dim=-1)
        best = (directions[~stay] @ directions[stay].T).max(dim=1)
        alike.append(best.values)
        nearest.append(own[stay][best.indices])
    threshold = torch.cat(alike).mean()
    for head, stay in enumerate(stays):
        # The released code lets the mean of what each head evicts next decide for all of them.
        decisive = torch.stack(alike).mean(dim=0) if rule.variant == "released" else alike[head]
        evicted = own[~stay]
        for target in nearest[head].unique():
            coming = (nearest[head] == target) & (decisive >= threshold - 1e-9)
            weights = alike[head][coming]
            for states in (keys, values):
                arriving = weights @ states[head, evicted[coming]]
                states[head, target] = (states[head, target] + arriving) / (1 + int(coming.sum()))
