"""A sheet of a video's frames: each as it is, and what a pruner kept of it."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from vtprune.evals.ask.depth import gone_at
from vtprune.evals.ask.overlay import GAP, compose, draw_parts, everything
from vtprune.loading.videos import Video
from vtprune.report.report import ImageReport, Report

# Frames that are drawn at the most, and pixels that their sheet is wide.
MOST, WIDEST = 24, 1400
# Of a frame: the longest side aimed at, bounds of a cell's side, the size of its caption, all in pixels.
LONGEST, SMALLEST_CELL, LARGEST_CELL, CAPTION = 240, 3, 48, 14
# Pixels between a frame and what was kept of it.
SEAM = 4


def compare_frames(video: Video, together: int, report: Report, title: str = "") -> Image.Image:
    """The sheet of a report's first row, whose first image is this video, under a title and over the plot of what is
    left at each decoder layer.

    together: frames that the vision encoder takes as one; the first of them is drawn. Of many the sheet shows some,
    evenly spread, and says so.
    """
    first = report.samples[0].images[0]
    shown = chosen(first.grid[0])
    if len(shown) < first.grid[0]:
        title = f"{title}\n{len(shown)} of {first.grid[0]} frames are drawn, evenly spread".strip()
    return compose(_sheet(video, together, first, shown), report, title)


def chosen(parts: int) -> list[int]:
    """Which parts of a video are drawn: all of them, or so many from the first to the last."""
    return np.linspace(0, parts - 1, min(parts, MOST)).round().astype(int).tolist()


def captions(video: Video, together: int, report: ImageReport) -> list[str]:
    """When each part of a video is shown, and how many of its tokens the last decoder layer processes."""
    stay = gone_at(report) == (len(report.kept_per_layer) or 1)
    left = stay.reshape(report.grid[0], -1).sum(axis=1).tolist()
    texts = []
    for part, count in enumerate(left):
        seconds = video.seconds[part * together : (part + 1) * together]
        ends = list(dict.fromkeys(f"{second:.1f}" for second in (seconds[0], seconds[-1])))
        texts.append(f"{' to '.join(ends)} s: {count} of {report.tokens // report.grid[0]} left")
    return texts


def _sheet(video: Video, together: int, report: ImageReport, shown: list[int]) -> Image.Image:
    _, height, width = report.grid
    cell = max(SMALLEST_CELL, min(LARGEST_CELL, LONGEST // max(height, width)))
    pictures = [video.frames[part * together] for part in shown]
    whole = draw_parts(pictures, everything(report), shown, cell)
    kept = draw_parts(pictures, report, shown, cell)
    texts = captions(video, together, report)
    tiles = [_tile(before, after, texts[part]) for before, after, part in zip(whole, kept, shown, strict=True)]
    wide, high = max(tile.width for tile in tiles), tiles[0].height
    columns = min(len(tiles), max(1, (WIDEST - GAP) // (wide + GAP)))
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * (wide + GAP) + GAP, rows * (high + GAP) - GAP), "white")
    for place, tile in enumerate(tiles):
        row, column = divmod(place, columns)
        sheet.paste(tile, (GAP + column * (wide + GAP), row * (high + GAP)))
    return sheet


def _tile(whole: Image.Image, kept: Image.Image, text: str) -> Image.Image:
    """A caption over a frame and what was kept of it: below each other, side by side where they are high."""
    across = whole.height > whole.width
    top = CAPTION * 3 // 2
    along = (whole.width + SEAM) * across, (whole.height + SEAM) * (not across)
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    written = int(pen.textlength(text, font_size=CAPTION)) + 1
    tile = Image.new("RGB", (max(written, whole.width + along[0]), top + whole.height + along[1]), "white")
    ImageDraw.Draw(tile).text((0, 0), text, fill="black", font_size=CAPTION)
    tile.paste(whole, (0, top))
    tile.paste(kept, (along[0], top + along[1]))
    return tile
