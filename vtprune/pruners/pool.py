"""Adaptive average pooling of the token grid: the merging baseline."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool3d

from vtprune.method.answers import Merge, Selection
from vtprune.method.registry import register
from vtprune.method.stages import BeforeDecoder, Read
from vtprune.method.views import VisionStream
from vtprune.pruners.parts.cells import Grid3, cell_count, cell_grid, cut
from vtprune.pruners.parts.checks import check_whole_grid
from vtprune.tensors.attention import at_least_single


def pool_features(features: Tensor, grid: Grid3, cells: Grid3) -> Tensor:
    """Mean of (t * h * w, D) vectors over each of t' * h' * w' cells, summed in fp32 at the least; in their dtype."""
    frames, height, width = grid
    volume = rearrange(at_least_single(features), "(t h w) d -> 1 d t h w", t=frames, h=height, w=width)
    pooled = rearrange(adaptive_avg_pool3d(volume, cells), "1 d t h w -> (t h w) d")
    return pooled.to(features.dtype)


@register("pool", paper="", licence="Apache-2.0", needs="vision tokens", serves="features")
@dataclass(frozen=True)
class Pool(BeforeDecoder):
    """Averages the tokens (after the projector or the merger) over the cells of a smaller grid.

    The cells are the largest h' x w' within the budget whose aspect is closest to the image's grid, per
    image. A merged token takes the place of the member nearest its cell's centre. Cells overlap where the
    sizes do not divide, as in adaptive average pooling: such a token is a member of several. Scores nothing.
    `default_keep` 0.25.
    """

    input_reads = frozenset({Read.WHOLE_GRID})

    def _entering(self, grid: Grid3) -> int:
        """One token a cell."""
        return cell_count(grid, self.budget(math.prod(grid)))

    def select(self, stream: VisionStream) -> Selection:
        """Merges every cell into one token; raises VTPruneError if an earlier stage dropped tokens."""
        check_whole_grid(self.name, stream)
        shape = cell_grid(stream.grid, stream.budget)
        cells = cut(stream.grid, shape)
        merges = (Merge(cell.centre, cell.members, (1 / len(cell.members),) * len(cell.members)) for cell in cells)

        def mix(values: Tensor) -> Tensor:
            return pool_features(values, stream.grid, shape)

        return Selection(
            kept=torch.tensor([cell.centre for cell in cells], device=stream.features.device),
            vectors=mix(stream.features),
            merges=tuple(merge for merge in merges if len(merge.members) > 1),
            sound=True,
            mix=mix,
        )
