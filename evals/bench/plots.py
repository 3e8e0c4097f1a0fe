"""pareto.png: what is left of the accuracy against what is left of the compute and of the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from vtprune.console.figures import COLOURS, GREY, figure_png, plain
from vtprune.evals.bench.tables import (
    Record,
    all_shares,
    kept_score,
    main_scores,
    reference,
)
from vtprune.evals.settings import BASELINES, UNPRUNED

MARKERS = "osD^vP*Xhp"
# Where there are more methods than colours: these shares of black, then of white, are mixed in.
DARKER, LIGHTER = 0.45, 0.45
BASELINE_DASHES = ("--", ":", "-.")
PANELS = (("flops", "share", "FLOPs, % of unpruned"), ("kv", "end_share", "KV cache at the end, % of unpruned"))


def _height(record: Record, unpruned: Record | None, percent: bool) -> tuple[float, float | None]:
    """What the y axis shows, with its standard error: the score of a single task, in percent where it is a share,
    else the share of the unpruned score."""
    scores = main_scores(record)
    if len(scores) == 1:
        scale = 100 if percent else 1
        error = scores[0]["stderr"]
        return scale * scores[0]["value"], None if error is None else scale * error
    share = kept_score(record, unpruned)
    if share is None:
        return 0.0, None
    return 100 * share.value, None if share.stderr is None else 100 * share.stderr


def _label(records: Sequence[Record]) -> str:
    scores = main_scores(records[0])
    if len(scores) > 1:
        return "score, % of unpruned (mean of tasks)"
    return f"{scores[0]['metric']}{', %' if _in_percent(records) else ''}"


def _in_percent(records: Sequence[Record]) -> bool:
    return all_shares(records, main_scores(records[0])[0]["task"])


def method_styles(methods: Sequence[str]) -> list[dict[str, Any]]:
    """A colour and a marker for each method that no other one has: baselines in grey, the others in colours.

    There are 24 colours, and where a colour comes round again its marker is another one.
    """
    styles: list[dict[str, Any]] = []
    index = 0
    for at, method in enumerate(methods):
        # A baseline with other options is one of the others.
        if method in BASELINES and method not in methods[:at]:
            place = BASELINES.index(method)
            styles.append({"color": GREY, "linestyle": BASELINE_DASHES[place], "marker": MARKERS[place]})
            continue
        shades = len(COLOURS) * 3
        colour, turn = index % shades, index // shades
        marker = MARKERS[(colour + colour // len(COLOURS) + turn) % len(MARKERS)]
        styles.append({"color": _shade(COLOURS[colour % len(COLOURS)], colour // len(COLOURS)), "marker": marker})
        index += 1
    return styles


def _shade(colour: str, step: int) -> str:
    """The colour itself, a darker one, a lighter one."""
    share, other = ((0.0, 0.0), (DARKER, 0.0), (LIGHTER, 1.0))[step]
    red, green, blue = ((1 - share) * part + share * other for part in to_rgb(colour))
    return to_hex((red, green, blue))


def _draw(axes: Axes, of: tuple[str, str], groups: dict[str, list[Record]], unpruned: Record | None) -> None:
    part, share = of
    styles = method_styles([records[0]["method"] for records in groups.values()])
    percent = _in_percent([record for records in groups.values() for record in records] + [unpruned] * bool(unpruned))
    for (label, records), style in zip(groups.items(), styles, strict=True):
        records = sorted(records, key=lambda record: record[part][share])
        heights = [_height(record, unpruned, percent) for record in records]
        errors = [error or 0.0 for _, error in heights]
        axes.errorbar(
            [100 * record[part][share] for record in records],
            [height for height, _ in heights],
            yerr=errors if any(errors) else None,
            label=label,
            capsize=2.5,
            markersize=5,
            linewidth=1.5,
            elinewidth=0.8,
            **style,
        )
    if unpruned is not None:
        height, error = _height(unpruned, unpruned, percent)
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
        plain(axes)
    panels[0].set_ylabel(_label(records))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.suptitle(title, fontsize=11)
    return figure_png(figure)
