"""pareto.png: what is left of the accuracy against what is left of the compute and of the cache."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .settings import BASELINES, UNPRUNED
from .tables import Record, is_share, kept_score, main_scores, reference

# Okabe and Ito's colours, told apart with any colour vision; with more methods the markers differ too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#5B4B8A")
MARKERS = "osD^vP*Xhp"
PANELS = (("flops", "share", "FLOPs, % of unpruned"), ("kv", "end_share", "KV cache at the end, % of unpruned"))


def _height(record: Record, unpruned: Record | None) -> tuple[float, float | None]:
    """What the y axis shows, with its standard error: the score of a single task, else the share kept."""
    scores = main_scores(record)
    if len(scores) == 1:
        scale = 100 if is_share(scores[0]) else 1
        error = scores[0]["stderr"]
        return scale * scores[0]["value"], None if error is None else scale * error
    return 100 * (kept_score(record, unpruned) or 0.0), None


def _label(records: Sequence[Record]) -> str:
    scores = main_scores(records[0])
    if len(scores) > 1:
        return "score, % of unpruned (mean of tasks)"
    return f"{scores[0]['metric']}{', %' if is_share(scores[0]) else ''}"


def _style(index: int, method: str) -> dict[str, Any]:
    if method in BASELINES:
        dashes = ("--", ":", "-.")[BASELINES.index(method)]
        return {"color": "#7f7f7f", "linestyle": dashes, "marker": MARKERS[BASELINES.index(method)]}
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[(index // len(COLOURS) + index) % 10]}


def _draw(axes: Axes, of: tuple[str, str], groups: dict[str, list[Record]], unpruned: Record | None) -> None:
    part, share = of
    coloured = [label for label, records in groups.items() if records[0]["method"] not in BASELINES]
    for label, records in groups.items():
        records = sorted(records, key=lambda record: record[part][share])
        heights = [_height(record, unpruned) for record in records]
        errors = [error or 0.0 for _, error in heights]
        index = coloured.index(label) if label in coloured else 0
        axes.errorbar(
            [100 * record[part][share] for record in records],
            [height for height, _ in heights],
            yerr=errors if any(errors) else None,
            label=label,
            capsize=2.5,
            markersize=5,
            linewidth=1.5,
            elinewidth=0.8,
            **_style(index, records[0]["method"]),
        )
    if unpruned is not None:
        height, error = _height(unpruned, unpruned)
        axes.axhline(height, color="black", linewidth=1, label="unpruned")
        if error:
            axes.axhspan(height - error, height + error, color="black", alpha=0.08, linewidth=0)


def pareto_png(records: Sequence[Record], title: str) -> bytes:
    """The two panels, one line per method, error bars of one standard error."""
    unpruned = reference(records)
    groups: dict[str, list[Record]] = {}
    for record in records:
        if record["method"] != UNPRUNED:
            groups.setdefault(record["label"], []).append(record)
    # A long legend needs a taller figure.
    figure = Figure(figsize=(11.5, max(4.8, 1.0 + 0.3 * len(groups))), layout="constrained", dpi=150)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (part, share, label) in zip(panels, PANELS, strict=True):
        _draw(axes, (part, share), groups, unpruned)
        axes.set_xlabel(label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(_label(records))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.suptitle(title, fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
