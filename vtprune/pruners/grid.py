"""A uniform grid of tokens: the spatial baseline."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vtprune.method.answers import Selection
from vtprune.method.registry import register
from vtprune.method.stages import BeforeDecoder, Read
from vtprune.method.views import VisionStream
from vtprune.pruners.parts.cells import Grid3, cell_count, cell_grid, cut
from vtprune.pruners.parts.checks import check_whole_grid


@register("grid", paper="", licence="Apache-2.0", needs="nothing", serves="features")
@dataclass(frozen=True)
class Grid(BeforeDecoder):
    """The token nearest the centre of each cell of a smaller grid.

    The cells are those that `pool` averages: the h' x w' within the budget whose aspect is closest to the
    image's grid, so fewer tokens than asked may stay (60 of a 24 x 24 grid keeps 8 x 7). `default_keep` 0.25.
    """

    input_reads = frozenset({Read.WHOLE_GRID})

    def _entering(self, grid: Grid3) -> int:
        """One token a cell."""
        return cell_count(grid, self.budget(math.prod(grid)))

    def select(self, stream: VisionStream) -> Selection:
        """Keeps one token a cell; raises VTPruneError if an earlier stage already dropped tokens."""
        check_whole_grid(self.name, stream)
        centres = [cell.centre for cell in cut(stream.grid, cell_grid(stream.grid, stream.budget))]
        return Selection(torch.tensor(centres, device=stream.features.device), sound=True)
