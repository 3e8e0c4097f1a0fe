"""What a method may ask about the model that it meets, and the sizes that its own arithmetic depends on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModelFacts:
    """What a method may ask about the model that it is wrapped around.

    has_cls: whether the vision encoder has a CLS token; encoder_depth: encoder layers that feed the features;
    decoder_depth: decoder layers; group: encoder patches that form one vision token; source: the folder or hub
    id that the model came from, "" if it is not known; first: whether no other method acts before this one;
    decoder_width, encoder_width: size of the decoder's and the encoder's hidden states; decoder_kv_heads,
    decoder_mlp_width: the decoder's key-value heads, the channels of its MLP; attention_layers: the decoder layers
    with attention, None where all have it (those without fold their tokens into a state, and nothing can be read of
    what they attend to).
    """

    has_cls: bool
    encoder_depth: int
    decoder_depth: int
    group: int
    source: str = ""
    first: bool = True
    decoder_width: int = 0
    attention_layers: tuple[int, ...] | None = None
    encoder_width: int = 0
    decoder_kv_heads: int = 0
    decoder_mlp_width: int = 0

    @property
    def readable(self) -> tuple[int, ...]:
        """The decoder layers whose attention can be read."""
        return tuple(range(self.decoder_depth)) if self.attention_layers is None else self.attention_layers


# What a method answers for before it meets a model: LLaVA-1.5-7B, on which most papers report.
PUBLISHED = ModelFacts(
    has_cls=True,
    encoder_depth=23,
    decoder_depth=32,
    group=1,
    decoder_width=4096,
    encoder_width=1024,
    decoder_kv_heads=32,
    decoder_mlp_width=11008,
)


@dataclass(frozen=True)
class Work:
    """The sizes that a method's own arithmetic depends on, for one image or video.

    patches: encoder patches of the whole image (N * group, where tokens are no means of patches, and none is padding);
    tokens: N vision tokens of the whole image; shown: tokens
    that the encoder left; kept: tokens that enter the decoder; encoder_width, encoder_heads: of the vision tower;
    decoder_width, decoder_heads: of the decoder; prompt: tokens of the row that the decoder sees at layer 0;
    encoder_patches: patches alive in each encoder layer; encoder_layers, decoder_layers: the layers after
    which the method scored; text: text tokens of the row, text_after: those after the image; has_cls: whether the
    encoder has a CLS token; decoder_kv_width: of the keys; decoder_tokens: tokens of the row in each of
    `decoder_layers`, image_tokens: of the image alone; first_asked: for each of them, whether no earlier image of the
    row was scored there, so that what the images share counts for this one; memory: what `remember` answered, of the
    tokens left in the end; probed: tokens of the row that the method's probe saw; decoder_pairs: queries times keys of
    the row in each decoder layer, () without a cache; images: how many of the row's images the method acts on;
    units: the pieces of equal size (frames) that the encoder attends within; decoder_query_width: of the decoder's
    queries, 0 where that is `decoder_width`.
    """

    patches: int
    tokens: int
    shown: int
    kept: int
    encoder_width: int
    encoder_heads: int
    decoder_width: int
    decoder_heads: int
    prompt: int
    text: int
    encoder_patches: tuple[int, ...]
    encoder_layers: tuple[int, ...]
    decoder_layers: tuple[int, ...]
    has_cls: bool = True
    text_after: int = 0
    decoder_kv_width: int = 0
    decoder_tokens: tuple[int, ...] = ()
    first_asked: tuple[bool, ...] = ()
    image_tokens: tuple[int, ...] = ()
    memory: dict[str, Any] = field(default_factory=dict)
    probed: int = 0
    decoder_pairs: tuple[int, ...] = ()
    images: int = 1
    units: int = 1
    decoder_query_width: int = 0

    @property
    def attention_width(self) -> int:
        """Of the decoder's queries: all heads together, which need not be as wide as its hidden states."""
        return self.decoder_query_width or self.decoder_width

    @property
    def encoder_pairs(self) -> int:
        """Queries times keys of one encoder layer that attends within whole units, queries of CLS tokens left out."""
        return self.patches * (self.patches // self.units + self.has_cls)
