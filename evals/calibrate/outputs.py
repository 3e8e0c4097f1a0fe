"""What a calibration leaves for people: two tables and calibration.png."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table as Shown

from vtprune.console.figures import COLOURS, GREY, figure_png, plain
from vtprune.files import write_bytes
from vtprune.pruners.auto.calibration import CalibrationFile, table_of
from vtprune.pruners.auto.promise import Settled
from vtprune.pruners.auto.risk import crc_bound, mean_by, monotone

if TYPE_CHECKING:
    from vtprune.evals.calibrate.agreement import Candidate

PLOT = "calibration.png"


def tell_candidates(found: Sequence[Candidate], console: Console) -> None:
    """Each method at each level, and what its best setting would cost."""
    title = "Disagreement with the whole model by keep, %, on the samples that a method is chosen on"
    table = Shown(title=title, title_justify="left")
    table.add_column("method")
    for keep in found[0].keeps:
        table.add_column(f"{keep:g}", justify="right")
    table.add_column("FLOPs % of the best setting", justify="right")
    best = min(one.cost for one in found)
    for one in found:
        losses = mean_by(one.table.pictures, one.table.losses).mean(axis=0)
        cells = [f"{100 * loss:.1f}" for loss in losses]
        style = "bold" if one.cost == best else None
        table.add_row(one.pruner.name, *cells, f"{100 * one.cost:.1f}", style=style)
    console.print(table)


def tell_promise(settled: Settled, method: str, console: Console) -> None:
    """What was chosen, and what is promised."""
    promise = settled.promise
    console.print(f"{method}: {promise}", highlight=False, soft_wrap=True)
    if settled.levels == (1.0,):
        console.print(
            "No setting below the whole model could be vouched for: every image is kept whole. More samples, a lower "
            "agreement or other methods may change that.",
            highlight=False,
        )
        return
    levels = " -> ".join(f"{level:g}" for level in settled.levels)
    how = f"keep={levels}"
    if len(settled.levels) > 1:
        how = f"levels {levels}, accepted from a {settled.score} of {settled.threshold:.4f} on"
    console.print(
        f"{how}; FLOPs {promise.flops:.1%} and KV cache {promise.kv:.1%} of the whole model's, all attempts counted",
        highlight=False,
        soft_wrap=True,
    )
    if promise.uneven:
        console.print(
            f"{promise.uneven:.1%} of the pictures would be lost again by a more careful setting; they count as lost",
            style="dim",
            highlight=False,
        )
    for task, own in promise.by_task.items():
        text = f"{task}: {own['risk']:.2%} of {own['pictures']:.0f} pictures differed, bound {own['bound']:.2%}"
        console.print(text, highlight=False)


def write_plot(folder: Path, settled: Settled, data: CalibrationFile) -> None:
    """Risk and cost of every setting, with the one that was chosen and its bound."""
    table, outcome, promise = table_of(data["calibration"]), settled.outcome, settled.promise
    losses = mean_by(table.pictures, outcome.losses)
    flops = 100 * outcome.flops.sum(axis=0) / table.flops[:, -1].sum()
    risk, smooth = 100 * losses.mean(axis=0), 100 * monotone(losses).mean(axis=0)
    figure = Figure(figsize=(7.2, 4.2), layout="constrained", dpi=150)
    axes = figure.subplots()
    order = np.argsort(flops)
    axes.plot(
        flops[order], risk[order], ".-", color=COLOURS[0], linewidth=1, markersize=3, label="answers that differ"
    )
    if promise.confidence is None:
        axes.plot(flops[order], smooth[order], color=COLOURS[4], linewidth=1, label="the same, made monotone")
        bound = 100 * crc_bound(monotone(losses))
        axes.plot(flops[order], bound[order], color=GREY, linewidth=1, linestyle=":", label="bound")
    axes.axhline(100 * (1 - promise.agreement), color="black", linewidth=1, linestyle="--", label="promised at most")
    axes.plot(flops[settled.chosen], risk[settled.chosen], "*", color=COLOURS[1], markersize=13, label="chosen")
    axes.set_xlabel("FLOPs, % of the whole model's, all attempts counted")
    axes.set_ylabel("% of answers")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{data['model']}: {data['method']['method']}, {len(table)} samples", fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=8)
    plain(axes)
    write_bytes(folder / PLOT, figure_png(figure))
