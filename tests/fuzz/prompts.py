"""Batches of rows of text and images: ragged, padded on either side, with several images, with none."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from tests.fuzz.architectures import END, IMAGE, PAD, PATCH, START, TEXT, Architecture

# Decode steps after each prompt.
STEPS = 3

# A number of words, or the height and width of an image in vision tokens.
Item = int | tuple[int, int]
Row = tuple[Item, ...]


@dataclass(frozen=True)
class Layout:
    """The shape of a batch. side: where the padding is; extra: columns of padding beyond what the rows need; masked:
    whether the attention mask is handed in where there is no padding, too."""

    rows: tuple[Row, ...]
    side: str
    extra: int
    masked: bool
    seed: int


@dataclass
class Prompt:
    """A batch, ready to be fed. real: (B, L + STEPS) what is no padding; images: the places of each image of each row;
    steps: (B, STEPS) the tokens that are fed one by one after it."""

    inputs: dict[str, Tensor]
    real: Tensor
    images: list[list[Tensor]]
    steps: Tensor

    @property
    def length(self) -> int:
        """L, padding included."""
        return self.inputs["input_ids"].shape[1]

    @property
    def positions(self) -> Tensor:
        """(B, L + STEPS) the place of each token among its row's."""
        return (self.real.long().cumsum(dim=1) - 1).clamp(min=0)

    @property
    def words(self) -> Tensor:
        """(B, L + STEPS) what is neither padding nor a part of an image."""
        words = self.real.clone()
        words[:, : self.length] &= self.inputs["input_ids"] != IMAGE
        return words


def draw_layout(rng: Random, shape: Architecture) -> Layout:
    """One to three rows with up to three images each."""
    rows = tuple(_row(rng, shape) for _ in range(rng.choice([1, 1, 2, 2, 3])))
    return Layout(
        rows, rng.choice(["left", "right"]), rng.choice([0, 0, 0, 2]), rng.random() < 0.4, rng.randrange(10**6)
    )


def _row(rng: Random, shape: Architecture) -> Row:
    count = rng.choices([0, 1, 2, 3], [1, 7, 3, 1])[0]
    if not count:
        return (rng.randint(1, 9),)
    items: list[Item] = []
    for _ in range(count):
        if rng.random() < 0.85:
            items.append(rng.randint(1, 6))
        items.append(_size(rng, shape))
    if rng.random() < 0.85:
        items.append(rng.randint(1, 8))
    return tuple(items)


def _size(rng: Random, shape: Architecture) -> tuple[int, int]:
    if not shape.is_qwen:
        return shape.side, shape.side
    if rng.random() < 0.08:
        return rng.randint(1, 2), rng.randint(1, 2)
    return rng.randint(3, 6), rng.randint(3, 7)


def build(shape: Architecture, layout: Layout, only: int | None = None) -> Prompt:
    """The batch, or one of its rows by itself: the same words and pixels, without padding."""
    ids, places, steps = [], [], []
    pixels: list[Tensor] = []
    grids: list[list[int]] = []
    for number, row in enumerate(layout.rows):
        if only is not None and number != only:
            continue
        generator = torch.Generator().manual_seed(layout.seed + number)
        parts, own, length = [], [], 0
        for item in row:
            part, image = _part(shape, item, generator, pixels, grids)
            if image:
                own.append(torch.arange(length + image.start, length + image.stop))
            parts.append(part)
            length += len(part)
        ids.append(torch.cat(parts))
        places.append(own)
        steps.append(torch.randint(TEXT, IMAGE, (STEPS,), generator=generator))
    extra = layout.extra if only is None else 0
    return _assemble(shape, layout, ids, (pixels, grids), places, torch.stack(steps), extra)


def _part(
    shape: Architecture, item: Item, generator: torch.Generator, pixels: list[Tensor], grids: list[list[int]]
) -> tuple[Tensor, range]:
    """The ids of an item, and which of them are an image's tokens."""
    if isinstance(item, int):
        return torch.randint(TEXT, IMAGE, (item,), generator=generator), range(0)
    height, width = item
    image = torch.full((height * width,), IMAGE)
    if not shape.is_qwen:
        pixels.append(torch.randn(1, 3, PATCH * height, PATCH * width, generator=generator, dtype=torch.float64))
        return image, range(len(image))
    pixels.append(torch.randn(4 * height * width, 3 * 2 * PATCH**2, generator=generator, dtype=torch.float64))
    grids.append([1, 2 * height, 2 * width])
    return torch.cat([torch.tensor([START]), image, torch.tensor([END])]), range(1, len(image) + 1)


def _assemble(
    shape: Architecture,
    layout: Layout,
    ids: list[Tensor],
    pictures: tuple[list[Tensor], list[list[int]]],
    places: list[list[Tensor]],
    steps: Tensor,
    extra: int,
) -> Prompt:
    pixels, grids = pictures
    length = max(map(len, ids)) + extra
    batch = torch.full((len(ids), length), PAD)
    real = torch.ones(len(ids), length + STEPS, dtype=torch.bool)
    for row, one in enumerate(ids):
        start = length - len(one) if layout.side == "left" else 0
        batch[row, start : start + len(one)] = one
        real[row, :length] = False
        real[row, start : start + len(one)] = True
        places[row] = [image + start for image in places[row]]
    inputs = {"input_ids": batch}
    if layout.masked or not bool(real.all()):
        inputs["attention_mask"] = real[:, :length].long()
    if pixels:
        inputs["pixel_values"] = torch.cat(pixels)
    if shape.is_qwen:
        inputs["mm_token_type_ids"] = (batch == IMAGE).long()
        if grids:
            inputs["image_grid_thw"] = torch.tensor(grids)
    return Prompt(inputs, real, places, steps)
