"""Positions of prompts whose images have lost tokens: those of the whole prompt.

An engine lays positions down before it knows which tokens an image keeps. So text has its positions from the start, as
if each image were whole, and an image's tokens have that of its first one in the first row; where they stand in the
image travels with their vectors, as whole numbers that half precision holds, and is added when they are read. The
first row is never changed: it can be done again, and for a part of an image, as prompts are read in chunks or anew.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# bfloat16 holds whole numbers up to 256: rows and columns travel in two digits each.
BASE = 128
CHANNELS = 4


def with_places(vectors: Tensor, kept: Tensor, width: int) -> Tensor:
    """(K, D + CHANNELS): the vectors, and the row and column of each in a grid of this width."""
    row, column = kept // width, kept % width
    digits = torch.stack([row // BASE, row % BASE, column // BASE, column % BASE], dim=1)
    return torch.cat([vectors, digits.to(vectors)], dim=1)


def without_places(vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(K, D), and the (K,) rows and columns that came with them."""
    digits = vectors[:, -CHANNELS:].round().long()
    row, column = digits[:, 0] * BASE + digits[:, 1], digits[:, 2] * BASE + digits[:, 3]
    return vectors[:, :-CHANNELS], row, column


def planned(length: int, spans: Sequence[tuple[int, int, int]]) -> tuple[Tensor, int]:
    """(3, length) positions before anything is encoded, and what positions of new tokens are ahead of their index.

    spans: where each image's kept tokens start in the prompt, how many they are, and how far positions advance over
    the whole image, in the order of the prompt.
    """
    places, seen, at = torch.empty(length, dtype=torch.long), 0, 0
    for start, count, advance in spans:
        places[seen:start] = torch.arange(at, at + start - seen)
        at += start - seen
        places[start : start + count] = at
        at, seen = at + advance, start + count
    places[seen:] = torch.arange(at, at + length - seen)
    return places.expand(3, -1).clone(), at - seen


def replaced(images: Tensor, rows: Sequence[tuple[Tensor, Tensor]], positions: Tensor, start: int) -> Tensor:
    """The positions (3, L) with those of the images, or parts of them, that are read now.

    images: (L,) which tokens are an image's; rows: for each part, in order, what is added to the place of the image's
    first token in the second and in the third row, (K,) each; start: the first token that is read now.
    """
    found, at = positions.clone(), start
    for own in rows:
        at += int(images[at:].int().argmax())
        end = at + len(own[0])
        for row, added in enumerate(own, start=1):
            found[row, at:end] = found[0, at:end] + added.to(found.device)
        at = end
    return found
