"""What Python has to know of a decoder's input before its layers run: read back from the device at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
# By row, and by which of the row's conversations it is.
Key = tuple[int, int]


@dataclass(frozen=True)
class Outline:
    """Where text, images and padding stand in an input of B rows and L tokens, on the host.

    number: (B, L) which of its row's conversations each token belongs to, -1 for padding; marks: (B, L) for each
    source, its placeholders; answers: (B, L) what the labels mark as an answer, or None.
    """

    number: Ints
    marks: tuple[Bools, ...] = ()
    answers: Bools | None = None

    @classmethod
    def read(
        cls, number: Tensor | None, marks: Sequence[Tensor], answers: Tensor | None, *, shape: tuple[int, int]
    ) -> Outline:
        """Of tensors (B, L), in one transfer; number None: every token belongs to its row's one conversation."""
        parts = [*([] if number is None else [number]), *([] if answers is None else [answers]), *marks]
        if not parts:
            return cls(np.zeros(shape, dtype=np.int64))
        device = parts[-1].device
        found = iter(torch.stack([part.to(device, torch.int64) for part in parts]).cpu().numpy())
        numbers = np.zeros(shape, dtype=np.int64) if number is None else next(found)
        answer = None if answers is None else next(found) > 0
        return cls(numbers, tuple(one > 0 for one in found), answer)

    @cached_property
    def most(self) -> int:
        """Conversations of the row that holds the most."""
        return max(1, int(self.number.max(initial=0)) + 1)

    def counts(self) -> list[list[int]]:
        """(B, most) the tokens of each conversation."""
        return [[int((row == talk).sum()) for talk in range(self.most)] for row in self.number]

    def asked(self, images: Bools) -> Ints:
        """`number` without what the labels mark as an answer, which no prompt holds; a conversation whose text is all
        answer is left as it is. images: (B, L) where a vision token stands."""
        if self.answers is None:
            return self.number
        found = self.number.copy()
        for row, own in enumerate(found):
            answer = self.answers[row] & ~images[row]
            for talk in range(self.most):
                mine = own == talk
                if (mine & ~images[row] & ~answer).any():
                    own[mine & answer] = -1
        return found
