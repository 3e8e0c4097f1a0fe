"""LLaVA-NeXT, LLaVA-NeXT-Video and LLaVA-OneVision: pictures of any size as crops, videos of pooled frames.

One file, as they are one family: a picture goes through the tower whole and in crops, which make one large grid
without the padding around it; a newline token ends each row of it. Where each patch goes is what the model's own
functions say: they are run on the rows and columns of patches in place of features.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from vtprune.adapters.llava import LlavaAdapter
from vtprune.adapters.seams import Source
from vtprune.encoder.arrangement import Arrangement, Part
from vtprune.encoder.encoding import EncodedImage, Encoding
from vtprune.errors import UnsupportedModelError
from vtprune.method.kinds import VIDEO

# What stands for the row and the column of a newline.
NEWLINE = -1.0
# Sizes of pictures whose arrangement is kept.
MOST_SIZES = 256


class LlavaNextAdapter(LlavaAdapter):
    """`LlavaNextForConditionalGeneration`; a picture's crops share its budget by what the decoder sees of each."""

    name = "llava_next"
    models = ("LlavaNextForConditionalGeneration",)
    notes = "as llava; pictures of any size in crops, whose newline tokens are never pruned as vision tokens"
    model_types = ("llava_next",)

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        # By size and crops, how pictures were made of patches so far.
        self._known: dict[tuple[tuple[int, int], int], Arrangement] = {}

    @property
    def _side(self) -> int:
        """Patches along a side of a crop."""
        vision = self.model.config.vision_config
        return int(vision.image_size // vision.patch_size)

    @property
    def newlines(self) -> bool:
        return True

    def start_encoding(self, source: Source, arguments: dict[str, Any]) -> Encoding:
        self._check_layers(arguments)
        arrangements = self._arrangements(source, arguments)
        return self._encoding(
            [unit for one in arrangements for unit in one.units],
            device=arguments[source.pixels].device,
            kind=source.kind,
            units=[len(one.units) for one in arrangements],
            arrangements=arrangements,
        )

    def _arrangements(self, source: Source, arguments: dict[str, Any]) -> list[Arrangement]:
        if source.kind == VIDEO:
            videos, frames = arguments[source.pixels].shape[:2]
            return [self._video(int(frames))] * int(videos)
        # Read back once.
        sizes: list[list[int]] = torch.as_tensor(arguments["image_sizes"]).tolist()
        return [
            self._picture((height, width), crops)
            for (height, width), crops in zip(sizes, self._crops(sizes, arguments), strict=True)
        ]

    def _crops(self, sizes: Sequence[Sequence[int]], arguments: dict[str, Any]) -> list[int]:
        """How many crops each picture of these sizes (height, width) goes through the tower as, itself included."""
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        config = self.model.config
        side = config.vision_config.image_size
        return [int(image_size_to_num_patches(list(size), config.image_grid_pinpoints, side)) for size in sizes]

    def _pack(self, features: list[Tensor], size: tuple[int, int], newline: Tensor) -> Tensor:
        """(L, C) what the model makes of the features (crops, N, C) of one picture of this size."""
        strategy = self.model.config.vision_feature_select_strategy
        packed = self.inner.pack_image_features(
            features, torch.tensor([size]), vision_feature_select_strategy=strategy, image_newline=newline
        )
        found: Tensor = packed[0][0]
        return found

    def _picture(self, size: tuple[int, int], crops: int) -> Arrangement:
        if (size, crops) not in self._known:
            if len(self._known) == MOST_SIZES:
                self._known.clear()
            self._known[size, crops] = self._new_picture(size, crops)
        return self._known[size, crops]

    def _new_picture(self, size: tuple[int, int], crops: int) -> Arrangement:
        from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

        side, config = self._side, self.model.config
        units = ((1, side, side),) * crops
        base = Part((1, side, side))
        places = torch.arange(side * side)
        if crops == 1:
            return Arrangement(units, (base,), places[:, None], length=side * side + 1, slots=places)
        across = get_anyres_image_grid_shape(list(size), config.image_grid_pinpoints, config.vision_config.image_size)[
            1
        ]
        cells = _cells(side).expand(crops, -1, -1).clone()
        for crop in range(crops - 1):
            cells[1 + crop] += torch.tensor([crop // across * side, crop % across * side])
        found = self._pack([cells], size, torch.full((2,), NEWLINE, dtype=torch.float64))[side * side :]
        newline = found[:, 0] == NEWLINE
        rows = int(newline.sum())
        own = found[~newline]
        parts = base, Part((1, rows, len(own) // rows))
        sources, weights = _neighbours(own, side, across)
        # The base crop comes first.
        sources = torch.cat([places[:, None].expand(-1, sources.shape[1]), sources + side * side])
        if weights is not None:
            alone = torch.zeros(side * side, weights.shape[1], dtype=weights.dtype)
            alone[:, 0] = 1
            weights = torch.cat([alone, weights])
        slots = torch.cat([places, side * side + (~newline).nonzero().flatten()])
        return Arrangement(units, parts, sources, length=side * side + len(found), weights=weights, slots=slots)

    def _video(self, frames: int) -> Arrangement:
        raise UnsupportedModelError(f"{self.name} takes pictures only")

    def pixels(self, source: Source, arguments: dict[str, Any], encoding: Encoding) -> list[Tensor]:
        given = arguments[source.pixels]
        if given.ndim == 5:
            # Pictures of fewer crops are filled up.
            given = torch.cat([own[:count] for own, count in zip(given, encoding.units, strict=True)])
        return list(given.split(1))

    def picture(self, image: EncodedImage) -> Tensor:
        return self.real_colours(self.laid_out(image))

    def laid_out(self, image: EncodedImage) -> Tensor:
        return torch.stack([self.part_pixels(image, part) for part in range(len(image.parts))])

    def part_pixels(self, image: EncodedImage, part: int) -> Tensor:
        assert image.pixels is not None
        assert image.arrangement is not None
        _, height, width = image.parts[part].grid
        size = self.model.config.vision_config.patch_size
        patches = rearrange(image.pixels, "u c (h a) (w b) -> (u h w) c a b", a=size, b=size)
        return rearrange(image.arrangement.gather(patches, part), "(h w) c a b -> c (h a) (w b)", h=height, w=width)


class LlavaOnevisionAdapter(LlavaNextAdapter):
    """`LlavaOnevisionForConditionalGeneration`; large pictures are shrunk, and videos pooled, after the projector:
    their tokens are means of patches, which cannot be dropped inside the encoder."""

    name = "llava_onevision"
    models = ("LlavaOnevisionForConditionalGeneration",)
    notes = "as llava_next; videos, too; tokens of videos and of pictures that the model shrinks are means of patches"
    model_types = ("llava_onevision",)

    def sources(self) -> tuple[Source, ...]:
        return *super().sources(), Source(VIDEO, self.model.config.video_token_id)

    def _crops(self, sizes: Sequence[Sequence[int]], arguments: dict[str, Any]) -> list[int]:
        several = arguments.get("batch_num_images")
        whole = [True] * len(sizes)
        if several is not None:
            # Pictures of one prompt that has several are not cut into crops.
            whole = [count == 1 for count in torch.as_tensor(several).tolist() for _ in range(count)]
        found = super()._crops(sizes, arguments)
        return [count if cut else 1 for count, cut in zip(found, whole, strict=True)]

    def _pack(self, features: list[Tensor], size: tuple[int, int], newline: Tensor) -> Tensor:
        ratio = self.model.config.vision_aspect_ratio
        packed = self.inner.pack_image_features(
            features, torch.tensor([size]), image_newline=newline, vision_aspect_ratio=ratio
        )
        found: Tensor = packed[0][0]
        return found

    def _video(self, frames: int) -> Arrangement:
        # One newline ends the whole video.
        return _video(self._pooled(), self._side, frames, newlines=1)

    def _pooled(self) -> Tensor:
        """(n, 2) the row and the column of each token of a frame, in patches."""
        found: Tensor = self.inner.apply_pooling(_cells(self._side)[None])[0]
        return found


class LlavaNextVideoAdapter(LlavaNextAdapter):
    """`LlavaNextVideoForConditionalGeneration`; frames are pooled before the projector."""

    name = "llava_next_video"
    models = ("LlavaNextVideoForConditionalGeneration",)
    notes = "as llava_next; a token of a video is the mean of 2x2 patches"
    model_types = ("llava_next_video",)

    def sources(self) -> tuple[Source, ...]:
        return *super().sources(), Source(VIDEO, self.model.config.video_token_id)

    def check(self) -> None:
        super().check()
        mode = self.model.config.spatial_pool_mode
        if mode != "average":
            raise UnsupportedModelError(
                f"spatial_pool_mode={mode!r} makes tokens of a video that are no means of patches; only 'average' is "
                "supported"
            )

    def _video(self, frames: int) -> Arrangement:
        pooled = self.inner.vision_resampler(_cells(self._side)[None])[0]
        return _video(pooled, self._side, frames, newlines=0, projected=True)


def _cells(side: int) -> Tensor:
    """(side * side, 2) the row and the column of each patch of a crop, in raster order."""
    both = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack(both, dim=-1).flatten(0, 1).to(torch.float64)


def _neighbours(cells: Tensor, side: int, across: int) -> tuple[Tensor, Tensor | None]:
    """The patches (T, k), counted crop by crop, that stand around rows and columns (T, 2) of a grid which is `across`
    crops wide, and the share (T, k) of each in what is interpolated there; where all stand on a patch, k is 1 and
    shares are None."""
    low = (cells + 1e-6).floor()
    part = (cells - low).where(cells - low > 1e-6, 0)
    if not part.any():
        return _patch(low.long(), side, across)[:, None], None
    # The next patch only where it has a share, as there may be none.
    high = low + (part > 0)
    sources, shares = [], []
    for row, column in itertools.product((0, 1), (0, 1)):
        at = torch.stack([(high if row else low)[:, 0], (high if column else low)[:, 1]], dim=-1)
        sources.append(_patch(at.long(), side, across))
        shares.append((part[:, 0] if row else 1 - part[:, 0]) * (part[:, 1] if column else 1 - part[:, 1]))
    return torch.stack(sources, dim=1), torch.stack(shares, dim=1)


def _patch(cells: Tensor, side: int, across: int) -> Tensor:
    """(T,) the number of the patch in each row and column (T, 2) of the grid."""
    row, column = cells.unbind(dim=1)
    crop = row // side * across + column // side
    return crop * side * side + row % side * side + column % side


def _video(pooled: Tensor, side: int, frames: int, *, newlines: int, projected: bool = False) -> Arrangement:
    """A video of so many frames, the tokens of each of which stand in these rows and columns (n, 2) of its patches."""
    sources, weights = _neighbours(pooled, side, 1)
    height = len(pooled[:, 0].unique())
    first = torch.arange(frames).repeat_interleave(len(pooled))[:, None] * side * side
    tokens = frames * len(pooled)
    return Arrangement(
        ((1, side, side),) * frames,
        (Part((1, height, len(pooled) // height)),) * frames,
        sources.repeat(frames, 1) + first,
        length=tokens + newlines,
        weights=None if weights is None else weights.repeat(frames, 1),
        slots=torch.arange(tokens),
        projected=projected,
    )
