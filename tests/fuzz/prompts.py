"""Batches of rows of text, images and videos: ragged, padded on either side, with several of them, with none."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from tests.fuzz.architectures import END, IMAGE, PAD, PATCH, START, TEXT, VIDEO, Architecture

# Decode steps after each prompt.
STEPS = 3

# Seconds between frames of a video.
SECONDS = 0.75

# A number of words, the height and width of an image in vision tokens, or the frames, height and width of a video.
Item = int | tuple[int, int] | tuple[int, int, int]
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
    """A batch, ready to be fed. real: (B, L + STEPS) what is no padding; images: the places of each image or video of
    each row; steps: (B, STEPS) the tokens that are fed one by one after it."""

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
        words[:, : self.length] &= ~is_vision(self.inputs["input_ids"])
        return words


def is_vision(ids: Tensor) -> Tensor:
    """Where a vision token stands."""
    return (ids == IMAGE) | (ids == VIDEO)


def draw_layout(rng: Random, shape: Architecture) -> Layout:
    """One to three rows with up to three images or videos each."""
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


def _size(rng: Random, shape: Architecture) -> Item:
    if not shape.is_qwen:
        return shape.side, shape.side
    if rng.random() < 0.25:
        return rng.randint(1, 4), rng.randint(1, 4), rng.randint(2, 4)
    if rng.random() < 0.08:
        return rng.randint(1, 2), rng.randint(1, 2)
    return rng.randint(3, 6), rng.randint(3, 7)


def build(shape: Architecture, layout: Layout, only: int | None = None) -> Prompt:
    """The batch, or one of its rows by itself: the same words and pixels, without padding."""
    ids, places, steps = [], [], []
    pixels: dict[int, list[Tensor]] = {IMAGE: [], VIDEO: []}
    grids: dict[int, list[list[int]]] = {IMAGE: [], VIDEO: []}
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
    shape: Architecture,
    item: Item,
    generator: torch.Generator,
    pixels: dict[int, list[Tensor]],
    grids: dict[int, list[list[int]]],
) -> tuple[Tensor, range]:
    """The ids of an item, and which of them are the tokens of an image or a video."""
    if isinstance(item, int):
        return torch.randint(TEXT, IMAGE, (item,), generator=generator), range(0)
    token, frames, (height, width) = (IMAGE, 1, item) if len(item) == 2 else (VIDEO, item[0], item[1:])
    image = torch.full((frames * height * width,), token)
    if not shape.is_qwen:
        pixels[token].append(
            torch.randn(1, 3, PATCH * height, PATCH * width, generator=generator, dtype=torch.float64)
        )
        return image, range(len(image))
    pixels[token].append(torch.randn(4 * len(image), 3 * 2 * PATCH**2, generator=generator, dtype=torch.float64))
    grids[token].append([frames, 2 * height, 2 * width])
    return torch.cat([torch.tensor([START]), image, torch.tensor([END])]), range(1, len(image) + 1)


def _assemble(
    shape: Architecture,
    layout: Layout,
    ids: list[Tensor],
    pictures: tuple[dict[int, list[Tensor]], dict[int, list[list[int]]]],
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
    if pixels[IMAGE]:
        inputs["pixel_values"] = torch.cat(pixels[IMAGE])
    if pixels[VIDEO]:
        inputs["pixel_values_videos"] = torch.cat(pixels[VIDEO])
        inputs["second_per_grid_ts"] = torch.full((len(grids[VIDEO]),), SECONDS)
    if shape.is_qwen:
        inputs["mm_token_type_ids"] = (batch == IMAGE).long() + 2 * (batch == VIDEO)
        for name, token in (("image", IMAGE), ("video", VIDEO)):
            if grids[token]:
                inputs[f"{name}_grid_thw"] = torch.tensor(grids[token])
    return Prompt(inputs, real, places, steps)
