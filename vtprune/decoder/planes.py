"""Values that a decoder adds to its vision tokens after each of its first layers (deepstack): a plane a layer.

The model adds them between its layers, at the full length of the prompt; here each layer gets those of the tokens that
it has. They are part of the tokens: one that others flow into takes theirs along.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vtprune.method.answers import Selection
from vtprune.tensors.compaction import gather_tokens


class Planes:
    """The planes of one forward's input: values (V, D) of each, and where these stand (B, L), in row-major order."""

    def __init__(self, values: Sequence[Tensor], marks: Tensor) -> None:
        # A last row of zeros is that of every place without a vision token.
        self._values = [torch.cat([own, own.new_zeros(1, own.shape[-1])]) for own in values]
        number = marks.long().flatten().cumsum(0).view_as(marks) - 1
        self._rows = torch.where(marks, number, self._values[0].shape[0] - 1)

    @property
    def depth(self) -> int:
        """After so many layers, the first ones, something is added."""
        return len(self._values)

    def at(self, index: int, places: Tensor | None) -> Tensor:
        """(B, n, D) what layer `index` adds to the tokens at `places` (B, n), None: to all."""
        rows = self._rows if places is None else gather_tokens(self._rows, places)
        return self._values[index][rows]

    def follow(self, selection: Selection, row: int, places: Tensor, *, start: int) -> None:
        """Lets tokens of a row take along, from layer `start` on, the values of those that flow into them; places:
        (N,) of the tokens that the selection was made of."""
        own = self._rows[row, places.to(self._rows.device)]
        merges = () if selection.mix is not None else selection.merged()
        if selection.mix is None and not merges:
            return
        for index in range(start, self.depth):
            values = self._values[index]
            if selection.mix is not None:
                into, new = own[selection.kept.to(own.device)], selection.mix(values[own])
            else:
                into = torch.stack([own[merge.into] for merge in merges])
                new = torch.stack([_weighted(values[own[list(merge.members)]], merge.weights) for merge in merges])
            self._values[index] = values.index_copy(0, into, new)


def _weighted(values: Tensor, weights: Sequence[float]) -> Tensor:
    """(D,) the sum of (M, D) values with weights."""
    return (values * values.new_tensor(weights)[:, None]).sum(dim=0)
