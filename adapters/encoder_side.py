"""What an adapter knows of a vision encoder: its layers, and how what it is given becomes tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtprune.adapters.seams import Source
from vtprune.encoder.encoding import EncodedImage, Encoding
from vtprune.method.beside import image_statistics
from vtprune.method.facts import ModelFacts


class EncoderSide(ABC):
    """A vision encoder, alone or as a part of a model.

    `name` is what `vtprune list` shows, `models` the model classes that it takes, `notes` what is particular about
    them.
    """

    name: ClassVar[str]
    models: ClassVar[tuple[str, ...]]
    notes: ClassVar[str]

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    @classmethod
    def takes(cls, model: object) -> bool:
        """Whether this adapter knows the model's class."""
        return any(base.__name__ in cls.models for base in type(model).__mro__)

    @property
    @abstractmethod
    def vision_tower(self) -> nn.Module:
        """The vision encoder."""

    @property
    @abstractmethod
    def encoder_layers(self) -> Iterable[nn.Module]:
        """All layers of the vision encoder, in order."""

    @property
    @abstractmethod
    def encoder_scale(self) -> float:
        """Softmax scale of the vision encoder."""

    @abstractmethod
    def facts(self) -> ModelFacts:
        """What methods may ask about the model."""

    @abstractmethod
    def encoder_mlp(self, layer: nn.Module) -> tuple[nn.Module, nn.Module]:
        """The norm before the MLP of one encoder layer, and the MLP."""

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

    @abstractmethod
    def check(self) -> None:
        """Raises VTPruneError for a configuration of the model that cannot be pruned rightly."""

    def check_stages(self, *, encoder: bool) -> None:
        """Raises VTPruneError where this model cannot be pruned at a stage; `encoder`: inside its encoder."""
        return
