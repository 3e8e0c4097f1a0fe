"""Tiny random-weight models of every family, and prompts for them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from tests.copies import Copier

IMAGE, START, END, VIDEO, PAD = 90, 91, 92, 93, 0
# The name that forward and generate have for the cache: another one since transformers 5.24.
PAST = "cache" if "cache" in signature(LlavaForConditionalGeneration.forward).parameters else "past_key_values"
DECODER_LAYERS = 5


def spread(model: Any, scale: float = 3.0) -> Any:
    """Larger weights than the default's, so that attention is peaky and tokens differ."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2:
                weight.normal_(0, scale * weight.shape[-1] ** -0.5 * (0.2 if "lm_head" in name else 0.5))
            elif "bias" in name:
                weight.normal_(0, 0.05)
    return model.eval()


def _llava(tower: dict[str, Any], strategy: str, family: tuple[Any, Any] | None = None, **given: Any) -> Any:
    config_class, model_class = family or (LlavaConfig, LlavaForConditionalGeneration)
    config = config_class(
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4,
            "image_size": 24, "patch_size": 4, **tower,
        },
        text_config={
            "model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": DECODER_LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
            "vocab_size": 100, "max_position_embeddings": 512, "pad_token_id": PAD,
        },
        image_token_id=IMAGE,
        **{"vision_feature_layer": -2, "vision_feature_select_strategy": strategy, **given},
    )  # fmt: skip
    return model_class(config)


# Sides of the pictures, in pixels, that crops of 24 make.
PINPOINTS = [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]


def _next() -> Any:
    family = LlavaNextConfig, LlavaNextForConditionalGeneration
    return _llava({"model_type": "clip_vision_model"}, "default", family, image_grid_pinpoints=PINPOINTS)


def _next_video() -> Any:
    return _llava(
        {"model_type": "clip_vision_model"},
        "default",
        (LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration),
        image_grid_pinpoints=PINPOINTS,
        video_token_id=VIDEO,
    )


def _onevision() -> Any:
    return _llava(
        {"model_type": "siglip_vision_model", "patch_size": 5, "image_size": 25},
        "full",
        (LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration),
        image_grid_pinpoints=[[25 * height, 25 * width] for height in range(1, 4) for width in range(1, 4)],
        vision_feature_layer=-1,
        vision_aspect_ratio="anyres_max_4",
        video_token_id=VIDEO,
    )


def _qwen(config: Any, model: Any, tower: dict[str, Any], text: dict[str, Any] | None = None) -> Any:
    return model(config(
        vision_config={
            "hidden_size": 32, "depth": 6, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2,
            "temporal_patch_size": 2, **tower,
        },
        text_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": DECODER_LAYERS,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
            "max_position_embeddings": 512, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            **(text or {}),
        },
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END,
    ))  # fmt: skip


def _qwen2_5() -> Any:
    windows = {"window_size": 24, "fullatt_block_indexes": [2, 5], "tokens_per_second": 2}
    tower = {"intermediate_size": 48, "out_hidden_size": 32, **windows}
    return _qwen(Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, tower)


TOWER_3 = {"intermediate_size": 48, "out_hidden_size": 32, "num_position_embeddings": 64}
TEXT_3 = {"head_dim": 12, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def qwen3(planes: list[int]) -> Any:
    """A Qwen3-VL whose tower makes planes of what these of its six blocks put out."""
    tower = {**TOWER_3, "deepstack_visual_indexes": planes}
    return _qwen(Qwen3VLConfig, Qwen3VLForConditionalGeneration, tower, TEXT_3)


def _qwen3_moe() -> Any:
    tower = {**TOWER_3, "deepstack_visual_indexes": [1, 2, 3]}
    return _qwen(Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration, tower, {**TEXT_3, **EXPERTS})


def _qwen2() -> Any:
    return _qwen(Qwen2VLConfig, Qwen2VLForConditionalGeneration, {"embed_dim": 32, "mlp_ratio": 2})


# The layers with attention in a decoder that has linear attention in the others.
HYBRID_DEPTH, HYBRID_ATTENTION = 7, (1, 4, 6)
LAYER_TYPES = ["linear_attention" if n not in HYBRID_ATTENTION else "full_attention" for n in range(HYBRID_DEPTH)]
TEXT_3_5 = {
    "layer_types": LAYER_TYPES, "num_hidden_layers": HYBRID_DEPTH, "head_dim": 16, "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_conv_kernel_dim": 4,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5,
    },
}  # fmt: skip


def _remembering(model: Any) -> Any:
    """A hybrid whose states fade slowly, so that the first token of a prompt still counts at its end."""
    for layer in model.model.language_model.layers:
        if layer.block_type == "linear_attention":
            layer.linear_attn.A_log.data.uniform_(0.02, 0.3).log_()
    return model


def _qwen3_5() -> Any:
    return _remembering(_qwen(Qwen3_5Config, Qwen3_5ForConditionalGeneration, TOWER_3, TEXT_3_5))


def _qwen3_5_moe() -> Any:
    text = {**TEXT_3_5, **EXPERTS, "shared_expert_intermediate_size": 24}
    return _remembering(_qwen(Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration, TOWER_3, text))


BUILDERS: dict[str, Callable[[], Any]] = {
    "llava-clip": lambda: _llava({"model_type": "clip_vision_model"}, "default"),
    "llava-siglip": lambda: _llava({"model_type": "siglip_vision_model"}, "full"),
    "llava-next": _next,
    "llava-next-video": _next_video,
    "llava-onevision": _onevision,
    "qwen2.5-vl": _qwen2_5,
    "qwen2-vl": _qwen2,
    "qwen3-vl": lambda: qwen3([1, 2, 3]),
    "qwen3-vl-moe": _qwen3_moe,
    "qwen3.5": _qwen3_5,
    "qwen3.5-moe": _qwen3_5_moe,
}
# Models with linear attention in most decoder layers: there dropping is no masking, and some methods have no place.
HYBRIDS = ("qwen3.5", "qwen3.5-moe")
# Models that cut pictures into crops, each row of which ends in a newline token: an image is not one rectangle.
ANYRES = ("llava-next", "llava-next-video", "llava-onevision")
MODELS = [kind for kind in BUILDERS if kind not in (*HYBRIDS, *ANYRES)]
# Models that differ from another one of these only in their tower: `make test` runs them where towers matter.
TOWER_ONLY = frozenset({"qwen2-vl", "qwen3-vl", "qwen3-vl-moe"})


@functools.cache
def _original(kind: str) -> Any:
    return _copier(kind).copy()


@functools.cache
def _copier(kind: str) -> Copier:
    torch.manual_seed(0)
    # A recurrent state sums up what rounding makes of large weights, in the unpruned model too.
    return Copier(spread(BUILDERS[kind](), 1.0 if kind in HYBRIDS else 3.0))


def make(kind: str, attention: str = "sdpa") -> Any:
    """A fresh copy of the tiny model of this kind, always with the same weights."""
    model = _copier(kind).copy()
    model.set_attn_implementation(attention)
    if attention == "eager" and kind.endswith("moe"):
        # One expert after the other, whose products torch's counter knows.
        model.set_experts_implementation("eager")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


@dataclass
class Row:
    """One row of a batch: text tokens before, between and after its images (h, w) and videos (t, h, w), given by size
    in vision tokens."""

    texts: list[int]
    grids: list[tuple[int, ...]]
    seed: int = 0


LONG = Row([3, 7], [(6, 6)], seed=1)
SHORT = Row([2, 4], [(6, 6)], seed=2)
TWO = Row([2, 3, 5], [(6, 6), (6, 6)], seed=3)
TEXT = Row([9], [], seed=4)
ANY_SIZE = [Row([3, 7], [(5, 7)], 1), Row([2, 4], [(4, 3)], 2), Row([2, 3, 5], [(3, 6), (4, 4)], 3)]
# A video alone, one beside an image, and text alone.
VIDEOS = [Row([2, 5], [(3, 2, 4)], 5), Row([2, 3, 4], [(4, 3), (2, 3, 3)], 6), Row([4], [], 7)]
# The same where all videos of a batch have equally many frames.
EQUAL_VIDEOS = [Row([2, 5], [(3, 6, 6)], 5), Row([2, 3, 4], [(12, 6), (3, 6, 6)], 6), Row([4], [], 7)]
# Pictures whose crops are full, padded at the sides, above and below, or that are one crop without a frame around it.
CROPPED = [Row([3, 7], [(11, 7)], 1), Row([2, 4], [(6, 13)], 2), Row([2, 3, 5], [(6, 6), (12, 5)], 3)]
# What a prompt may show: one row without padding, then batches of rows that differ in length.
SHOWN = ("an image", "several images", "a video", "a video and an image")


def shown_rows(kind: str, shown: str) -> list[Row]:
    """The rows of a prompt that shows this, of sizes that the family takes."""
    one, two, other = CROPPED if kind in ANYRES else ANY_SIZE if kind.startswith("qwen") else [LONG, SHORT, TWO]
    return {
        "an image": [one],
        "several images": [other, TEXT, two],
        "a video": [Row([2, 5], [(5, 2, 4)], 5), Row([6, 3], [(5 if kind in ANYRES else 3, 3, 3)], 8)],
        "a video and an image": EQUAL_VIDEOS if kind in ANYRES else VIDEOS,
    }[shown]


def takes(kind: str, shown: str) -> bool:
    """Whether a family takes what a prompt of this name shows."""
    return kind.startswith(("qwen", "llava-next-video", "llava-onevision")) or "video" not in shown


ROWS = {
    "llava-clip": [LONG, SHORT, TWO],
    "llava-siglip": [LONG, SHORT, TWO],
    "qwen2.5-vl": ANY_SIZE,
    "qwen2-vl": ANY_SIZE,
    "qwen3-vl": ANY_SIZE,
    "qwen3-vl-moe": ANY_SIZE,
    **dict.fromkeys(HYBRIDS, ANY_SIZE),
    **dict.fromkeys(ANYRES, CROPPED),
}


# The families that say in words, before each frame, when it was taken.
STAMPED = ("qwen3",)
SECONDS = 1.5


def prompt(kind: str, rows: list[Row], padding: str = "left") -> dict[str, Tensor]:
    """Inputs of a batch of rows, padded on one side; an attention mask only where there is padding."""
    ids = []
    pixels: dict[int, list[Tensor]] = {IMAGE: [], VIDEO: []}
    grids: dict[int, list[list[int]]] = {IMAGE: [], VIDEO: []}
    for row in rows:
        generator = torch.Generator().manual_seed(row.seed)
        tokens = torch.randint(3, 80, (sum(row.texts),), generator=generator).split(row.texts)
        parts = [tokens[0]]
        for grid, text in zip(row.grids, tokens[1:], strict=True):
            token, (height, width) = IMAGE if len(grid) == 2 else VIDEO, grid[-2:]
            frames = 1 if token == IMAGE else grid[0]
            image = torch.full((height * width,), token)
            if kind.startswith("qwen"):
                shown = [torch.tensor([START]), image, torch.tensor([END])]
                if token == VIDEO and kind.startswith(STAMPED):
                    shown = [part for at in range(frames) for part in (torch.tensor([81, 70 + at]), *shown)]
                else:
                    shown[1] = image.repeat(frames)
                pixels[token].append(torch.randn(frames * 4 * height * width, 3 * 2 * 4 * 4, generator=generator))
                grids[token].append([frames, 2 * height, 2 * width])
                parts += shown
            elif kind in ANYRES:
                size = None if token == VIDEO else [4 * height, 4 * width]
                pieces, placeholders = _pieces(kind, frames, size)
                side = _original(kind).config.vision_config.image_size
                pixels[token].append(torch.randn(pieces, 3, side, side, generator=generator))
                grids[token].append(size or [])
                parts.append(torch.full((placeholders,), token))
            else:
                pixels[token].append(torch.randn(1, 3, 4 * height, 4 * width, generator=generator))
                parts.append(image)
            parts.append(text)
        ids.append(torch.cat(parts))
    if kind in ANYRES:
        inputs = _assemble(kind, ids, [], [], padding)
        if pixels[IMAGE]:
            # Crops of pictures that have fewer are filled up.
            inputs["pixel_values"] = torch.nn.utils.rnn.pad_sequence(pixels[IMAGE], batch_first=True)
            inputs["image_sizes"] = torch.tensor(grids[IMAGE])
        if pixels[VIDEO]:
            inputs["pixel_values_videos"] = torch.stack(pixels[VIDEO])
        return inputs
    inputs = _assemble(kind, ids, pixels[IMAGE], grids[IMAGE], padding)
    if pixels[VIDEO]:
        inputs["pixel_values_videos"] = torch.cat(pixels[VIDEO])
        inputs["video_grid_thw"] = torch.tensor(grids[VIDEO])
        inputs["mm_token_type_ids"] += 2 * (inputs["input_ids"] == VIDEO)
        if kind == "qwen2.5-vl":
            inputs["second_per_grid_ts"] = torch.full((len(grids[VIDEO]),), SECONDS)
    return inputs


@functools.cache
def _placeholders(kind: str, frames: int, size: tuple[int, int] | None) -> tuple[int, int]:
    model, crops = _original(kind).model, frames
    side = model.config.vision_config.image_size
    with torch.no_grad():
        if size is None:
            found = model.get_video_features(torch.zeros(1, frames, 3, side, side)).pooler_output
        else:
            crops = image_size_to_num_patches(list(size), model.config.image_grid_pinpoints, side)
            found = model.get_image_features(torch.zeros(1, crops, 3, side, side), torch.tensor([size])).pooler_output
    # Some releases answer a video frame by frame.
    return crops, len(found[0].flatten(0, -2))


def _pieces(kind: str, frames: int, size: list[int] | None) -> tuple[int, int]:
    """How many crops a picture of this size, or frames a video, is given as, and how many placeholders stand for it:
    what the unpruned model itself makes of it."""
    return _placeholders(kind, frames, None if size is None else (size[0], size[1]))


def _assemble(
    kind: str, ids: list[Tensor], pixels: list[Tensor], grids: list[list[int]], padding: str
) -> dict[str, Tensor]:
    length = max(map(len, ids))
    input_ids = torch.full((len(ids), length), PAD)
    mask = torch.zeros(len(ids), length, dtype=torch.long)
    for row, one in enumerate(ids):
        where = slice(length - len(one), length) if padding == "left" else slice(0, len(one))
        input_ids[row, where], mask[row, where] = one, 1
    inputs = {"input_ids": input_ids}
    if not bool(mask.all()):
        inputs["attention_mask"] = mask
    if pixels:
        inputs["pixel_values"] = torch.cat(pixels)
    if kind.startswith("qwen"):
        inputs["mm_token_type_ids"] = (input_ids == IMAGE).long()
        if grids:
            inputs["image_grid_thw"] = torch.tensor(grids)
    return inputs


def tower_order(model: Any, grid_thw: Tensor) -> Tensor:
    """The merge group (in raster order) at each place of a Qwen tower's sequence, which may be in window order."""
    from transformers.vision_utils import get_vision_window_index

    vision = model.config.vision_config
    if not hasattr(vision, "window_size"):
        return torch.arange(int(grid_thw.prod(dim=-1).sum()) // 4)
    order: Tensor = get_vision_window_index(grid_thw, 2, vision.window_size, vision.patch_size)[0]
    return order


def text_positions(inputs: dict[str, Tensor], extra: int = 0) -> Tensor:
    """1-D position ids of the prompt and `extra` tokens after it, padding left out: (B, L + extra)."""
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    mask = torch.cat([mask, mask.new_ones(mask.shape[0], extra)], dim=1)
    return (mask.cumsum(dim=1) - 1).clamp(min=0)
