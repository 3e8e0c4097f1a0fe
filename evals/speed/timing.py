"""Prefill time with and without pruning, measured in alternation on the same inputs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

import vtprune
from vtprune.evals.lmms.generation import synchronise
from vtprune.loading.prompts import place
from vtprune.method.resolving import resolve
from vtprune.method.stages import Growing

ROUNDS = 4
# Prompts that are timed in a row before the next method has its turn.
IN_A_ROW = 4


@dataclass(frozen=True)
class PrefillTimes:
    """Milliseconds under each pruner; entry i of every list was measured on the same prompt, shortly after another."""

    milliseconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        """The median under one pruner."""
        return statistics.median(self.milliseconds[name])

    def ratio(self, name: str, base: str) -> float:
        """The median of the ratios of neighbours: what slows the machine down for a while slows both."""
        pairs = zip(self.milliseconds[name], self.milliseconds[base], strict=True)
        return statistics.median(one / other for one, other in pairs)

    def difference(self, name: str, base: str) -> float:
        """The median of the differences of neighbours."""
        pairs = zip(self.milliseconds[name], self.milliseconds[base], strict=True)
        return statistics.median(one - other for one, other in pairs)


@torch.inference_mode()
def prefill_seconds(model: Any, inputs: Any) -> float:
    """Seconds of one forward pass over a prompt, to the logits of its last token."""

    def run() -> None:
        model(**inputs, use_cache=True, logits_to_keep=1)

    return _seconds(model, run)


@torch.inference_mode()
def first_token_seconds(model: Any, inputs: Any) -> float:
    """Seconds to the first token of an answer: of a method that reads a prompt several times, of all its attempts."""

    def run() -> None:
        model.generate(**inputs, max_new_tokens=1, do_sample=False, num_beams=1)

    return _seconds(model, run)


def _seconds(model: Any, run: Callable[[], None]) -> float:
    synchronise(model.device)
    start = time.perf_counter()
    run()
    synchronise(model.device)
    return time.perf_counter() - start


def measure_prefill(
    model: Any, inputs: Sequence[Any], pruners: Mapping[str, Any], rounds: int = ROUNDS
) -> PrefillTimes:
    """Times each prompt at batch 1 under each pruner in turn; None is the model as it came, unwrapped; else what
    `vtprune.wrap` takes. Where one of them grows, all are timed to the first token of `generate`.

    A model is wrapped once and answers many prompts, so what a wrapped model works out only once is not counted: a few
    prompts are timed in a row, after one that is not."""
    grows = any(isinstance(one, Growing) for given in pruners.values() if given is not None for one in resolve(given))
    timed = first_token_seconds if grows else prefill_seconds
    placed = [place(one, model) for one in inputs]
    times: dict[str, list[float]] = {name: [] for name in pruners}
    for _ in range(rounds):
        for first in range(0, len(placed), IN_A_ROW):
            for name, pruner in pruners.items():
                with nullcontext() if pruner is None else vtprune.wrapped(model, pruner):
                    timed(model, placed[first - 1])
                    own = [timed(model, one) for one in placed[first : first + IN_A_ROW]]
                times[name] += [1000 * seconds for seconds in own]
    return PrefillTimes(times)
