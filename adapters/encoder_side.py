"""What an adapter knows of a vision encoder: its layers, and how what it is given becomes tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

from torch import nn

from vtprune.method.facts import ModelFacts


class EncoderSide(ABC):
    """A vision encoder, alone or as a part of a model.

    `name` is what `vtprune list` shows, `models` the model classes that it takes, `notes` what is particular about
    them.
    """

    name: ClassVar[str]
    models: ClassVar[tuple[str, ...]]
    notes: ClassVar[str]
    # Whether a layer puts out the sum of what the norm before its MLP was given and of what the MLP puts out.
    adds_mlp: ClassVar[bool] = False

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
    def check(self) -> None:
        """Raises VTPruneError for a configuration of the model that cannot be pruned rightly."""

    def check_stages(self, *, encoder: bool) -> None:
        """Raises VTPruneError where this model cannot be pruned at a stage; `encoder`: inside its encoder."""
        return
