"""Where each token is drawn: over the picture, over its crops, or over the frames of a video side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from vtprune.evals.ask.overlay import rectangles_of, seen_image
from vtprune.loading.media import Media
from vtprune.loading.pictures import open_picture
from vtprune.loading.videos import Video
from vtprune.report.report import ImageReport

# Pixels that the longer side of a sheet of several pictures aims at, and bounds of a cell's side in them.
LONGEST, SMALLEST_CELL, LARGEST_CELL = 1024, 2, 48


@dataclass(frozen=True)
class Layout:
    """A picture of `columns` x `rows` cells, and the cell (column, row) of each token."""

    picture: Image.Image
    columns: int
    rows: int
    cells: list[tuple[int, int]]


def frames_of(media: Media, processor: Any, pixels: Any) -> list[Image.Image]:
    """The picture as the encoder saw it, where that is one picture; of a video those of its frames that tokens are
    drawn over, as the tower may take several together."""
    if isinstance(media, Video):
        together = getattr(processor.video_processor, "temporal_patch_size", None) or 1
        return list(media.frames[::together])
    return [seen_image(media, processor, pixels)]


def layout(pictures: Sequence[Image.Image], report: ImageReport) -> Layout:
    """The tokens of a report over its picture, or over its frames; pictures: one, or one a frame."""
    parts = [one.grid[1:] for one in rectangles_of(report)]
    if len(parts) == 1:
        parts *= report.grid[0]
    if len(parts) == 1:
        height, width = parts[0]
        cells = [(column, row) for row in range(height) for column in range(width)]
        return Layout(open_picture(pictures[0]), width, height, cells)
    corners, columns, rows = _side_by_side(parts)
    cells = [
        (left + column, top + row)
        for (left, top), (height, width) in zip(corners, parts, strict=True)
        for row in range(height)
        for column in range(width)
    ]
    cell = max(SMALLEST_CELL, min(LARGEST_CELL, LONGEST // max(columns, rows)))
    sheet = Image.new("RGB", (columns * cell, rows * cell), "white")
    each = pictures if len(pictures) == len(parts) else [pictures[0]] * len(parts)
    for picture, (left, top), (height, width) in zip(each, corners, parts, strict=True):
        sheet.paste(open_picture(picture).resize((width * cell, height * cell)), (left * cell, top * cell))
    return Layout(sheet, columns, rows, cells)


def _side_by_side(parts: Sequence[tuple[int, int]]) -> tuple[list[tuple[int, int]], int, int]:
    """The upper left cell (column, row) of each part (height, width), in rows of parts with a cell between them, and
    the columns and rows that all of them take."""
    high, wide = max(height for height, _ in parts), max(width for _, width in parts)
    across = min(len(parts), max(1, math.ceil(math.sqrt(len(parts) * (high + 1) / (wide + 1)))))
    if len(set(parts)) > 1:
        # A picture and the grid of its crops.
        across = len(parts)
    corners, left, top = [], 0, 0
    for number, (_, width) in enumerate(parts):
        if number and number % across == 0:
            left, top = 0, top + high + 1
        corners.append((left, top))
        left += width + 1
    columns = max(left + width for (left, _), (_, width) in zip(corners, parts, strict=True))
    rows = max(top + height for (_, top), (height, _) in zip(corners, parts, strict=True))
    return corners, columns, rows
