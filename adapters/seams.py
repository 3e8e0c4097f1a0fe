"""The words in which adapters say where things are: projections to look at, and kinds of things in a prompt."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import nn

from vtprune.method.kinds import IMAGE, VIDEO


@dataclass(frozen=True)
class Projections:
    """Modules of one attention layer whose outputs are tapped, by name ("q", "k", "v" or "qkv")."""

    owner: nn.Module
    names: dict[str, str]

    def modules(self) -> dict[str, nn.Module]:
        """The modules as they are now (PEFT and quantisers replace them)."""
        return {tap: getattr(self.owner, name) for tap, name in self.names.items()}

    def only(self, taps: Collection[str]) -> Projections:
        """Those of these names."""
        return Projections(self.owner, {tap: name for tap, name in self.names.items() if tap in taps})


# Norms of queries and keys, by tap, as transformers names them.
QK_NORMS = {"q": "q_norm", "k": "k_norm"}
# By kind, the names that transformers has for the method of the inner model that encodes it and for its pixels.
ENCODE = {IMAGE: "get_image_features", VIDEO: "get_video_features"}
PIXELS = {IMAGE: "pixel_values", VIDEO: "pixel_values_videos"}


@dataclass(frozen=True)
class Source:
    """One kind of thing that a prompt shows: images, or videos.

    kind: what it is called in the `mm_encoder_outputs` of `generate`; token: the id of its placeholder.
    """

    kind: str
    token: int

    @property
    def encode(self) -> str:
        """The method of the inner model that makes its features."""
        return ENCODE[self.kind]

    @property
    def pixels(self) -> str:
        """The argument that holds its pixels."""
        return PIXELS[self.kind]


def uses_flash(config: Any) -> bool:
    """Whether the attention of a tower or a decoder with this config is a flash kernel."""
    return "flash" in (config._attn_implementation or "")
