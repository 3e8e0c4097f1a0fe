"""What a search measures: how little pruning moves the state from which the answer's first token is read."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import vtprune
from vtprune.adapters import adapter_for
from vtprune.errors import InputError, VTPruneError
from vtprune.evals.lmms.efficiency import row_costs
from vtprune.evals.samples import Sample
from vtprune.loading.media import size_text
from vtprune.loading.prompts import (
    check_text,
    encode_named,
    place,
    question,
)
from vtprune.method.pruner import Pruner


@dataclass(frozen=True)
class Measured:
    """One setting on one set of samples.

    cosines: of each sample's state with its unpruned one (fp32); kept, tokens: vision tokens a sample, as the
    method counts them, and before pruning; flops, flops_full: of all prefills together.
    """

    cosines: list[float]
    kept: float
    tokens: float
    flops: int
    flops_full: int

    @property
    def objective(self) -> float:
        """The mean cosine; NaN if one is."""
        return statistics.fmean(self.cosines)

    @property
    def flops_share(self) -> float:
        """FLOPs of the prefills over those without pruning."""
        return self.flops / self.flops_full


class Meter:
    """A loaded model and encoded samples. Raises InputError for a sample that the processor refuses."""

    def __init__(self, model: Any, processor: Any, samples: Sequence[Sample], batch_size: int) -> None:
        self.model, self.samples = model, list(samples)
        self._inner = adapter_for(model).inner
        for sample in samples:
            check_text(processor, sample.question, f"data: {sample.name}")
        chats = [question(sample.media, sample.question) for sample in samples]
        parts = range(0, len(chats), batch_size)
        self._batches = []
        for start in parts:
            batch = slice(start, start + batch_size)
            self._batches.append(encode_named(processor, chats[batch], partial(_refused, self.samples[batch])))

    def states(self, on_batch: Callable[[int], None] = lambda count: None) -> Tensor:
        """The final hidden state of each sample's last prompt token, of the model as it is: (S, D) fp32, CPU."""
        found = []
        for batch in self._batches:
            found.append(self._forward(batch))
            on_batch(len(found[-1]))
        return torch.cat(found)

    def measure(self, pruner: Pruner, unpruned: Tensor) -> Measured:
        """The samples under a pruner against their states without one: (S, D) fp32.

        Raises VTPruneError for a setting that the model cannot meet.
        """
        states, costs, flops, full = [], [], 0, 0
        with vtprune.wrapped(self.model, pruner):
            for batch in self._batches:
                states.append(self._forward(batch))
                report = vtprune.report(self.model)
                costs += row_costs(report, 0.0)
                reason = next((cost.kept_whole for cost in costs if cost.kept_whole), "")
                if reason:
                    # Staying near the unpruned model is no merit of a setting that prunes nothing.
                    raise VTPruneError(reason)
                flops, full = flops + report.flops, full + report.flops_full
        cosines = torch.cosine_similarity(torch.cat(states), unpruned, dim=-1)
        return Measured(
            cosines.tolist(),
            kept=statistics.fmean(cost.kept_tokens for cost in costs),
            tokens=statistics.fmean(cost.visual_tokens for cost in costs),
            flops=flops,
            flops_full=full,
        )

    def largest_image(self) -> int:
        """Vision tokens of the largest image or video."""
        sizes: list[int] = []
        with vtprune.wrapped(self.model, vtprune.NoPruning()):
            for batch in self._batches:
                self._forward(batch)
                samples = vtprune.report(self.model).samples
                sizes += [image.tokens for sample in samples for image in sample.images]
        return max(sizes)

    @torch.inference_mode()
    def _forward(self, batch: Any) -> Tensor:
        inputs = place(batch, self.model)
        # The inner model's own output, final norm included: no logits, no captured layers, no cache.
        hidden = self._inner(**inputs, use_cache=False).last_hidden_state
        mask = inputs["attention_mask"].to(hidden.device)
        last = mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)
        states: Tensor = hidden[torch.arange(len(last), device=hidden.device), last]
        return states.float().cpu()


def _refused(samples: Sequence[Sample], place: int | None, reason: str) -> InputError:
    if place is None:
        return InputError(f"data: a batch cannot be encoded: {reason}")
    sample = samples[place]
    return InputError(f"data: the processor refuses {sample.name} ({size_text(sample.media)}): {reason}")
