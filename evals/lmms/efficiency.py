"""What one generation cost, row by row, read from its report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from vtprune.report.report import Report, SampleReport


@dataclass(frozen=True)
class RowCost:
    """The cost of one sample.

    visual_tokens: before pruning; kept_tokens: what the method counts as achieved; flops: of the prefill,
    the vision tower included; kv_bytes: what the prompt leaves in the cache; kv_bytes_end: what is there when the
    answers of its batch are complete, with its share of what waits beside them; `_full`: the same without pruning.
    prefill_ms: the batch's time to its first token, divided by its rows; decode_ms: of one later token, so divided,
    None where there was none. peak_bytes: the most that the batch held on an accelerator, None on a CPU.
    published_tokens: what was kept as the method's paper counts it. kept_whole: why none of the sample's images could
    be cut to its budget, "" where any could.
    """

    visual_tokens: int
    kept_tokens: float
    flops: float
    flops_full: float
    scoring_flops: float
    kv_bytes: float
    kv_bytes_full: float
    kv_bytes_end: float
    kv_bytes_end_full: float
    prefill_ms: float
    published_tokens: float | None = None
    kept_whole: str = ""
    decode_ms: float | None = None
    peak_bytes: int | None = None

    def to_dict(self) -> dict[str, float | str | None]:
        """Plain numbers by name."""
        return asdict(self)


def row_costs(
    report: Report, prefill_seconds: float, *, step_seconds: float | None = None, peak_bytes: int | None = None
) -> list[RowCost]:
    """The costs of the rows of the generation that `report` describes; step_seconds: of one step of decoding."""
    rows = len(report.samples)
    return [
        RowCost(
            visual_tokens=sum(image.tokens for image in sample.images),
            kept_tokens=sum(image.achieved_tokens for image in sample.images),
            flops=sample.flops,
            flops_full=sample.flops_full,
            scoring_flops=sample.scoring_flops,
            kv_bytes=sample.kv_bytes_prefill,
            kv_bytes_full=sample.kv_bytes_prefill_full,
            kv_bytes_end=sample.kv_bytes + report.aux_bytes / rows,
            kv_bytes_end_full=sample.kv_bytes_full,
            prefill_ms=1000 * prefill_seconds / rows,
            published_tokens=_published(sample),
            kept_whole=_kept_whole(sample),
            decode_ms=None if step_seconds is None else 1000 * step_seconds / rows,
            peak_bytes=peak_bytes,
        )
        for sample in report.samples
    ]


def summed(costs: Sequence[RowCost]) -> RowCost:
    """What several answers to one sample cost together: sums, but for decode_ms, whose mean it is, and peak_bytes, the
    highest."""
    steps = [cost.decode_ms for cost in costs if cost.decode_ms is not None]
    peaks = [cost.peak_bytes for cost in costs if cost.peak_bytes is not None]
    published = [cost.published_tokens for cost in costs if cost.published_tokens is not None]
    reasons = [cost.kept_whole for cost in costs if cost.visual_tokens]
    added = ("visual_tokens", "kept_tokens", "flops", "flops_full", "scoring_flops", "kv_bytes", "kv_bytes_full",
             "kv_bytes_end", "kv_bytes_end_full", "prefill_ms")  # fmt: skip
    return RowCost(
        **{name: sum(getattr(cost, name) for cost in costs) for name in added},
        published_tokens=sum(published) if published else None,
        kept_whole=reasons[0] if reasons and all(reasons) else "",
        decode_ms=sum(steps) / len(steps) if steps else None,
        peak_bytes=max(peaks, default=None),
    )


def _published(sample: SampleReport) -> float | None:
    """What was kept of a row's images as the method's paper counts it; None where it counts as the report does."""
    counts = [image.published_tokens for image in sample.images if image.published_tokens is not None]
    return sum(counts) if counts else None


def _kept_whole(sample: SampleReport) -> str:
    """Why all images of a row were kept whole, "" where there are none or any was not."""
    reasons = [image.kept_whole for image in sample.images]
    return reasons[0] if reasons and all(reasons) else ""
