"""A method that grows whose levels a test names, and what each of them answers by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import LogitsProcessorList

import vtprune
from tests.models import make
from vtprune.hooks.growing import FirstToken
from vtprune.method.growth import Growth
from vtprune.method.pruner import Pruner
from vtprune.method.registry import create
from vtprune.method.stages import Growing

LEVELS, TOKENS = (0.3, 0.5, 1.0), 4
GREEDY = {"max_new_tokens": TOKENS, "do_sample": False, "num_beams": 1}


@dataclass(frozen=True)
class Given(Growing):
    """A growing method whose levels and threshold are those of a test."""

    method: str | Pruner = "grid"
    threshold: float = 0.0
    score: str = "probability"
    origin: Any = None
    levels: tuple[int | float, ...] = LEVELS
    fixed: int | float = LEVELS[1]
    default_keep = None
    info = vtprune.PrunerInfo("given", stage="generation")

    @property
    def inner(self) -> Pruner:
        """The method that runs, at the level of forwards that no `generate` makes."""
        return replace(create(self.method) if isinstance(self.method, str) else self.method, keep=self.fixed)

    def growth(self) -> Growth:
        return Growth(
            self.inner, self.levels, threshold=self.threshold, score=self.score, fixed=self.fixed, origin=self.origin
        )

    def at(self, folder: Path) -> Given:
        return self


def between(kind: str, inputs: Mapping[str, Tensor], method: str, score: str = "probability") -> float:
    """A threshold that about half of the rows pass at the first level."""
    first = FirstToken()
    with vtprune.wrapped(make(kind), method, keep=LEVELS[0]) as model:
        model.generate(**inputs, **GREEDY, logits_processor=LogitsProcessorList([first]))
    found = sorted(getattr(first, score).tolist())
    return (found[len(found) // 2 - 1] + found[len(found) // 2]) / 2


def alone(kind: str, inputs: Mapping[str, Tensor], method: str) -> dict[int | float, tuple[Tensor, vtprune.Report]]:
    """What each level answers by itself."""
    found: dict[int | float, tuple[Tensor, vtprune.Report]] = {}
    for level in LEVELS:
        with vtprune.wrapped(make(kind), method, keep=level) as model:
            found[level] = model.generate(**inputs, **GREEDY), vtprune.report(model)
    return found


def assert_as_alone(
    answers: Tensor,
    report: vtprune.Report,
    known: Mapping[int | float, tuple[Tensor, vtprune.Report]],
    *,
    shared: bool,
) -> None:
    """Each row is answered, and counted, as the level that answered it is alone, and pays for all that it tried;
    shared: whether the encoder runs once."""
    for row, sample in enumerate(report.samples):
        ids, level = known[sample.attempts[-1]]
        own = level.samples[row]
        assert answers[row, : ids.shape[1]].tolist() == ids[row].tolist()
        assert [image.kept_per_layer for image in sample.images] == [image.kept_per_layer for image in own.images]
        assert (sample.kv_bytes_prefill, sample.kv_bytes) == (own.kv_bytes_prefill, own.kv_bytes)
        tried = [known[one][1].samples[row] for one in sample.attempts]
        again = sum(one.encoder_flops for one in tried[1:]) if shared else 0
        assert sample.flops == sum(one.flops for one in tried) - again
