"""What one generation cost, row by row, read from its report."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from vtprune.report import Report


@dataclass(frozen=True)
class RowCost:
    """The cost of one sample.

    visual_tokens: before pruning; kept_tokens: what the report calls achieved, as a count; flops: of the prefill,
    the vision tower included; kv_bytes: what the prompt leaves in the cache; `_full`: the same without pruning.
    All but the tokens are means of the rows that were answered together. prefill_ms: the batch's time to its
    first token, divided by its rows.
    """

    visual_tokens: int
    kept_tokens: float
    flops: float
    flops_full: float
    scoring_flops: float
    kv_bytes: float
    kv_bytes_full: float
    prefill_ms: float

    def to_dict(self) -> dict[str, float]:
        """Plain numbers by name."""
        return asdict(self)


def row_costs(report: Report, prefill_seconds: float) -> list[RowCost]:
    """The costs of the rows of the generation that `report` describes."""
    rows = len(report.samples)
    images = sum(len(sample.images) for sample in report.samples)
    layers = report.tokens_per_layer
    means = [sum(layer[row] for layer in layers) / len(layers) for row in range(rows)]
    # A method counts what it kept in its own way (`achieved`); over the batch that is `kept_tokens`.
    scale = report.kept_tokens * images / sum(means) if sum(means) else 0.0
    decoded = report.kv_bytes - report.kv_bytes_prefill
    return [
        RowCost(
            visual_tokens=sum(image.tokens for image in report.samples[row].images),
            kept_tokens=means[row] * scale,
            flops=report.flops / rows,
            flops_full=report.flops_full / rows,
            scoring_flops=report.flops_breakdown.scoring / rows,
            kv_bytes=report.kv_bytes_prefill / rows,
            kv_bytes_full=(report.kv_bytes_full - decoded) / rows,
            prefill_ms=1000 * prefill_seconds / rows,
        )
        for row in range(rows)
    ]
