"""The record of one `generate` at several levels, whose rows were answered at different ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vtprune.cost.formulas import FlopsBreakdown, cache_bytes
from vtprune.report.generation import Generation
from vtprune.report.report import Report, SampleReport, StepReport


@dataclass(frozen=True)
class Attempt:
    """One level: the rows of the batch that ran at it, and what it left behind."""

    level: int | float
    rows: tuple[int, ...]
    generation: Generation


@dataclass(frozen=True)
class Grown:
    """All attempts of one call, in order; each row was answered by the last one that it takes part in.

    name: of the method that grew; shared: whether all of them used what the encoder made for the first one.
    """

    name: str
    attempts: tuple[Attempt, ...]
    shared: bool

    @property
    def last(self) -> Generation:
        """What the last attempt left behind."""
        return self.attempts[-1].generation

    def build(self) -> Report:
        """The report of the rows in their order: counts and bytes of what answered, FLOPs of all that ran."""
        reports = [attempt.generation.build() for attempt in self.attempts]
        taken = {
            row: (number, place)
            for number, attempt in enumerate(self.attempts)
            for place, row in enumerate(attempt.rows)
        }
        places = [taken[row] for row in sorted(taken)]
        samples = [self._sample(reports, row, at) for row, at in zip(sorted(taken), places, strict=True)]
        images = [image for sample in samples for image in sample.images]
        shares = [image.achieved_tokens / image.tokens for image in images]

        def by_row(of: Callable[[Report], list[list[int]]]) -> list[list[int]]:
            return _by_row([of(report) for report in reports], places)

        kv = by_row(lambda report: report.kv_tokens_per_layer)
        steps = max(report.steps for report in reports)
        return replace(
            reports[-1],
            method=self.name,
            samples=samples,
            tokens_per_layer=by_row(lambda report: report.tokens_per_layer),
            kv_tokens_per_layer=kv,
            steps=steps,
            asked_keep=None,
            achieved_keep=sum(shares) / len(shares) if shares else 1.0,
            kept_tokens=sum(image.achieved_tokens for image in images) / max(1, len(images)),
            flops=sum(sample.flops for sample in samples),
            flops_full=sum(sample.flops_full for sample in samples),
            flops_breakdown=self._breakdown(reports),
            kv_bytes_prefill=sum(sample.kv_bytes_prefill for sample in samples),
            kv_bytes_prefill_full=sum(sample.kv_bytes_prefill_full for sample in samples),
            kv_bytes=sum(sample.kv_bytes for sample in samples),
            kv_bytes_full=sum(sample.kv_bytes_full for sample in samples),
            kv_bytes_allocated=max(report.kv_bytes_allocated for report in reports),
            history=[self._step(reports, places, step) for step in range(steps + 1)],
        )

    def _sample(self, reports: Sequence[Report], row: int, at: tuple[int, int]) -> SampleReport:
        """The row as it was answered, with what all its attempts cost."""
        number, place = at
        own = [
            (report.samples[attempt.rows.index(row)], order)
            for order, (attempt, report) in enumerate(zip(self.attempts, reports, strict=True))
            if row in attempt.rows
        ]
        again = [sample.encoder_flops for sample, order in own if order and self.shared]
        return replace(
            reports[number].samples[place],
            attempts=[attempt.level for attempt in self.attempts if row in attempt.rows],
            flops=sum(sample.flops for sample, _ in own) - sum(again),
            scoring_flops=sum(sample.scoring_flops for sample, _ in own),
            encoder_flops=sum(sample.encoder_flops for sample, _ in own) - sum(again),
        )

    def _breakdown(self, reports: Sequence[Report]) -> FlopsBreakdown:
        parts = [report.flops_breakdown for report in reports]
        shared = parts[:1] if self.shared else parts
        return FlopsBreakdown(
            vision_tower=sum(one.vision_tower for one in shared),
            projector=sum(one.projector for one in shared),
            decoder=sum(one.decoder for one in parts),
            head=sum(one.head for one in parts),
            scoring=sum(one.scoring for one in parts),
        )

    def _step(self, reports: Sequence[Report], places: Sequence[tuple[int, int]], step: int) -> StepReport:
        """A forward of every row, where those that had ended stand as they did."""
        now = [report.history[min(step, len(report.history) - 1)] for report in reports]
        kv = _by_row([one.kv_tokens_per_layer for one in now], places)
        cost, dtype = self.last.cost.decoder, self.last.dtype
        rows = [cache_bytes(cost, [layer[row] for layer in kv], dtype) for row in range(len(places))] if kv else []
        return StepReport(_by_row([one.tokens_per_layer for one in now], places), kv, sum(rows))


def _by_row(found: Sequence[list[list[int]]], places: Sequence[tuple[int, int]]) -> list[list[Any]]:
    """Of counts by layer and row of each attempt, those of each row of the batch; no layers where there are none."""
    if not all(found):
        return []
    return [[found[number][layer][place] for number, place in places] for layer in range(len(found[0]))]
