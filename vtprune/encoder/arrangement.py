"""The order in which a decoder sees the tokens of a picture that was encoded in several pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """A rectangle of vision tokens: the whole image, one frame of a video, the base crop of a picture that is cut into
    crops, or what the other crops make together; grid (t, h, w), in vision tokens."""

    grid: tuple[int, int, int]

    @property
    def tokens(self) -> int:
        """Vision tokens of the rectangle."""
        return self.grid[0] * self.grid[1] * self.grid[2]


@dataclass(frozen=True)
class Arrangement:
    """How one image or video in the decoder is made of the patches of its units (crops, frames), all on the host.

    units: (t, h, w) of each unit; parts: the rectangles that its vision tokens form, in their order; sources: (T, k)
    the patches that each token is made of, counted through the units; weights: (T, k) the share of each of them, None
    where k is 1; length: its placeholders in the prompt; slots: (T,) at which of these each token stands (None: in
    order); the others are no vision tokens (ends of rows). projected: whether the projector sees tokens, not patches.
    """

    units: tuple[tuple[int, int, int], ...]
    parts: tuple[Part, ...]
    sources: Tensor
    length: int
    weights: Tensor | None = None
    slots: Tensor | None = None
    projected: bool = False

    @property
    def tokens(self) -> int:
        """T."""
        return self.sources.shape[0]

    @property
    def patches(self) -> int:
        """Patches of all its units."""
        return sum(t * h * w for t, h, w in self.units)

    @property
    def mixed(self) -> bool:
        """Whether tokens are means of patches, so that no patch can be dropped by itself."""
        return self.weights is not None

    @cached_property
    def visible(self) -> Tensor:
        """(patches,) bool, which of them some token is made of."""
        seen = torch.zeros(self.patches, dtype=torch.bool)
        seen[self.sources.flatten()] = True
        return seen

    def gather(self, values: Tensor, part: int) -> Tensor:
        """(n, ...) values of the tokens of one part, from those of all patches (P, ...)."""
        start = sum(one.tokens for one in self.parts[:part])
        rows = slice(start, start + self.parts[part].tokens)
        found = values[self.sources[rows].to(values.device)]
        if self.weights is None:
            return found[:, 0]
        weights = self.weights[rows].to(found).view(*found.shape[:2], *(1,) * (values.ndim - 1))
        return (found * weights).sum(dim=1)


def visible_patches(arrangements: Sequence[Arrangement]) -> Tensor | None:
    """(U, N) bool, which patches of each unit of these images the decoder sees; None for all of them."""
    if all(bool(one.visible.all()) for one in arrangements):
        return None
    units = [list(one.visible.split([t * h * w for t, h, w in one.units])) for one in arrangements]
    return torch.nn.utils.rnn.pad_sequence([unit for own in units for unit in own], batch_first=True)
