"""D2O's cut of a full cache, redone from the report: who is held by each head, and what the others flow into."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import DynamicCache

import vtprune
from tests.fuzz.plan import Plan
from tests.fuzz.prompts import Prompt

# Cosines nearer to each other than this may be in another order in fp32.
TIE = 1e-6


class Cut:
    """For `Masked.evict`. held: (layers, B, Hkv, L), from the report; tied: whether, once done, two cosines that
    decide were too near to each other to say what flows into what."""

    def __init__(self, prompt: Prompt, plan: Plan, held: Tensor, rule: vtprune.D2O) -> None:
        self._prompt, self._plan, self._held, self._rule = prompt, plan, held, rule
        self.tied = False

    def __call__(self, cache: DynamicCache) -> Tensor:
        """What the heads hold from now on; what leaves flows into it, in the cache."""
        if self._rule.merge:
            for index, layer in enumerate(cache.layers):
                for row, places in enumerate(self._prompt.images):
                    for own in places:
                        self._merge(layer, row, own[self._plan.cached[index, row, own]], self._held[index, row])
        return self._held

    def _merge(self, layer: Any, row: int, own: Tensor, held: Tensor) -> None:
        """Evicted entries of one image in one layer flow into the nearest kept ones of their head, if near enough.

        own: the places of the image's entries before the cut; held: (Hkv, L).
        """
        stays = held[:, own]
        if bool(stays.all()):
            return
        alike, nearest = [], []
        for head, stay in enumerate(stays):
            directions = normalize(layer.keys[row, head, own], dim=-1)
            best = (directions[~stay] @ directions[stay].T).topk(min(2, int(stay.sum())), dim=1)
            self.tied |= bool((best.values[:, :1] - best.values[:, 1:] < TIE).any())
            alike.append(best.values[:, 0])
            nearest.append(own[stay][best.indices[:, 0]])
        threshold = torch.cat(alike).mean()
        for head, stay in enumerate(stays):
            # The released code lets the mean of what each head evicts next decide for all of them.
            decisive = torch.stack(alike).mean(dim=0) if self._rule.variant == "released" else alike[head]
            # A single one is its own mean.
            self.tied |= decisive.numel() > 1 and bool(((decisive - threshold).abs() < TIE).any())
            evicted = own[~stay]
            for target in nearest[head].unique():
                coming = (nearest[head] == target) & (decisive >= threshold - TIE)
                weights = alike[head][coming]
                for states in (layer.keys[row, head], layer.values[row, head]):
                    states[target] = (states[target] + weights @ states[evicted[coming]]) / (1 + int(coming.sum()))
