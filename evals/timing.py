"""Prefill time with and without pruning, measured in alternation on the same inputs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

import vtprune
from vtprune.pruner import Pruner

from .generation import synchronise
from .prompts import place

ROUNDS = 4


@torch.inference_mode()
def prefill_seconds(model: Any, inputs: Sequence[Any]) -> list[float]:
    """Seconds of one forward pass over each prompt, to the logits of its last token."""
    seconds = []
    for one in inputs:
        synchronise(model.device)
        start = time.perf_counter()
        model(**one, use_cache=True, logits_to_keep=1)
        synchronise(model.device)
        seconds.append(time.perf_counter() - start)
    return seconds


def measure_prefill(
    model: Any, inputs: Sequence[Any], pruners: Mapping[str, Pruner | None], rounds: int = ROUNDS
) -> dict[str, float]:
    """Median milliseconds at batch 1 under each pruner; None is the model as it came, unwrapped.

    The pruners take turns within each round: what slows the machine down for a while slows all of them.
    """
    placed = [place(one, model) for one in inputs]
    times: dict[str, list[float]] = {name: [] for name in pruners}
    for turn in range(rounds + 1):
        for name, pruner in pruners.items():
            with nullcontext() if pruner is None else vtprune.wrapped(model, pruner):
                measured = prefill_seconds(model, placed if turn else placed[:1])
            if turn:  # turn 0 only warms up
                times[name] += measured
    return {name: 1000 * statistics.median(values) for name, values in times.items()}
