"""A picture of what a pruner kept: patches that never entered the decoder dimmed, those that dropped out inside it in
the colour of their layer, merged groups tinted in one colour each."""

from __future__ import annotations

import colorsys
import math
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from vtprune.evals.ask.depth import depth_plot, gone_at, layer_colours
from vtprune.loading.pictures import open_picture
from vtprune.report.report import ImageReport, Report

# Longest side aimed at, and bounds of a cell's side, in pixels.
LONGEST, SMALLEST_CELL, LARGEST_CELL = 640, 6, 48
# What is left of a dropped patch, and of one that was merged into another.
DROPPED, MERGED = 0.18, 0.6
# A picture darker than this fades to white, a lighter one to black.
DARK = 96
GAP = 16
# The share of a colour over a merged patch, and over one that dropped out between decoder layers.
TINT, GONE = 0.45, 0.72
# Side in pixels from which on a patch has room for the number of its layer, and the sum of red, green and blue from
# which on it is written in black.
NUMBERED, BRIGHT = 20, 400
# Pixels that the plot below the pictures needs.
NARROWEST = 720
# Of the title: pixels of its first line and of the others, quarters of them between lines, rows that a line may take.
TITLE_SIZE, CAPTION_SIZE, LINE, TITLE_ROWS = 18, 14, 6, 3
# So many groups have hues that can be told apart.
HUES = 8


def cell_size(height: int, width: int) -> int:
    """Pixels a side of one vision token in the picture."""
    return max(SMALLEST_CELL, min(LARGEST_CELL, LONGEST // max(height, width)))


def seen_image(image: Image.Image, processor: Any, pixels: Any) -> Image.Image:
    """What the encoder saw, where its input is one picture (resized, perhaps cropped); else the image."""
    settings: Any = getattr(processor, "image_processor", None)
    if pixels is None or pixels.ndim != 4 or len(pixels) != 1 or getattr(settings, "image_mean", None) is None:
        return image
    mean, std = np.array(settings.image_mean), np.array(settings.image_std)
    values = pixels[0].float().permute(1, 2, 0).numpy() * std + mean
    return Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8))


def _colour(index: int) -> tuple[int, int, int]:
    # Steps of the golden ratio keep the hues of neighbouring groups apart; where hues come round again, their
    # strength and brightness differ.
    saturation, value = ((0.85, 1.0), (0.45, 1.0), (0.9, 0.65))[index // HUES % 3]
    red, green, blue = colorsys.hsv_to_rgb((index * 0.618034) % 1.0, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_kept(image: Image.Image, report: ImageReport) -> Image.Image:
    """The picture cut into the report's grid, frames below each other: what stays as it is, what dropped out between
    decoder layers in its layer's colour, what never entered the decoder dimmed."""
    rectangles = rectangles_of(report)
    if len(rectangles) > 1:
        return side_by_side([draw_kept(image, one) for one in rectangles])
    frames, height, width = report.grid
    drawn = draw_parts([image] * frames, report, range(frames), cell_size(height, width))
    if frames == 1:
        return drawn[0]
    canvas = Image.new("RGB", (drawn[0].width, drawn[0].height * frames))
    for place, picture in enumerate(drawn):
        canvas.paste(picture, (0, place * picture.height))
    return canvas


def rectangles_of(report: ImageReport) -> list[ImageReport]:
    """The report of each rectangle that an image's tokens form: the picture itself and the grid of its crops; where
    there is one, or frames of one size, the report as it is. What flowed between rectangles is left out."""
    if len({part[1:] for part in report.parts}) < 2:
        return [report]
    found, start = [], 0
    for grid in report.parts:
        stop = start + math.prod(grid)
        found.append(_between(report, grid, start, stop))
        start = stop
    return found


def _between(report: ImageReport, grid: tuple[int, int, int], start: int, stop: int) -> ImageReport:
    def own(tokens: Sequence[int]) -> list[int]:
        return [token - start for token in tokens if start <= token < stop]

    return replace(
        report,
        grid=grid,
        parts=[grid],
        tokens=stop - start,
        kept=own(report.kept),
        kept_per_layer=[own(layer) for layer in report.kept_per_layer],
        merged=[
            replace(merge, into=merge.into - start, members=[member - start for member in merge.members])
            for merge in report.merged
            if all(start <= token < stop for token in (merge.into, *merge.members))
        ],
    )


def draw_parts(
    pictures: Sequence[Image.Image], report: ImageReport, parts: Sequence[int], cell: int
) -> list[Image.Image]:
    """Some parts of a report's grid, the frames of a video, each over its own picture and as `draw_kept` says.

    pictures: one for each of `parts`, which are counted from 0; cell: pixels a side of one vision token.
    """
    _, height, width = report.grid
    rows = np.concatenate([np.arange(part * height, (part + 1) * height) for part in parts])
    size = (width * cell, height * cell)
    bases = [open_picture(picture).resize(size, _filter(picture, width * cell)) for picture in pictures]
    canvas: Any = np.concatenate([np.asarray(base, dtype=np.float32) for base in bases])

    def cells(values: np.ndarray) -> np.ndarray:
        """(tokens,) values as pixels of the canvas, of which each has one."""
        return values.reshape(-1, width)[rows].repeat(cell, 0).repeat(cell, 1)[:, :, None]

    places = {int(row): place for place, row in enumerate(rows)}

    def corner(token: int) -> tuple[int, int] | None:
        """The column and the row of the canvas where a token begins; None for one that is not drawn."""
        row, column = divmod(token, width)
        return (column * cell, places[row] * cell) if row in places else None

    merged = np.zeros(report.tokens, dtype=bool)
    gone, colours = gone_at(report), layer_colours(report)
    # A group whose survivor does not enter the decoder is gone with it.
    groups = [merge for merge in report.merged if gone[merge.into]]
    for merge in groups:
        merged[list(merge.members)] = True
    depth = len(report.kept_per_layer) or 1
    strength = np.where(merged & (gone < depth), MERGED, np.where(gone == 0, DROPPED, 1.0))
    fade = 255.0 if canvas.mean() < DARK else 0.0
    canvas = fade + (canvas - fade) * cells(strength)
    grey = canvas.mean(axis=2, keepdims=True)
    for layer, shade in colours.items():
        canvas = np.where(cells((gone == layer) & ~merged), (1 - GONE) * grey + GONE * np.array(shade), canvas)
    for index, merge in enumerate(groups):
        colour = np.array(_colour(index), dtype=np.float32)
        for left, top in filter(None, map(corner, merge.members)):
            area = canvas[top : top + cell, left : left + cell]
            area *= 1 - TINT
            area += TINT * colour
    picture = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    if cell >= NUMBERED:
        for token in np.flatnonzero(np.isin(gone, list(colours)) & ~merged).tolist():
            if found := corner(token):
                ink = "white" if sum(colours[int(gone[token])]) < BRIGHT else "black"
                place = (found[0] + cell // 10, found[1] + cell // 16)
                pen.text(place, str(gone[token]), fill=ink, font_size=max(9, cell // 4))
    for index, merge in enumerate(groups):
        if found := corner(merge.into):
            box = (*found, found[0] + cell - 1, found[1] + cell - 1)
            pen.rectangle(box, outline=_colour(index), width=max(1, cell // 12))
    return [picture.crop((0, top, size[0], top + size[1])) for top in range(0, picture.height, size[1])]


def _filter(image: Image.Image, width: int) -> Image.Resampling:
    """Small pictures keep their pixels, large ones are averaged."""
    return Image.Resampling.NEAREST if width > image.width else Image.Resampling.LANCZOS


def side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    """The pictures in one, below each other if they are wide."""
    stacked = pictures[0].width > 2 * pictures[0].height
    sizes = [(p.height, p.width) if stacked else (p.width, p.height) for p in pictures]
    along = sum(size[0] for size in sizes) + GAP * (len(pictures) - 1)
    across = max(size[1] for size in sizes)
    canvas = Image.new("RGB", (across, along) if stacked else (along, across), "white")
    offset = 0
    for picture, (length, _) in zip(pictures, sizes, strict=True):
        canvas.paste(picture, (0, offset) if stacked else (offset, 0))
        offset += length + GAP
    return canvas


def compare(image: Image.Image, report: Report, title: str = "") -> Image.Image:
    """The whole picture beside what was kept of it, and below them what is left at each decoder layer; above all, the
    lines of a title."""
    first = report.samples[0].images[0]
    return compose(side_by_side([draw_kept(image, everything(first)), draw_kept(image, first)]), report, title)


def everything(report: ImageReport) -> ImageReport:
    """The report of the same image with all of its tokens kept."""
    tokens = list(range(report.tokens))
    return ImageReport(report.grid, report.tokens, tokens, kept_per_layer=[tokens], merged=[], parts=report.parts)


def compose(pictures: Image.Image, report: Report, title: str) -> Image.Image:
    """A title, what was drawn, and the plot of what is left at each decoder layer, below each other."""
    plot = depth_plot(report, max(NARROWEST, pictures.width))
    heading = _heading(title, plot.width)
    top = heading.height + (GAP if title else 0)
    canvas = Image.new("RGB", (plot.width, top + pictures.height + GAP + plot.height), "white")
    canvas.paste(heading, (0, 0))
    canvas.paste(pictures, ((plot.width - pictures.width) // 2, top))
    canvas.paste(plot, (0, top + pictures.height + GAP))
    return canvas


def _heading(title: str, width: int) -> Image.Image:
    """The title's lines in black on white, broken where they are longer than the picture is wide; the first one is
    larger than the others."""
    rows: list[tuple[str, int]] = []
    for place, line in enumerate(title.splitlines()):
        size = TITLE_SIZE if place == 0 else CAPTION_SIZE
        rows += [(part, size) for part in textwrap.wrap(line, int(width / (0.55 * size)))[:TITLE_ROWS]]
    height = sum(LINE * size // 4 for _, size in rows) + (GAP // 2 if rows else 0)
    picture = Image.new("RGB", (width, height), "white")
    pen, down = ImageDraw.Draw(picture), GAP // 2
    for text, size in rows:
        pen.text((GAP, down), text, fill="black", font_size=size)
        down += LINE * size // 4
    return picture
