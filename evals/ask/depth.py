"""What happens to an image's tokens over the depth of the decoder: where each is gone, and how many are left."""

from __future__ import annotations

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from vtprune.console.figures import COLOURS
from vtprune.report.report import ImageReport, Report

Colour = tuple[int, int, int]

# Dark for the first layers, light for the last ones, and told apart with any colour vision. Its darkest end is too
# near to the black that patches fade to, its yellow to what pictures show.
SHADES, DARKEST, LIGHTEST = "viridis", 0.12, 0.86
# Inches of the colour key and of the plot, dots an inch, and how many layers the key names at the most.
KEY, PLOT, DOTS, NAMED = 0.6, 2.3, 110, 12
VISION, CACHED = COLOURS[:2]


def gone_at(report: ImageReport) -> np.ndarray:
    """(tokens,) the first decoder layer that does not process each token; the depth for those that stay."""
    layers = report.kept_per_layer or [report.kept]
    gone = np.zeros(report.tokens, dtype=int)
    for index, kept in enumerate(layers):
        gone[kept] = index + 1
    return gone


def layer_colours(report: ImageReport) -> dict[int, Colour]:
    """A colour for every decoder layer before which tokens drop, in order; none for drops before the decoder."""
    depth = len(report.kept_per_layer) or 1
    layers = [int(layer) for layer in np.unique(gone_at(report)) if 0 < layer < depth]
    shades = colormaps[SHADES](np.linspace(DARKEST, LIGHTEST, max(2, len(layers))))
    return {
        layer: (round(255 * red), round(255 * green), round(255 * blue))
        for layer, (red, green, blue, _) in zip(layers, shades, strict=False)
    }


def depth_plot(report: Report, width: int) -> Image.Image:
    """The key to the colours of `layer_colours`, and vision tokens and cache entries by decoder layer, for a report's
    first row and its first image: an image `width` pixels wide."""
    colours = layer_colours(report.samples[0].images[0])
    height = PLOT + (KEY if colours else 0)
    figure = Figure(figsize=(width / DOTS, height), dpi=DOTS, layout="constrained")
    if colours:
        key, plot = figure.subplots(2, 1, height_ratios=[KEY, PLOT])
        _draw_key(key, colours)
    else:
        plot = figure.subplots()
    _draw_counts(plot, report)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    # The figure's ground is white and whole: nothing of it is transparent.
    drawn = Image.fromarray(np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[:, :, :3]))
    return drawn if drawn.width == width else drawn.resize((width, drawn.height), Image.Resampling.LANCZOS)


def _draw_key(axes: Axes, colours: dict[int, Colour]) -> None:
    axes.imshow(np.array([list(colours.values())], dtype=np.uint8), aspect="auto")
    every = -(-len(colours) // NAMED)
    axes.set_xticks(range(0, len(colours), every), [str(layer) for layer in list(colours)[::every]])
    axes.set_yticks([])
    axes.tick_params(length=0, labelsize=9)
    axes.set_title("patches gone from this decoder layer on (counted from 0)", fontsize=9, loc="left")
    for side in axes.spines.values():
        side.set_visible(False)


def _draw_counts(axes: Axes, report: Report) -> None:
    vision = [layer[0] for layer in report.tokens_per_layer]
    cached = [layer[0] for layer in report.history[0].kv_tokens_per_layer]
    whole = sum(image.tokens for image in report.samples[0].images)
    edges = np.arange(len(vision) + 1) - 0.5
    text = report.samples[0].text_tokens
    if cached:
        axes.stairs(cached, edges, color=CACHED, linewidth=1.8, label="KV entries after the prefill, text included")
        axes.axhline(whole + text, color=CACHED, linewidth=1, linestyle=":")
    axes.stairs(vision, edges, color=VISION, alpha=0.25, fill=True)
    axes.stairs(vision, edges, color=VISION, linewidth=1.8, label="vision tokens processed")
    axes.axhline(whole, color=VISION, linewidth=1, linestyle=":", label="dotted: unpruned")
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, 1.08 * (whole + text))
    axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    axes.set_xlabel("decoder layer", fontsize=9)
    axes.tick_params(labelsize=9)
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)
