"""Which tokens of one input belong together: an image is judged by the text of its own conversation, up to its end."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vtprune.tensors.compaction import pick


@dataclass
class Conversations:
    """The conversations that the rows of one input hold: one a row, or several that are packed into it.

    number: (B, L) which of its row's conversations each token belongs to, -1 for padding; most: of the row that holds
    the most.
    """

    number: Tensor
    most: int = 1
    # What was found for the places that were asked for last: layers in a row often ask for the same.
    _found: tuple[Tensor | None, tuple[Tensor, Tensor]] | None = field(default=None, init=False, repr=False)

    def ends(self, places: Tensor | None) -> tuple[Tensor, Tensor]:
        """The columns, among the tokens at `places` (B, n) (None: all), of each conversation's first and last token:
        both (B, most), 0 where a row holds fewer."""
        if self._found is None or self._found[0] is not places:
            number = self.number if places is None else pick(self.number, places)
            own = number[:, None] == torch.arange(self.most, device=number.device)[:, None]
            column = torch.arange(number.shape[1], device=number.device)
            self._found = places, (own.int().argmax(dim=2), (own * column).max(dim=2).values)
        return self._found[1]

    def running_sum(self, values: Tensor) -> Tensor:
        """(B, L) the sum of `values` (B, L) up to each token, from the first one of its conversation on."""
        whole = values.cumsum(dim=1)
        if self.most == 1:
            return whole
        before = (whole - values).gather(1, self.ends(None)[0])
        return whole - before.gather(1, self.number.clamp(min=0))


def numbers_by_positions(positions: Tensor, real: Tensor) -> Tensor:
    """(B, L) which of its row's conversations each token belongs to, -1 where it is not `real` (B, L): one begins
    wherever the (B or 1, L) text positions do not go on by one."""
    first = torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1
    return (first.long().cumsum(dim=-1).expand(real.shape)).masked_fill(~real, -1)


def numbers_by_mask(sees: Tensor, real: Tensor) -> Tensor:
    """(B, L) the same where one begins at each real token that does not see the real one before it; `sees` (B, L, L):
    which token (the last axis) each one sees."""
    place = torch.arange(real.shape[1], device=real.device)
    before = torch.where(real, place, -1).cummax(dim=1).values.roll(1, dims=1)
    before[:, 0] = -1
    goes_on = sees.gather(2, before.clamp(min=0)[..., None])[..., 0] & (before >= 0)
    number = (real & ~goes_on).long().cumsum(dim=1) - 1
    return number.masked_fill(~real, -1)
