"""Cells of a smaller grid laid over an image's token grid, as adaptive average pooling cuts them."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

Grid3 = tuple[int, int, int]


@dataclass(frozen=True)
class Cell:
    """One cell: its tokens' places in the grid, ascending, and the one nearest its centre (ties: lowest)."""

    members: tuple[int, ...]
    centre: int


def cell_grid(grid: Grid3, budget: int) -> Grid3:
    """The (t, h, w) cells to cut a grid into: at most `budget`, at most one a token.

    Of the h x w that cannot grow on either side, the one whose aspect is closest to the grid's; then the
    larger; then the one with more rows. All frames are kept where the budget has a cell for each.
    """
    frames, height, width = grid
    kept_frames = min(frames, budget)
    area = budget // kept_frames
    shapes = {(rows, min(width, area // rows)) for rows in range(1, min(height, area) + 1)}
    maximal = [(rows, cols) for rows, cols in shapes if rows == height or (rows + 1) * cols > area]

    def rank(shape: tuple[int, int]) -> tuple[float, int, int]:
        rows, cols = shape
        mismatch = abs(math.log(rows * width / (cols * height)))
        return round(mismatch, 9), -rows * cols, -rows

    return (kept_frames, *min(maximal, key=rank))


def cell_count(grid: Grid3, budget: int) -> int:
    """How many cells a grid is cut into; as many as it has tokens where these are within the budget."""
    tokens = math.prod(grid)
    return tokens if budget >= tokens else math.prod(cell_grid(grid, budget))


def spans(length: int, cells: int) -> list[tuple[int, int]]:
    """Start and end of each of `cells` runs over `length` places; runs overlap where it does not divide."""
    return [(i * length // cells, -(-(i + 1) * length // cells)) for i in range(cells)]


def cut(grid: Grid3, cells: Grid3) -> list[Cell]:
    """The cells in raster order; their centres are distinct and ascending."""
    _, height, width = grid
    axes = [spans(length, count) for length, count in zip(grid, cells, strict=True)]

    def place(frame: int, row: int, col: int) -> int:
        return (frame * height + row) * width + col

    return [
        Cell(
            members=tuple(place(*at) for at in itertools.product(*(range(*run) for run in runs))),
            centre=place(*((start + end - 1) // 2 for start, end in runs)),
        )
        for runs in itertools.product(*axes)
    ]
