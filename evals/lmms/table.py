"""What each task cost, beside its accuracy in lmms-eval's own table and results file.

lmms-eval has no place for it, so that two of its functions are wrapped here, as they are in the one release that
vtprune takes: what a document was scored by gets the costs of its answer, and the aggregates of a task their shares.
Processes gather both as they gather any metric.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from lmms_eval import evaluator
from lmms_eval.api.instance import TokenCounts
from lmms_eval.evaluator_utils import TaskOutput

from vtprune.evals.lmms.efficiency import RowCost

# What lmms-eval writes where there is no standard error.
NONE = "N/A"
Pair = tuple[float, float]


class VisionTokenCounts(TokenCounts):
    """lmms-eval's token counts of an answer, with what it cost; shown: whether the table of its task is to say it."""

    def __init__(self, input_tokens: int, output_tokens: int, *, cost: RowCost, shown: bool) -> None:
        super().__init__(input_tokens, output_tokens)
        self.cost, self.shown = cost, shown

    def to_dict(self) -> dict[str, Any]:
        """What lands in `token_counts` of the logged samples."""
        return {**super().to_dict(), **self.cost.to_dict()}


def _percent(part: str, whole: str) -> Callable[[RowCost], Pair]:
    return lambda cost: (100 * getattr(cost, part), getattr(cost, whole))


# By the row's name: a sample's share in the number, as a part and a whole; sums are divided, as `vtprune bench` does.
ROWS: dict[str, Callable[[RowCost], Pair | None]] = {
    "vtprune_tokens_kept": lambda cost: (cost.kept_tokens, 1),
    "vtprune_tokens_percent": _percent("kept_tokens", "visual_tokens"),
    "vtprune_flops_percent": _percent("flops", "flops_full"),
    "vtprune_kv_percent": _percent("kv_bytes", "kv_bytes_full"),
    "vtprune_kv_end_percent": _percent("kv_bytes_end", "kv_bytes_end_full"),
    "vtprune_scoring_percent": _percent("scoring_flops", "flops"),
    "vtprune_prefill_ms": lambda cost: (cost.prefill_ms, 1),
    "vtprune_decode_ms": lambda cost: None if cost.decode_ms is None else (cost.decode_ms, 1),
    "vtprune_peak_gib": lambda cost: None if cost.peak_bytes is None else (cost.peak_bytes / 2**30, 1),
}
# Of these a task has the highest, not the mean.
HIGHEST = ("vtprune_peak_gib",)


def costs_of(counts: Sequence[TokenCounts | None]) -> dict[str, list[Pair]]:
    """By row the parts and wholes of one document's answers, of those that tables show."""
    known = [one.cost for one in counts if isinstance(one, VisionTokenCounts) and one.shown]
    pairs = {name: [pair for cost in known if (pair := of(cost)) is not None] for name, of in ROWS.items()}
    return {name: found for name, found in pairs.items() if found}


def value_of(name: str, documents: Sequence[Sequence[Pair]]) -> float:
    """The number of a row from the pairs of all documents of a task."""
    pairs = [pair for document in documents for pair in document]
    if name in HIGHEST:
        return max(part for part, _ in pairs)
    whole = math.fsum(whole for _, whole in pairs)
    return math.fsum(part for part, _ in pairs) / whole if whole else 100.0


def install() -> None:
    """Wraps what scores a document and what aggregates a task, once."""
    if getattr(evaluator._process_document_results, "_vtprune", False):
        return
    score, aggregate = evaluator._process_document_results, TaskOutput.calculate_aggregate_metric

    def scored(item: Any, **options: Any) -> Any:
        found = score(item, **options)
        counts = [one for request in item[2] for one in request.token_counts[:1]]
        found.metrics.update(costs_of(counts))
        return found

    def aggregated(self: Any, *args: Any, **kwargs: Any) -> None:
        aggregate(self, *args, **kwargs)
        for (metric, filtered), items in self.sample_metrics.items():
            if metric in ROWS:
                self.agg_metrics[f"{metric},{filtered}"] = value_of(metric, items)
                self.agg_metrics[f"{metric}_stderr,{filtered}"] = NONE

    scored._vtprune = True  # type: ignore[attr-defined]
    evaluator._process_document_results, TaskOutput.calculate_aggregate_metric = scored, aggregated
