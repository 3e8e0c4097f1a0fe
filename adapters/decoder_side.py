"""What an adapter knows of a decoder: its layers, its positions and its cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from vtprune.adapters.offloading import loaded
from vtprune.adapters.seams import QK_NORMS, Projections, uses_flash
from vtprune.cost.sizes import ModelCost, TransformerCost
from vtprune.decoder.prompt import PromptInfo
from vtprune.tensors.compaction import gather_tokens
from vtprune.tensors.rotary import rotate, turned
from vtprune.tensors.taps import tapped

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from vtprune.cache.books import CacheLayer


class DecoderSide(ABC):
    """The decoder of a model; inner: the module that holds it beside the encoder."""

    inner: Any

    @property
    @abstractmethod
    def cost(self) -> ModelCost:
        """The sizes of this model."""

    @cached_property
    def decoder_sizes(self) -> TransformerCost:
        """Those of the decoder's layers, which do not change; read once, as a config takes long to answer."""
        return self.cost.decoder

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

    def decoder_output(self, layer: Any) -> nn.Module:
        """The projection of what the heads of one decoder layer find."""
        output: nn.Module = layer.self_attn.o_proj
        return output

    def decoder_norm(self, layer: Any) -> nn.Module:
        """The norm before the attention of one decoder layer."""
        norm: nn.Module = layer.input_layernorm
        return norm

    def decoder_normed(self, layer: Any) -> Callable[[Tensor], Tensor]:
        """The same, which may be called while the layer does not run."""
        module = self.decoder_norm(layer)

        def norm(states: Tensor) -> Tensor:
            with loaded(layer):
                normed: Tensor = module(states)
            return normed

        return norm

    def final_normed(self, states: Tensor) -> Tensor:
        """Hidden states (..., D) of any layer as the norm behind the last one, maybe on another device, makes them."""
        normed: Tensor = self.inner.language_model.norm(states)
        return normed.to(states.device)

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

    @cached_property
    def decoder_scale(self) -> float:
        """Softmax scale of the decoder."""
        states = self.state_layers
        layer: Any = next(layer for index, layer in enumerate(self.decoder_layers) if index not in states)
        return float(layer.self_attn.scaling)

    def decoder_query(
        self, taps: dict[str, Tensor], embeddings: tuple[Tensor, Tensor], last: Tensor | int | None = None
    ) -> Tensor:
        """q (B, H, n, d) in fp32 with rotary embedding, from what was tapped (`decoder_taps`); where `last` (B, C) is
        given, only those (B, H, C, d) in these columns, of which a number is one of all rows."""
        query = tapped(taps, "q")
        if last is not None:
            query, embeddings = _columns(query, last), (_columns(embeddings[0], last), _columns(embeddings[1], last))
        return self._turned(query, _angles(embeddings))

    def decoder_keys(self, taps: dict[str, Tensor], embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """k (B, KV, n, d) with rotary embedding, from what was tapped: the bits that a cache would hold."""
        cos, sin = embeddings
        return turned(self._split(tapped(taps, "k")), cos.unsqueeze(-3), sin.unsqueeze(-3))

    def decoder_values(self, taps: dict[str, Tensor]) -> Tensor:
        """v (B, KV, n, d), from what was tapped."""
        return self._split(tapped(taps, "v"))

    def repeated(self, states: Tensor) -> Tensor:
        """(B, KV, n, d) states of key-value heads, all or some, in fp32 and repeated to the heads that share them."""
        times = self.decoder_sizes.heads // self.decoder_sizes.kv_heads
        return states.float() if times == 1 else states.float().repeat_interleave(times, dim=1)

    def query_and_keys(
        self, layer: Any, hidden: Tensor, embeddings: tuple[Tensor, Tensor], last: Tensor | int
    ) -> tuple[Tensor, Tensor]:
        """What a decoder layer would compute from the hidden states (B, n, D) before it: the queries (B, H, C, d) of
        the tokens in columns `last`, and the keys (B, H, n, d) of all, both in fp32 with rotary embedding."""
        attention, modules = self.decoder_attention(layer), self.decoder_projections(layer).modules()
        norms, normed = self.decoder_norms(layer).modules(), self.decoder_normed(layer)(hidden)
        with loaded(layer), loaded(attention):
            query, key = self.projected_query(modules["q"](_columns(normed, last))), modules["k"](normed)
            query, key = self._normed(query, norms.get("q")), self._normed(key, norms.get("k"))
        cos, sin = embeddings
        turn = _angles((_columns(cos, last), _columns(sin, last)))
        return self._turned(query, turn), self.repeated(self._turned(key, _angles(embeddings)))

    def keys_and_values(self, layer: Any, hidden: Tensor, embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The keys, with rotary embedding, and values (B, KV, n, d) that a decoder layer has of the hidden states
        (B, n, D) before it, as it hands them to its cache; embeddings: (B or 1, n, d) cosines and sines."""
        normed = self.decoder_normed(layer)(hidden)
        with loaded(layer), loaded(self.decoder_attention(layer)):
            value = self._split(self.decoder_projections(layer).modules()["v"](normed))
        return self._keys(layer, normed, embeddings), value

    def keys(self, layer: Any, hidden: Tensor, embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """The keys (B, KV, n, d) of `keys_and_values` alone."""
        return self._keys(layer, self.decoder_normed(layer)(hidden), embeddings)

    def _keys(self, layer: Any, normed: Tensor, embeddings: tuple[Tensor, Tensor]) -> Tensor:
        with loaded(layer), loaded(self.decoder_attention(layer)):
            key = self._split(self.decoder_projections(layer).modules()["k"](normed))
            norm = self.decoder_norms(layer).modules().get("k")
            key = key if norm is None else norm(key)
        cos, sin = (part.unsqueeze(-3) for part in embeddings)
        return rotate(key, cos, sin)

    def projected_query(self, states: Tensor) -> Tensor:
        """(B, n, heads * d) the queries among what their projection puts out: all of it, unless a family says else."""
        return states

    def _split(self, states: Tensor) -> Tensor:
        """(B, n, heads * d) or (B, n, heads, d) states as (B, heads, n, d)."""
        size = self.decoder_sizes.head_size
        return states.reshape(*states.shape[:2], states.shape[2:].numel() // size, size).transpose(1, 2)

    def _normed(self, states: Tensor, norm: nn.Module | None) -> Tensor:
        """(B, n, heads * d) queries or keys through their norm, head by head, where there is one."""
        if norm is None:
            return states
        normed: Tensor = norm(states.unflatten(-1, (-1, self.decoder_sizes.head_size)))
        return normed

    def _turned(self, states: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """(B, n, heads * d) or (B, n, heads, d) queries or keys as (B, heads, n, d) in fp32, turned by `_angles`."""
        return rotate(self._split(states).float(), *angles)

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


def _angles(embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Rotary embeddings (B, n, d) for all heads: (B, 1, n, d) in fp32."""
    cos, sin = embeddings
    return cos.unsqueeze(-3).float(), sin.unsqueeze(-3).float()


def _columns(states: Tensor, last: Tensor | int) -> Tensor:
    """The states (B, C, ...) in the columns `last` (B, C), or in the one of all rows."""
    return states[:, last : last + 1] if isinstance(last, int) else gather_tokens(states, last)
