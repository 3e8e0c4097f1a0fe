"""Accuracy against a cost as an SVG that stands inside the page: its front in colour, every line labelled where there
is room, everything else in the page's own text colour."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from vtprune.console.figures import COLOURS, GREY, plain

# Stands for the page's text colour, which changes with its scheme; nothing else is drawn in it.
INK = "#010203"
# In points: on a phone's width a point is about a pixel, on a desktop the picture is larger.
SIZE, SMALL, LARGE = (5.0, 4.3), 9.5, 10.5
# To the inch, as SVG counts: what is measured here is where it will stand.
POINTS = 72
# Between the points of a stroke that labels keep away from.
STEP = 4
# With more lines than these the grey ones step back.
CROWD = 10
# Of the x axis, in percent.
LEAST_WIDTH = 20
MARKERS = "osD^vP*Xhp"
BASELINE_DASHES = ("--", ":", "-.", (0, (1, 3)))
# Where a label may stand beside its point, in points, best first.
PLACES = [(7, 6), (7, -13), (-7, 6), (-7, -13), (0, 11), (0, -19), (12, 17), (-12, 17), (12, -26), (-12, -26)]


@dataclass(frozen=True)
class Spot:
    """A setting in the picture: line: what is joined (a method with its options); name: what a label says; x, y and
    error in percent or points; dull: a baseline; front: whether nothing is cheaper and better at once."""

    line: str
    name: str
    x: float
    y: float
    error: float | None
    dull: bool
    front: bool


@dataclass(frozen=True)
class Words:
    """What stands around the picture: title is read out, salt keeps names apart within a page."""

    x: str
    y: str
    title: str
    salt: str


def pareto_svg(
    spots: Sequence[Spot], unpruned: tuple[float, float | None] | None, words: Words
) -> tuple[str, dict[str, str]]:
    """The picture, and the colour of every line in it that is not grey."""
    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": words.salt,
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "font.size": SMALL,
        "axes.labelsize": LARGE,
        "text.parse_math": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=SIZE, layout="constrained", dpi=POINTS)
        canvas = FigureCanvasAgg(figure)
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        colours = _draw(axes, spots, unpruned)
        axes.set_xlabel(words.x)
        axes.set_ylabel(words.y)
        axes.margins(x=0.12, y=0.12)
        _widen(axes)
        plain(axes)
        # Once with its places settled: labels are laid by what is really where.
        figure.draw_without_rendering()
        _label(canvas.get_renderer(), axes, spots)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inlined(buffer.getvalue(), words.title), colours


def _widen(axes: Axes) -> None:
    """Leaves settings that cost nearly the same side by side, in the place of magnifying what divides them."""
    low, high = axes.get_xlim()
    missing = LEAST_WIDTH - (high - low)
    if missing > 0:
        axes.set_xlim(low - missing / 2, high + missing / 2)


def _draw(axes: Axes, spots: Sequence[Spot], unpruned: tuple[float, float | None] | None) -> dict[str, str]:
    """Every line; returns the colours of those that have one."""
    if unpruned is not None:
        height, error = unpruned
        axes.axhline(height, color=INK, linewidth=1)
        axes.annotate("unpruned", (1, height), (-2, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
                      ha="right", fontsize=SMALL)  # fmt: skip
        if error:
            axes.axhspan(height - error, height + error, color=INK, alpha=0.08, linewidth=0)
    lines: dict[str, list[Spot]] = {}
    for spot in spots:
        lines.setdefault(spot.line, []).append(spot)
    crowded = len(lines) > CROWD
    colours: dict[str, str] = {}
    faint = dull = 0
    for name, own in lines.items():
        own.sort(key=lambda spot: spot.x)
        on_front = any(spot.front for spot in own)
        if on_front:
            colours[name] = COLOURS[len(colours) % len(COLOURS)]
        place = len(colours) if on_front else faint
        dashes: Any = "-"
        if own[0].dull:
            dashes = BASELINE_DASHES[dull % len(BASELINE_DASHES)]
            dull += 1
        faint += not on_front
        _line(
            axes, own, colour=colours.get(name, GREY), style=(dashes, MARKERS[place % len(MARKERS)]), crowded=crowded
        )
    return colours


def _line(axes: Axes, own: list[Spot], *, colour: str, style: tuple[Any, str], crowded: bool) -> None:
    bold, (dashes, marker) = colour != GREY, style
    barred = any(spot.error for spot in own) and (bold or not crowded)
    axes.errorbar(
        [spot.x for spot in own],
        [spot.y for spot in own],
        yerr=[spot.error or 0.0 for spot in own] if barred else None,
        color=colour,
        linestyle=dashes,
        marker=marker,
        markersize=6 if bold else 4,
        linewidth=1.8 if bold else 1.0,
        elinewidth=0.8,
        capsize=2,
        alpha=1.0 if bold else 0.35 if crowded else 0.65,
        zorder=3 if bold else 2,
    )


def _label(renderer: Any, axes: Axes, spots: Sequence[Spot]) -> None:
    """Labels of the front's points, then one for each line that is not on it, where there is room for them."""
    inside = axes.get_window_extent(renderer)
    points = [axes.transData.transform((spot.x, spot.y)) for spot in spots]
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in points]
    taken += [text.get_window_extent(renderer) for text in axes.texts]
    strokes = _strokes(axes, spots)
    wanted = [(spot, spot.name) for spot in spots if spot.front]
    named = {spot.line for spot, _ in wanted}
    for line in dict.fromkeys(spot.line for spot in spots):
        if line not in named:
            wanted.append((max((spot for spot in spots if spot.line == line), key=lambda spot: spot.y), line))
    for spot, name in wanted:
        # Beside every stroke if it can be; one of the front across one if it has to be.
        for hidden in (strokes, []) if spot.front else (strokes,):
            box = _placed(axes, spot, name, renderer=renderer, inside=inside, taken=[*taken, *hidden])
            if box is not None:
                taken.append(box)
                break


def _strokes(axes: Axes, spots: Sequence[Spot]) -> list[Bbox]:
    """Small boxes along every line and every bar."""
    ends = [((spot.x, spot.y - spot.error), (spot.x, spot.y + spot.error)) for spot in spots if spot.error]
    for line in dict.fromkeys(spot.line for spot in spots):
        own = sorted((spot.x, spot.y) for spot in spots if spot.line == line)
        ends += list(pairwise(own))
    boxes = []
    for start, end in ends:
        one, other = axes.transData.transform([start, end])
        steps = max(1, int(math.dist(one, other) / STEP))
        for step in range(steps + 1):
            x, y = one + (other - one) * step / steps
            boxes.append(Bbox.from_bounds(x - 1, y - 1, 2, 2))
    return boxes


def _placed(axes: Axes, spot: Spot, name: str, *, renderer: Any, inside: Bbox, taken: list[Bbox]) -> Bbox | None:
    """Where a label found room beside its point."""
    for dx, dy in PLACES:
        text: Text = axes.annotate(
            name, (spot.x, spot.y), (dx, dy), textcoords="offset points", fontsize=SMALL, color=INK,
            ha="left" if dx > 0 else "right" if dx < 0 else "center", fontweight="bold" if spot.front else None,
        )  # fmt: skip
        box = text.get_window_extent(renderer)
        whole = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
        if whole and not any(box.overlaps(other) for other in taken):
            return box
        text.remove()
    return None


def _inlined(text: str, title: str) -> str:
    """The element alone, as wide as its place, with the page's text colour in the place of INK."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    head, rest = text.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{escape(title)}">{rest}'.replace(INK, "currentColor")
