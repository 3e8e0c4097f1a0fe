"""loss.png and routed.png: how a run went, and what each decoder layer computes after it."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from vtprune.console.figures import COLOURS, GREY, figure_png, plain
from vtprune.training.state import Progress


def loss_png(progress: Progress) -> bytes:
    """The loss (and that of validation, and what the method adds) and the learning rate, over steps."""
    figure = Figure(figsize=(7, 5), layout="constrained", dpi=150)
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    steps = [point["step"] for point in progress.curve]
    loss.plot(steps, [point["loss"] for point in progress.curve], color=COLOURS[0], label="training", linewidth=1)
    extra = [point["auxiliary"] for point in progress.curve]
    if any(extra):
        loss.plot(steps, extra, color=COLOURS[1], label="auxiliary", linewidth=1)
    if progress.validation:
        places, values = zip(*((point["step"], point["loss"]) for point in progress.validation), strict=True)
        loss.plot(places, values, color=COLOURS[2], label="validation", marker="o", markersize=4)
    loss.set_ylabel("cross-entropy an answer token")
    loss.legend(frameon=False)
    rate.plot(steps, [point["rate"] for point in progress.curve], color=GREY, linewidth=1)
    rate.set_ylabel("learning rate")
    rate.set_xlabel("step")
    plain(loss, rate)
    return figure_png(figure)


def routed_png(shares: Sequence[float]) -> bytes:
    """A bar a decoder layer: the share of the vision tokens that it computes."""
    figure = Figure(figsize=(7, 3), layout="constrained", dpi=150)
    axes = figure.subplots()
    axes.bar(range(len(shares)), [100 * share for share in shares], color=COLOURS[0])
    axes.axhline(100 * sum(shares) / len(shares), color="black", linewidth=1, linestyle="--", label="mean")
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("vision tokens computed, %")
    axes.set_ylim(0, 105)
    axes.legend(frameon=False)
    plain(axes)
    return figure_png(figure)
