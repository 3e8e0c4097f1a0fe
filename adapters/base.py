"""What an adapter knows of a model family: an encoder's side, a decoder's side, and what lies between them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtprune.adapters.decoder_side import DecoderSide
from vtprune.adapters.encoder_side import EncoderSide
from vtprune.adapters.seams import Projections, Source
from vtprune.cost.sizes import ModelCost
from vtprune.encoder.encoding import EncodedImage, Encoding
from vtprune.method.beside import image_statistics
from vtprune.method.kinds import IMAGE


class Adapter(EncoderSide, DecoderSide):
    """One wrapped model, seen through the seams that its family shares.

    Subclasses live in one file a family and know no pruner. `model_types` is what their configs call themselves.
    """

    model_types: ClassVar[tuple[str, ...]]

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.inner: Any = model.model

    @classmethod
    @abstractmethod
    def sizes(cls, config: Any) -> ModelCost:
        """The sizes that the cost of a model with this config (of one of `model_types`) depends on; raises
        UnsupportedModelError for a tower or a decoder that is not known."""

    @property
    def cost(self) -> ModelCost:
        """The sizes of this model."""
        return self.sizes(self.model.config)

    @property
    @abstractmethod
    def projectors(self) -> tuple[nn.Module, ...]:
        """The modules between encoder and decoder (a projector or a merger), each of which is given the features."""

    def sources(self) -> tuple[Source, ...]:
        """What a prompt may show: images, unless a family says more."""
        return (Source(IMAGE, self.model.config.image_token_id),)

    @abstractmethod
    def encoder_projections(self, layer: nn.Module) -> Projections:
        """The projections of one encoder layer."""

    def sized_attentions(self) -> list[tuple[Any, str, Callable[..., Any]]]:
        """Methods to replace, as `overrides`, so that encoder attention can weigh keys by token sizes; none where
        the encoder's attention takes a mask."""
        return []

    @property
    def returns_dicts(self) -> bool:
        """Whether the model answers with output objects, not tuples, where it is not told."""
        return bool(self.model.config.return_dict)

    @property
    def plane_mergers(self) -> tuple[nn.Module, ...]:
        """The modules that make, of what a layer of the tower puts out, the values that the decoder adds to its vision
        tokens after each of its first layers (deepstack), one for each of these; none unless a family has some."""
        return ()

    def change_planes(self, output: Any, change: Callable[[int, Sequence[Tensor]], Sequence[Tensor]]) -> None:
        """Puts in the output of `source.encode`, in the place of the values (n, D) of each image in each plane, what
        `change` makes of them; nothing where there are none."""
        return

    def take_planes(self, arguments: dict[str, Any]) -> tuple[list[Tensor], Tensor] | None:
        """Takes these values (V, D), one for each of the first layers, out of the decoder's arguments, with where they
        stand, (B, L) bool; None where there are none."""
        return None

    def placeholders(self, source: Source, input_ids: Tensor | None, inputs_embeds: Tensor) -> Tensor:
        """(B, L) True where a placeholder of `source` stands."""
        token = source.token
        if input_ids is not None:
            return input_ids == token
        embedding = self.inner.get_input_embeddings()
        marker = embedding(torch.tensor(token, device=inputs_embeds.device))
        return (inputs_embeds == marker).all(dim=-1)

    def overrides(self) -> list[tuple[Any, str, Callable[..., Any]]]:
        """Methods of this instance to replace while wrapped: (object, name, replacement)."""
        return []

    @abstractmethod
    def start_encoding(self, source: Source, arguments: dict[str, Any]) -> Encoding:
        """The state of one encoder pass, from the bound arguments of `source.encode`."""

    @abstractmethod
    def pixels(self, source: Source, arguments: dict[str, Any], encoding: Encoding) -> list[Tensor]:
        """The pixels of each unit of the encoder's pass, that of `encoding`."""

    @abstractmethod
    def picture(self, image: EncodedImage) -> Tensor:
        """(t, 3, H, W) the pixels of one image, or of each frame of a video, as the encoder got them, in [0, 1]."""

    def laid_out(self, image: EncodedImage) -> Tensor:
        """The pixels of an image or a video whose tokens form one grid, laid out by it: as the encoder got them,
        unless a family makes tokens otherwise."""
        assert image.pixels is not None
        return image.pixels

    def part_pixels(self, image: EncodedImage, part: int) -> Tensor:
        """(3, H, W) the pixels of one of the rectangles that an image's tokens form, where a family has several."""
        return self.laid_out(image)

    @property
    def published_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation (RGB) that the family's published processors normalise with: CLIP's."""
        return (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

    def real_colours(self, pixels: Tensor) -> Tensor:
        """(t, 3, H, W) normalised pixels put back into [0, 1], by the statistics of the model's own processor where
        it is on this machine."""
        known = image_statistics(self.source) or self.published_statistics
        mean, std = (pixels.new_tensor(values, dtype=torch.float32).view(3, 1, 1) for values in known)
        return (pixels.float() * std + mean).clamp(0, 1)

    @property
    def source(self) -> str:
        """The folder or hub id that the model came from, "" if it is not known."""
        return str(getattr(self.model.config, "_name_or_path", "") or "")
