"""What a forward really computes, by torch's own counter, and the tiny models that the tests count."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
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
    SiglipVisionConfig,
)

from vtprune.cost.formulas import FlopsBreakdown

IMAGE_TOKEN = 60
# What the towers of Qwen3-VL and Qwen3.5 have in common.
SHARED = ("depth", "num_heads", "patch_size", "spatial_merge_size", "temporal_patch_size", "hidden_size",
          "intermediate_size", "out_hidden_size", "num_position_embeddings")  # fmt: skip
VOCABULARY = 64


def counter() -> FlopCounterMode:
    """torch's counter, with the attention kernel of the CPU, which some releases of torch leave out."""

    def attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return sdpa_flop_count(query, key, value)

    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={kernel: attention})


def measured_flops(model: nn.Module, inputs: dict[str, Any]) -> int:
    """FLOPs (2 per multiply-accumulate) of a generate-style prefill: logits at the last position alone."""
    return _counter(model, inputs).get_total_flops()


def measured_breakdown(model: nn.Module, inputs: dict[str, Any]) -> FlopsBreakdown:
    """The same by part; Qwen's merger, inside its tower, counts as the projector."""
    by_module = _counter(model, inputs).get_flop_counts()

    def part(name: str) -> int:
        """Sums the modules of that name: one, called once."""
        return sum(sum(ops.values()) for path, ops in by_module.items() if path.endswith(name))

    merger = part(".visual.merger") + part(".visual.deepstack_merger_list.0") + part(".visual.deepstack_merger_list.1")
    return FlopsBreakdown(
        vision_tower=part(".model.vision_tower") + part(".model.visual") - merger,
        projector=part(".model.multi_modal_projector") + merger,
        decoder=part(".model.language_model"),
        head=part(".lm_head"),
        scoring=0,
    )


def _one_by_one(model: Any) -> Any:
    """The model with its experts, if it has some, one by one: the counter does not know products of groups."""
    if model.config.model_type.endswith("moe"):
        model.set_experts_implementation("eager")
    return model


def _counter(model: nn.Module, inputs: dict[str, Any]) -> FlopCounterMode:
    with torch.no_grad(), counter() as count:
        _one_by_one(model).eval()(**inputs, logits_to_keep=1)
    return count


def llava_config(tower: str = "clip", **changes: Any) -> LlavaConfig:
    """A LLaVA of 64 patches, with grouped queries and heads wider than hidden_size / heads."""
    vision: PreTrainedConfig
    sizes = {"hidden_size": 24, "intermediate_size": 52, "num_hidden_layers": 3, "num_attention_heads": 3}
    if tower == "clip":
        vision = CLIPVisionConfig(**sizes, image_size=48, patch_size=6, projection_dim=10)
    else:
        vision = SiglipVisionConfig(**sizes, image_size=48, patch_size=6)
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=40,
        intermediate_size=72,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    select = {"vision_feature_select_strategy": "default" if tower == "clip" else "full"}
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, **(select | changes))


def qwen_config(version: str = "2.5") -> Qwen2_5_VLConfig | Qwen2VLConfig | Qwen3VLConfig | Qwen3VLMoeConfig:
    """A Qwen of dynamic resolution; 2.5 has windows of 3 x 3 decoder tokens in two of its four layers, 3 planes."""
    text: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }
    sizes: dict[str, Any] = {
        "depth": 4,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    tokens = {
        "image_token_id": IMAGE_TOKEN,
        "video_token_id": 61,
        "vision_start_token_id": 62,
        "vision_end_token_id": 63,
    }
    if version == "2":
        return Qwen2VLConfig(
            text_config=text,
            vision_config=sizes | {"embed_dim": 24, "hidden_size": 32, "mlp_ratio": 3},
            **tokens,
        )
    if version.startswith("3"):
        planes = {"deepstack_visual_indexes": [0, 2], "num_position_embeddings": 64}
        widths = {"hidden_size": 24, "intermediate_size": 44, "out_hidden_size": 32}
        few = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
        kind, experts = (Qwen3VLMoeConfig, few) if version == "3, experts" else (Qwen3VLConfig, {})
        return kind(
            text_config={
                **text,
                "head_dim": 12,
                "rope_parameters": text["rope_parameters"] | {"mrope_section": [2, 2, 2]},
                **experts,
            },
            vision_config=sizes | planes | widths,
            **tokens,
        )
    windows = {"window_size": 24, "fullatt_block_indexes": [1, 3]}
    widths = {"hidden_size": 24, "intermediate_size": 44, "out_hidden_size": 32}
    return Qwen2_5_VLConfig(text_config=text, vision_config=sizes | windows | widths, **tokens)


def hybrid_config(*, experts: bool = False) -> Qwen3_5Config | Qwen3_5MoeConfig:
    """A Qwen3.5 of five layers, two of them with attention, and with heads of its own in the three others."""
    base: Any = qwen_config("3, experts" if experts else "3")
    few = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
    kind, mixture = (
        (Qwen3_5MoeConfig, few | {"shared_expert_intermediate_size": 28}) if experts else (Qwen3_5Config, {})
    )
    vision = base.vision_config.to_dict()
    return kind(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 56,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "layer_types": [f"{kind}_attention" for kind in ("linear", "full", "linear", "linear", "full")],
            "linear_num_value_heads": 6,
            "linear_num_key_heads": 3,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 10,
            "linear_conv_kernel_dim": 3,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 1, 1],
                "partial_rotary_factor": 0.5,
            },
            **mixture,
        },
        vision_config={name: vision[name] for name in SHARED},
        image_token_id=IMAGE_TOKEN,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
    )


def build(config: PreTrainedConfig, attention: str = "sdpa") -> nn.Module:
    """A model of random weights, in evaluation mode."""
    torch.manual_seed(0)
    classes = {
        "llava": LlavaForConditionalGeneration,
        "qwen2_vl": Qwen2VLForConditionalGeneration,
        "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
        "qwen3_vl": Qwen3VLForConditionalGeneration,
        "qwen3_vl_moe": Qwen3VLMoeForConditionalGeneration,
        "qwen3_5": Qwen3_5ForConditionalGeneration,
        "qwen3_5_moe": Qwen3_5MoeForConditionalGeneration,
    }
    return _one_by_one(classes[config.model_type]._from_config(config, attn_implementation=attention).eval())


def prompt(image_tokens: list[int], text_tokens: int) -> torch.Tensor:
    """(1, L) token ids: a run of image tokens for each image between runs of text."""
    text = [1 + i % (IMAGE_TOKEN - 1) for i in range(text_tokens)]
    ids = [text.pop() for _ in range(2)]
    for count in image_tokens:
        ids += [IMAGE_TOKEN] * count + [text.pop()]
    return torch.tensor([ids + text])


def llava_inputs(config: LlavaConfig, images: int, text_tokens: int) -> dict[str, torch.Tensor]:
    """Random pixels and a prompt for `images` images."""
    side = config.vision_config.image_size
    tokens = (side // config.vision_config.patch_size) ** 2
    ids = prompt([tokens] * images, text_tokens)
    pixels = torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def qwen_inputs(config: Any, grids: list[tuple[int, int, int]], text_tokens: int) -> dict[str, torch.Tensor]:
    """Random pixels and a prompt for images with these grids of decoder tokens."""
    vision = config.vision_config
    merge = vision.spatial_merge_size
    ids = prompt([t * h * w for t, h, w in grids], text_tokens)
    patches = torch.tensor([[t, h * merge, w * merge] for t, h, w in grids])
    volume = 3 * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(int(patches.prod(1).sum()), volume, generator=torch.Generator().manual_seed(0))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE_TOKEN).int(),
        "pixel_values": pixels,
        "image_grid_thw": patches,
    }
