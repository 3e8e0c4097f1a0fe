"""The parts of VisionZip: dominant tokens, and the targets that the rest flows into."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtprune.pruners.flow import top_mask
from vtprune.selection import EncoderSelection


@dataclass(frozen=True)
class Zipped:
    """dominant, targets: (B, N) bool, the tokens that go on; into: (B, N) int64, for every other one the column of
    its target (kept tokens: their own), -1 on padding and where an image has no targets."""

    dominant: Tensor
    targets: Tensor
    into: Tensor

    def selection(self, *, merge: bool, cls: Tensor | None) -> EncoderSelection:
        """What goes on: each target plus the mean of what flows into it, or the target as it is without `merge`.

        cls: (B,) bool, the images whose CLS token takes the place of the first token that does not go on (that
        token still flows into its target).
        """
        keep = self.dominant | self.targets
        column = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
        into = self.into if merge else column.masked_fill(~keep, -1)
        flows = (into >= 0) & ~keep
        counts = torch.zeros(keep.shape, device=keep.device).scatter_add_(1, into.clamp(min=0), flows.float())
        weights = torch.where(flows, 1 / counts.gather(1, into.clamp(min=0)).clamp(min=1), 1.0)
        if cls is None:
            return EncoderSelection(keep, into, weights)
        place = (~keep).int().argmax(dim=1)
        keep = keep | ((column == place[:, None]) & cls[:, None])
        return EncoderSelection(keep, into, weights, place.masked_fill(~cls, -1))


def zip_tokens(scores: Tensor, metric: Tensor, valid: Tensor, dominant: Tensor, contextual: Tensor) -> Zipped:
    """Which tokens go on, and where the others would flow to, in a batch of images.

    scores: (B, N); metric: (B, N, d) unit vectors; valid: (B, N) bool, padding on the right; dominant,
    contextual: (B,) how many of each. The targets stand in the rest, in raster order, at 0, step, 2 step ...
    with step = max(1, rest // contextual); every other token of the rest flows into the target with the highest
    cosine. Ties go to the lowest index.
    """
    chosen = top_mask(scores, dominant, valid)
    rest = valid & ~chosen
    rank = rest.cumsum(dim=1) - 1
    step = (rest.sum(dim=1) // contextual.clamp(min=1)).clamp(min=1)[:, None]
    targets = rest & (rank % step == 0) & (rank // step < contextual[:, None])
    column = torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
    most = int(targets.sum(dim=1).max())
    if most == 0:
        return Zipped(chosen, targets, column.masked_fill(~chosen, -1))
    columns = torch.sort((~targets).to(torch.uint8), dim=1, stable=True).indices[:, :most]
    there = targets.gather(1, columns)
    ends = metric.gather(1, columns[..., None].expand(-1, -1, metric.shape[-1]))
    cosines = torch.matmul(metric, ends.transpose(1, 2)).masked_fill(~there[:, None], float("-inf"))
    nearest = columns.gather(1, cosines.argmax(dim=-1))
    into = torch.where(rest & ~targets, nearest, column)
    return Zipped(chosen, targets, into.masked_fill(~valid | (rest & ~there[:, :1]), -1))
