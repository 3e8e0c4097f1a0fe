"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: dynamic resolution, a packed tower, a 2x2 merger, M-RoPE positions.

One file, as they are one family: they differ in the tower's blocks alone (Qwen2.5-VL's attend within windows but for a
few), of which vtprune sees the order of the packed sequence and the sizes.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor, nn

from vtprune.adapters.base import Adapter
from vtprune.adapters.seams import Projections, Source
from vtprune.adapters.sizes import model_sizes, pair, tower_sizes
from vtprune.cache.names import ROPE_DELTA
from vtprune.cost.sizes import ModelCost, PackedVisionCost, TransformerCost
from vtprune.decoder.prompt import PromptInfo
from vtprune.encoder.encoding import EncodedImage, Encoding
from vtprune.encoder.packed import SIZE_BIAS, PackedEncoding
from vtprune.errors import UnsupportedModelError
from vtprune.method.facts import ModelFacts
from vtprune.method.kinds import IMAGE, VIDEO
from vtprune.tensors.rotary import rotate

if TYPE_CHECKING:
    from vtprune.cache.books import CacheLayer


# The arguments that say how large images and videos are, and how far apart in time the frames of these lie.
SIZES = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")


class Qwen2VLAdapter(Adapter):
    """`Qwen2VLForConditionalGeneration`; images and videos, several a prompt and of any size."""

    name = "qwen2_vl"
    models = ("Qwen2VLForConditionalGeneration",)
    notes = "no CLS token: received attention instead; whole 2x2 merge groups are kept; images and videos"
    adds_mlp = True

    model_types = ("qwen2_vl",)

    @classmethod
    def sizes(cls, config: Any) -> ModelCost:
        tower = config.vision_config
        width = tower.embed_dim
        blocks = tower_sizes(width, tower.num_heads, int(width * tower.mlp_ratio), gated=False, layers=tower.depth)
        return _sizes(config, blocks, tower.hidden_size)

    def check(self) -> None:
        return

    @property
    def vision_tower(self) -> nn.Module:
        return self.inner.visual

    @property
    def encoder_layers(self) -> Iterable[nn.Module]:
        return self.inner.visual.blocks

    @property
    def projectors(self) -> tuple[nn.Module, ...]:
        return (self.inner.visual.merger,)

    @property
    def encoder_scale(self) -> float:
        return float(self.inner.visual.blocks[0].attn.scaling)

    @property
    def renumbers(self) -> bool:
        return False

    @property
    def _merge(self) -> int:
        return int(self.model.config.vision_config.spatial_merge_size)

    def sources(self) -> tuple[Source, ...]:
        config = self.model.config
        return Source(IMAGE, config.image_token_id), Source(VIDEO, config.video_token_id)

    def facts(self) -> ModelFacts:
        config, text = self.model.config, self.model.config.get_text_config()
        return ModelFacts(
            has_cls=False,
            encoder_depth=config.vision_config.depth,
            decoder_depth=text.num_hidden_layers,
            group=self._merge**2,
            source=self.source,
            decoder_width=text.hidden_size,
            decoder_kv_heads=self.cost.decoder.kv_heads,
            decoder_mlp_width=self.cost.decoder.mlp_width,
            attention_layers=self.attention_layers,
            encoder_width=config.vision_config.hidden_size,
        )

    def encoder_projections(self, layer: Any) -> Projections:
        return Projections(layer.attn, {"qkv": "qkv"})

    def encoder_mlp(self, layer: Any) -> tuple[nn.Module, nn.Module]:
        return layer.norm2, layer.mlp

    def start_encoding(self, source: Source, arguments: dict[str, Any]) -> Encoding:
        # Read back once; all that follows from it is made on the host.
        grid_thw: list[list[int]] = arguments[_grids(source)].tolist()
        vision, merge = self.model.config.vision_config, self._merge
        return PackedEncoding(
            # A frame is what attention never leaves.
            [(1, h // merge, w // merge) for t, h, w in grid_thw for _ in range(t)],
            units=[t for t, _, _ in grid_thw],
            kind=source.kind,
            group=merge**2,
            prefix=0,
            heads=vision.num_heads,
            depth=vision.depth,
            last=vision.depth - 1,
            device=arguments[source.pixels].device,
            order=self._order(grid_thw),
        )

    def _order(self, grid_thw: list[list[int]]) -> Tensor:
        """(S,) the raster index of the merge group at each place of the tower's sequence, on the host: in order."""
        return torch.arange(sum(t * h * w for t, h, w in grid_thw) // self._merge**2, device="cpu")

    def pixels(self, source: Source, arguments: dict[str, Any], encoding: Encoding) -> list[Tensor]:
        return list(arguments[source.pixels].split([total * encoding.group for total in encoding.totals]))

    def picture(self, image: EncodedImage) -> Tensor:
        assert image.pixels is not None
        vision, merge = self.model.config.vision_config, self._merge
        frames, height, width = image.grid
        # A patch is several frames of a video deep in time; an image is repeated to fill it. The first is the picture.
        pattern = "(t h w gh gw) (c time ph pw) -> time t c (h gh ph) (w gw pw)"
        sizes = {"t": frames, "h": height, "w": width, "gh": merge, "gw": merge}
        size = vision.patch_size
        return self.real_colours(
            rearrange(image.pixels, pattern, **sizes, time=vision.temporal_patch_size, ph=size, pw=size)[0]
        )

    def sized_attentions(self) -> list[tuple[Any, str, Callable[..., Any]]]:
        attentions = [block.attn for block in self.inner.visual.blocks]
        return [(one, "forward", _sized_attention(one, one.forward)) for one in attentions]

    def overrides(self) -> list[tuple[Any, str, Callable[..., Any]]]:
        return [
            (self.inner, "compute_3d_position_ids", self._compute_3d_position_ids()),
            (self.model, "_prepare_position_ids_for_generation", self._prepare_position_ids()),
        ]

    def _compute_3d_position_ids(self) -> Callable[..., Any]:
        original = self.inner.compute_3d_position_ids
        signature = inspect.signature(original)

        def compute_3d_position_ids(*args: Any, **kwargs: Any) -> Tensor | None:
            """As the model's own, with the delta that belongs to this cache instead of the last one computed."""
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            values = given.arguments
            cache, delta = _cache_and_delta(values)
            if delta is None:
                return original(*args, **kwargs)
            embeds, mask = values["inputs_embeds"], values["attention_mask"]
            past, length = cache.get_seq_length(), embeds.shape[1]
            text = _text_positions(mask, embeds.shape[0], past=past, length=length, device=embeds.device)
            input_ids, types = values["input_ids"], values["mm_token_type_ids"]
            if input_ids is None or types is None or not bool(types[:, -length:].any()):
                return text[None] + delta.to(text.device)
            return self._positions_of_new(
                input_ids, types[:, -length:], given=values, text=text, delta=delta, mask=mask
            )

        return compute_3d_position_ids

    def _prepare_position_ids(self) -> Callable[..., Any]:
        original = self.model._prepare_position_ids_for_generation

        def prepare(inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
            """As the model's own, for a cache that this wrapped model has filled before."""
            cache, delta = _cache_and_delta(model_kwargs)
            if cache is None or delta is None:
                return original(inputs_tensor, model_kwargs)
            input_ids = model_kwargs.get("input_ids", inputs_tensor)
            past = cache.get_seq_length()
            mask = model_kwargs.get("attention_mask")
            batch, total = input_ids.shape[:2]
            text = _text_positions(mask, batch, past=0, length=total, device=input_ids.device)
            shifted = text[None].expand(3, -1, -1) + delta.to(text.device)
            types = model_kwargs.get("mm_token_type_ids")
            if types is not None and bool(types[:, past:].any()):
                new = self._positions_of_new(
                    input_ids[:, past:],
                    types[:, past:],
                    given=model_kwargs,
                    text=text[:, past:],
                    delta=delta,
                    mask=mask,
                )
                shifted = torch.cat([shifted[..., :past], new], dim=-1)
            return torch.cat([text[None], shifted])

        return prepare

    def _positions_of_new(
        self,
        input_ids: Tensor,
        types: Tensor,
        given: Mapping[str, Any],
        *,
        text: Tensor,
        delta: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        """M-RoPE positions (3, B, q) of new tokens with images or videos, after a cache whose delta is known; given:
        the call's arguments, of which those count that say how large they are, and how far apart frames lie."""
        length = input_ids.shape[1]
        own_mask = None if mask is None or mask.ndim != 2 else mask[:, -length:]
        known = inspect.signature(self.inner.get_rope_index).parameters
        sizes = {name: given[name] for name in SIZES if name in known and given.get(name) is not None}
        positions, _ = self.inner.get_rope_index(input_ids, mm_token_type_ids=types, attention_mask=own_mask, **sizes)
        # Padding may stand between turns: what counts is how many real tokens came before.
        before = text[:, :1] if own_mask is None or mask is None else mask[:, :-length].sum(dim=1, keepdim=True)
        return positions + (before + delta).to(text.device)[None]

    def remember(self, layers: list[CacheLayer], prompt: PromptInfo) -> None:
        """Keeps the row's M-RoPE delta (next position minus text length) with the cache."""
        from vtprune.cache.books import books

        positions, real = prompt.positions, prompt.real()
        place = torch.arange(prompt.length, device=prompt.device).expand_as(real)
        if positions is None:
            # Without position ids the model numbers all places, padding included, and so what follows.
            before = prompt.real_so_far().long().cumsum(dim=1)[:, -prompt.length :]
            books(layers).extend(ROPE_DELTA, prompt.offset + place + 1 - before, prompt.offset)
            return
        planes = positions if positions.ndim == 3 else positions[None]
        spatial = planes[-3:].amax(dim=0).expand(prompt.batch, -1).cummax(dim=1).values
        mask = prompt.mask
        text = _text_positions(mask, prompt.batch, past=prompt.offset, length=prompt.length, device=prompt.device)
        # Padding after a row's last token repeats what holds there.
        held = place.masked_fill(~real, 0).cummax(dim=1).values
        books(layers).extend(ROPE_DELTA, (spatial - text).gather(1, held), prompt.offset)


class Qwen25VLAdapter(Qwen2VLAdapter):
    """`Qwen2_5_VLForConditionalGeneration`: its tower packs by windows, within which most of its blocks attend."""

    name = "qwen2_5_vl"
    models = ("Qwen2_5_VLForConditionalGeneration",)
    notes = "no CLS token: received attention instead; whole 2x2 merge groups are kept; images and videos"

    model_types = ("qwen2_5_vl",)

    @classmethod
    def sizes(cls, config: Any) -> ModelCost:
        tower = config.vision_config
        blocks = tower_sizes(
            tower.hidden_size, tower.num_heads, tower.intermediate_size, gated=True, layers=tower.depth
        )
        window = tower.window_size // tower.spatial_merge_size // pair(tower.patch_size)[0]
        return _sizes(config, blocks, tower.out_hidden_size, window=window, full=tower.fullatt_block_indexes)

    def check(self) -> None:
        blocks = self.model.config.vision_config.fullatt_block_indexes
        if self.model.config.vision_config.depth - 1 not in blocks:
            raise UnsupportedModelError(
                "the last block of the vision tower attends within windows only, so no attention of it ranks the "
                f"tokens of a whole image; full-attention blocks are {blocks}"
            )

    def _order(self, grid_thw: list[list[int]]) -> Tensor:
        vision = self.model.config.vision_config
        grids = tuple((t, h, w) for t, h, w in grid_thw)
        return _window_order(grids, merge=self._merge, window=vision.window_size, patch=vision.patch_size)


class Qwen3VLAdapter(Qwen2VLAdapter):
    """`Qwen3VLForConditionalGeneration`: no windows, norms before the rotary embedding, and planes (deepstack): what
    blocks of the tower say of each token is added to it after the first decoder layers."""

    name = "qwen3_vl"
    models = ("Qwen3VLForConditionalGeneration",)
    notes = "as qwen2_vl; what deepstack adds to a token stays with it, merged tokens take theirs along"

    model_types = ("qwen3_vl",)

    @classmethod
    def sizes(cls, config: Any) -> ModelCost:
        tower = config.vision_config
        blocks = tower_sizes(
            tower.hidden_size, tower.num_heads, tower.intermediate_size, gated=False, layers=tower.depth
        )
        return _sizes(
            config, blocks, tower.out_hidden_size, planes=len(getattr(tower, "deepstack_visual_indexes", ()))
        )

    @property
    def published_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    @property
    def plane_mergers(self) -> tuple[nn.Module, ...]:
        return tuple(self.inner.visual.deepstack_merger_list)

    def change_planes(self, output: Any, change: Callable[[int, Sequence[Tensor]], Sequence[Tensor]]) -> None:
        features = list(output.deepstack_features)
        output.deepstack_features = [tuple(change(plane, values)) for plane, values in enumerate(features)]

    def take_planes(self, arguments: dict[str, Any]) -> tuple[list[Tensor], Tensor] | None:
        values, marks = arguments.pop("deepstack_visual_embeds", None), arguments.pop("visual_pos_masks", None)
        return (list(values), marks) if values else None


class Qwen3VLMoeAdapter(Qwen3VLAdapter):
    """`Qwen3VLMoeForConditionalGeneration`: the same with a mixture of experts in each decoder layer."""

    name = "qwen3_vl_moe"
    models = ("Qwen3VLMoeForConditionalGeneration",)
    notes = "as qwen3_vl; a token that is dropped goes through no expert"

    model_types = ("qwen3_vl_moe",)


@functools.lru_cache(maxsize=64)
def _window_order(grid_thw: tuple[tuple[int, int, int], ...], *, merge: int, window: int, patch: int) -> Tensor:
    """(S,) the raster index of the merge group at each place of a sequence that is packed by windows, on the host."""
    from transformers.vision_utils import get_vision_window_index

    order: Tensor = get_vision_window_index(
        torch.tensor(grid_thw), spatial_merge_size=merge, window_size=window, patch_size=patch
    )[0]
    return order.cpu()


def _grids(source: Source) -> str:
    """The argument that holds the (t, h, w) in patches of what `source` encodes."""
    return f"{source.kind}_grid_thw"


def _sizes(
    config: Any,
    blocks: TransformerCost,
    out_width: int,
    *,
    window: int | None = None,
    full: Iterable[int] = (),
    planes: int = 0,
) -> ModelCost:
    """The sizes of a model of the family; window: as in `PackedVisionCost`; full: layers without windows; planes: as
    in `ModelCost`."""
    tower = config.vision_config
    patch_h, patch_w = pair(tower.patch_size)
    frames = tower.temporal_patch_size
    volume = (frames if isinstance(frames, int) else frames[0]) * patch_h * patch_w
    merge, merged = tower.spatial_merge_size, blocks.width * tower.spatial_merge_size**2
    vision = PackedVisionCost(
        blocks, tower.in_channels * volume * blocks.width, merge=merge, window=window, full_layers=frozenset(full)
    )
    return model_sizes(config, vision, merged * merged + merged * out_width, planes=planes)


def _cache_and_delta(arguments: dict[str, Any]) -> tuple[Any, Tensor | None]:
    """The cache among a forward's arguments, and the M-RoPE delta (B, 1) that a wrapped model left with it."""
    from vtprune.cache.adopting import cache_in, is_adopted
    from vtprune.cache.books import books

    cache = cache_in(arguments)
    if cache is None or not is_adopted(cache) or cache.get_seq_length() == 0:
        return cache, None
    return cache, books(cache.layers).at_end(ROPE_DELTA)


def _text_positions(mask: Tensor | None, batch: int, past: int, *, length: int, device: torch.device) -> Tensor:
    """(B, length) places in the row without its padding, as if every token were text."""
    if mask is None or mask.ndim != 2:
        return torch.arange(past, past + length, device=device).expand(batch, -1)
    positions = (mask.long().cumsum(dim=-1) - 1).masked_fill(mask == 0, 0)
    return positions[:, -length:].to(device)


def _sized_attention(attention: Any, original: Any) -> Any:
    """The forward of one of the tower's attention modules that adds to the logits of each key what SIZE_BIAS (S,)
    says; without it, `original`."""

    def forward(hidden_states: Tensor, cu_seqlens: Tensor, *args: Any, **kwargs: Any) -> Any:
        bias = kwargs.pop(SIZE_BIAS, None)
        if bias is None:
            return original(hidden_states, cu_seqlens, *args, **kwargs)
        split = rearrange(attention.qkv(hidden_states), "s (three h d) -> three h s d", three=3, h=attention.num_heads)
        cos, sin = (part.float() for part in kwargs["position_embeddings"])
        query, key = (rotate(states.float(), cos, sin).to(split.dtype) for states in split[:2])
        bias, outputs = bias.to(query), []
        for start, end in itertools.pairwise(cu_seqlens.tolist()):
            piece = slice(start, end)
            outputs.append(
                torch.nn.functional.scaled_dot_product_attention(
                    query[None, :, piece], key[None, :, piece], split[2][None, :, piece],
                    attn_mask=bias[piece][None, None, None], scale=attention.scaling,
                )[0]
            )  # fmt: skip
        return attention.proj(rearrange(torch.cat(outputs, dim=1), "h s d -> s (h d)"))

    return forward
