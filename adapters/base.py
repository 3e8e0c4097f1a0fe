"""What an adapter knows of a model family: where features, placeholders, positions and layers live."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from vtprune.adapters.offloading import loaded
from vtprune.cost.sizes import ModelCost
from vtprune.decoder.prompt import PromptInfo
from vtprune.encoder.encoding import EncodedImage, Encoding
from vtprune.method.beside import image_statistics
from vtprune.method.facts import ModelFacts
from vtprune.method.kinds import IMAGE, VIDEO
from vtprune.tensors.attention import split_heads
from vtprune.tensors.compaction import gather_tokens
from vtprune.tensors.rotary import rotate
from vtprune.tensors.taps import tapped

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from vtprune.cache.books import CacheLayer


@dataclass(frozen=True)
class Projections:
    """Modules of one attention layer whose outputs are tapped, by name ("q", "k", "v" or "qkv")."""

    owner: nn.Module
    names: dict[str, str]

    def modules(self) -> dict[str, nn.Module]:
        """The modules as they are now (PEFT and quantisers replace them)."""
        return {tap: getattr(self.owner, name) for tap, name in self.names.items()}


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


class Adapter(ABC):
    """One wrapped model, seen through the seams that its family shares.

    Subclasses live in one file a family and know no pruner. `name` is what `vtprune list` shows, `models` the
    model classes that it takes, `notes` what is particular about them, `model_types` what their configs call
    themselves.
    """

    name: ClassVar[str]
    models: ClassVar[tuple[str, ...]]
    notes: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.inner: Any = model.model

    @classmethod
    def takes(cls, model: object) -> bool:
        """Whether this adapter knows the model's class."""
        return any(base.__name__ in cls.models for base in type(model).__mro__)

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
    def vision_tower(self) -> nn.Module:
        """The vision encoder."""

    @property
    @abstractmethod
    def encoder_layers(self) -> Iterable[nn.Module]:
        """All layers of the vision encoder, in order."""

    @property
    @abstractmethod
    def projectors(self) -> tuple[nn.Module, ...]:
        """The modules between encoder and decoder (a projector or a merger), each of which is given the features."""

    def sources(self) -> tuple[Source, ...]:
        """What a prompt may show: images, unless a family says more."""
        return (Source(IMAGE, self.model.config.image_token_id),)

    @property
    @abstractmethod
    def encoder_scale(self) -> float:
        """Softmax scale of the vision encoder."""

    @abstractmethod
    def facts(self) -> ModelFacts:
        """What methods may ask about the model."""

    @abstractmethod
    def encoder_projections(self, layer: nn.Module) -> Projections:
        """The projections of one encoder layer."""

    @abstractmethod
    def encoder_mlp(self, layer: nn.Module) -> tuple[nn.Module, nn.Module]:
        """The norm before the MLP of one encoder layer, and the MLP."""

    def sized_attentions(self) -> list[tuple[Any, str, Callable[..., Any]]]:
        """Methods to replace, as `overrides`, so that encoder attention can weigh keys by token sizes; none where
        the encoder's attention takes a mask."""
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

    @abstractmethod
    def check(self) -> None:
        """Raises VTPruneError for a configuration of the model that cannot be pruned rightly."""

    def check_stages(self, *, encoder: bool) -> None:
        """Raises VTPruneError where this model cannot be pruned at a stage; `encoder`: inside its encoder."""
        return

    @property
    def language_model(self) -> nn.Module:
        """The decoder without its head."""
        return self.inner.language_model

    @property
    def decoder_layers(self) -> Iterable[nn.Module]:
        """The decoder layers, in order."""
        return self.inner.language_model.layers

    @property
    def state_layers(self) -> frozenset[int]:
        """The decoder layers of linear attention, which fold their tokens into a state and have no rows of attention
        to be seen; none unless a family has some."""
        return frozenset()

    @property
    def attention_layers(self) -> tuple[int, ...] | None:
        """The decoder layers with attention, None for all."""
        states = self.state_layers
        depth = len(list(self.decoder_layers))
        return tuple(layer for layer in range(depth) if layer not in states) if states else None

    def decoder_projections(self, layer: Any) -> Projections:
        """The projections of one decoder layer with attention."""
        return Projections(layer.self_attn, {"q": "q_proj", "k": "k_proj", "v": "v_proj"})

    def decoder_norms(self, layer: Any) -> Projections:
        """The norms of queries and keys between projection and rotary embedding, on (B, n, H, d), where there are
        some."""
        owner = self.decoder_projections(layer).owner
        found = {tap: name for tap, name in QK_NORMS.items() if isinstance(getattr(owner, name, None), nn.Module)}
        return Projections(owner, found)

    def decoder_taps(self, layer: Any) -> Projections:
        """What is tapped of one decoder layer: queries and keys as they go into the rotary embedding, and values."""
        projections = self.decoder_projections(layer)
        return Projections(projections.owner, {**projections.names, **self.decoder_norms(layer).names})

    def decoder_attention(self, layer: Any) -> nn.Module:
        """The attention of one decoder layer, which runs before its MLP and is given the layer's keyword arguments."""
        attention: nn.Module = layer.self_attn
        return attention

    def decoder_norm(self, layer: Any) -> Callable[[Tensor], Tensor]:
        """The norm before the attention of one decoder layer, which may be called while the layer does not run."""

        def norm(states: Tensor) -> Tensor:
            with loaded(layer):
                normed: Tensor = layer.input_layernorm(states)
            return normed

        return norm

    def decoder_mlp(self, layer: Any) -> nn.Module:
        """The MLP of one decoder layer, whose output is added to the residual."""
        mlp: nn.Module = layer.mlp
        return mlp

    @property
    def flash(self) -> bool:
        """Whether the decoder's attention is a flash kernel, which takes no mask of its own for each query."""
        return uses_flash(self.inner.language_model.config)

    @property
    def windows(self) -> bool:
        """Whether some decoder layer attends within a sliding window."""
        return any("sliding" in kind for kind in getattr(self.inner.language_model.config, "layer_types", None) or ())

    @property
    def caches(self) -> bool:
        """Whether the decoder makes a cache where it is not told."""
        return bool(self.inner.language_model.config.use_cache)

    @property
    def records_states(self) -> bool:
        """Whether the decoder hands out hidden states where it is not told."""
        return bool(self.inner.language_model.config.output_hidden_states)

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

    @property
    def decoder_scale(self) -> float:
        """Softmax scale of the decoder."""
        states = self.state_layers
        layer: Any = next(layer for index, layer in enumerate(self.decoder_layers) if index not in states)
        return float(layer.self_attn.scaling)

    def decoder_states(
        self, taps: dict[str, Tensor], embeddings: tuple[Tensor, Tensor], last: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v (B, H, n, d) in fp32 with rotary embedding, key-value heads repeated to H, from what was tapped
        (`decoder_taps`); where `last` (B, C) is given, only the queries (B, H, C, d) in these columns, and no values.
        """
        query, value, turn = tapped(taps, "q"), tapped(taps, "v"), embeddings
        if last is not None:
            query, value = gather_tokens(query, last), value[:, :0]
            turn = _columns(embeddings, last)
        query, key = self._turned(query, turn), self._turned(tapped(taps, "k"), embeddings)
        return query, self._repeated(key), self._repeated(self._split(value).float())

    def decoder_query(self, taps: dict[str, Tensor], embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """q (B, H, n, d) in fp32 with rotary embedding."""
        return self._turned(tapped(taps, "q"), embeddings)

    def query_and_keys(
        self, layer: Any, hidden: Tensor, embeddings: tuple[Tensor, Tensor], last: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What a decoder layer would compute from the hidden states (B, n, D) before it: the queries (B, H, C, d) of
        the tokens in columns `last` (B, C), and the keys (B, H, n, d) of all, as in `decoder_states`."""
        attention, modules = self.decoder_attention(layer), self.decoder_projections(layer).modules()
        norms, normed = self.decoder_norms(layer).modules(), self.decoder_norm(layer)(hidden)
        with loaded(layer), loaded(attention):
            query, key = self.projected_query(modules["q"](gather_tokens(normed, last))), modules["k"](normed)
            query, key = self._normed(query, norms.get("q")), self._normed(key, norms.get("k"))
        return self._turned(query, _columns(embeddings, last)), self._repeated(self._turned(key, embeddings))

    def projected_query(self, states: Tensor) -> Tensor:
        """(B, n, heads * d) the queries among what their projection puts out: all of it, unless a family says else."""
        return states

    def _split(self, states: Tensor) -> Tensor:
        """(B, n, heads * d) or (B, n, heads, d) states as (B, heads, n, d)."""
        states = states.flatten(2)
        return split_heads(states, states.shape[-1] // self.cost.decoder.head_size)

    def _normed(self, states: Tensor, norm: nn.Module | None) -> Tensor:
        """(B, n, heads * d) queries or keys through their norm, head by head, where there is one."""
        if norm is None:
            return states
        normed: Tensor = norm(states.unflatten(-1, (-1, self.cost.decoder.head_size)))
        return normed

    def _turned(self, states: Tensor, embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """(B, n, heads * d) or (B, n, heads, d) queries or keys as (B, heads, n, d) in fp32, with rotary embedding."""
        cos, sin = (part.unsqueeze(-3).float() for part in embeddings)
        return rotate(self._split(states).float(), cos, sin)

    def _repeated(self, states: Tensor) -> Tensor:
        """(B, KV, n, d) states of key-value heads, repeated to all heads."""
        return states.repeat_interleave(self.cost.decoder.heads // states.shape[1], dim=1)

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

    def remember(self, layers: list[CacheLayer], prompt: PromptInfo) -> None:
        """Stores with the cache what later forwards need (M-RoPE deltas); nothing by default."""
        return

    def rotary(self, states: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary embeddings of (B, n) 1-D positions."""
        return self.inner.language_model.rotary_emb(states, positions)

    @property
    def renumbers(self) -> bool:
        """Whether positions="compact" is defined (1-D positions)."""
        return True

    @property
    def newlines(self) -> bool:
        """Whether some of an image's placeholders are no vision tokens but end its rows."""
        return False

    def new_cache(self) -> Cache:
        """The cache that the model would make for itself."""
        from transformers.cache_utils import DynamicCache

        return DynamicCache(config=self.inner.language_model.config)


def _columns(embeddings: tuple[Tensor, Tensor], last: Tensor) -> tuple[Tensor, Tensor]:
    """The rotary embeddings (B, C, d) of the columns `last` (B, C)."""
    cos, sin = embeddings
    return gather_tokens(cos, last), gather_tokens(sin, last)


def uses_flash(config: Any) -> bool:
    """Whether the attention of a tower or a decoder with this config is a flash kernel."""
    return "flash" in (config._attn_implementation or "")
