"""Tiny models of random weights on disk, with processors, and tasks over pictures, for tests that load them."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from vtprune.evals.tiny_models.llava.architecture import build_model, build_processor


@cache
def random_checkpoint() -> str:
    """The folder, written once a process."""
    folder = mkdtemp(prefix="vtprune-checkpoint-")
    processor = build_processor()
    build_model(processor.tokenizer, seed=0).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level text."""
    specials = [*QWEN_TOKENS, "<|video_pad|>"]
    pieces = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=specials[0],
        eos_token=specials[2],
        additional_special_tokens=specials[1:],
    )


def qwen_processor() -> Qwen2_5_VLProcessor:
    """Images, and frames of videos, of any size between 4 and 64 vision tokens."""
    images = Qwen2VLImageProcessor(patch_size=14, min_pixels=4 * 28 * 28, max_pixels=64 * 28 * 28)
    videos = Qwen2VLVideoProcessor(patch_size=14, min_pixels=4 * 28 * 28, max_pixels=64 * 28 * 28)
    return Qwen2_5_VLProcessor(
        image_processor=images, tokenizer=_qwen_tokenizer(), video_processor=videos, chat_template=QWEN_TEMPLATE
    )


def _qwen3_processor() -> Qwen3VLProcessor:
    """Images of any size between 4 and 64 vision tokens, of patches of 16 pixels."""
    images = Qwen2VLImageProcessor(
        patch_size=16, min_pixels=4 * 32 * 32, max_pixels=64 * 32 * 32, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return Qwen3VLProcessor(
        image_processor=images,
        tokenizer=_qwen_tokenizer(),
        # Of a whole video here: the pixels of all its frames.
        video_processor=Qwen3VLVideoProcessor(
            patch_size=16, size={"shortest_edge": 16 * 32 * 32, "longest_edge": 256 * 32 * 32}
        ),
        chat_template=QWEN_TEMPLATE,
    )


@cache
def random_qwen3_checkpoint(*, experts: bool) -> str:
    """The folder of a Qwen3-VL with the published 2B's (30B-A3B's) shapes, scaled in width and depth: heads wider than
    the width says, two queries a key, three planes, patches of 16 pixels; written once a process."""
    folder, processor = mkdtemp(prefix="vtprune-qwen3-checkpoint-"), _qwen3_processor()
    mixture = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24} if experts else {}
    given: dict[str, Any] = {
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 128, "depth": 6, "num_heads": 4, "patch_size": 16,
            "out_hidden_size": 32, "deepstack_visual_indexes": [1, 2, 4], "num_position_embeddings": 2304,
        },
        "text_config": {
            "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 7, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "vocab_size": len(processor.tokenizer), "pad_token_id": 0,
            "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2, "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True,
            },
            **mixture,
        },
        "vision_start_token_id": 3, "vision_end_token_id": 4, "image_token_id": 5, "video_token_id": 6,
    }  # fmt: skip
    torch.manual_seed(0)
    config = Qwen3VLMoeConfig(**given) if experts else Qwen3VLConfig(**given)
    kind = Qwen3VLMoeForConditionalGeneration if experts else Qwen3VLForConditionalGeneration
    kind(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@cache
def random_hybrid_checkpoint(*, experts: bool) -> str:
    """The folder of a Qwen3.5 with the published 9B's (35B-A3B's) shapes, scaled in width and depth: attention in each
    fourth layer, its heads wider than the width says, of which a quarter is turned, four (eight) queries a key, twice
    as many values as keys in the others, patches of 16 pixels; written once a process."""
    folder, processor = mkdtemp(prefix="vtprune-hybrid-checkpoint-"), _qwen3_processor()
    mixture = {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24,
    }  # fmt: skip
    given: dict[str, Any] = {
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 128, "depth": 4, "num_heads": 4, "patch_size": 16,
            "out_hidden_size": 32, "num_position_embeddings": 2304,
        },
        "text_config": {
            "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 8, "num_attention_heads": 8,
            "num_key_value_heads": 1 if experts else 2, "head_dim": 32, "vocab_size": len(processor.tokenizer),
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2,
            "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e7, "mrope_section": [2, 1, 1], "mrope_interleaved": True,
                "partial_rotary_factor": 0.25,
            },
            **(mixture if experts else {}),
        },
        "vision_start_token_id": 3, "vision_end_token_id": 4, "image_token_id": 5, "video_token_id": 6,
    }  # fmt: skip
    torch.manual_seed(0)
    config = Qwen3_5MoeConfig(**given) if experts else Qwen3_5Config(**given)
    kind = Qwen3_5MoeForConditionalGeneration if experts else Qwen3_5ForConditionalGeneration
    kind(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


ANYRES_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|image_pad|>{% elif part['type'] == 'video' %}<|video_pad|>"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A crop is 8 x 8 patches of 14 pixels.
CROP = 112


def _anyres_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = _qwen_tokenizer()
    tokenizer.image_token, tokenizer.video_token = "<|image_pad|>", "<|video_pad|>"
    return tokenizer


@cache
def random_next_checkpoint() -> str:
    """The folder of a LLaVA-NeXT with the published crops (but of fewer patches), scaled in width and depth."""
    folder = mkdtemp(prefix="vtprune-next-checkpoint-")
    pinpoints = [[CROP * height, CROP * width] for height, width in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
    images = LlavaNextImageProcessor(
        size={"shortest_edge": CROP}, crop_size={"height": CROP, "width": CROP}, image_grid_pinpoints=pinpoints
    )
    tokenizer = _anyres_tokenizer()
    processor = LlavaNextProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=14, vision_feature_select_strategy="default",
        image_token="<|image_pad|>", num_additional_image_tokens=1, chat_template=ANYRES_TEMPLATE,
    )  # fmt: skip
    config = LlavaNextConfig(
        vision_config={"model_type": "clip_vision_model", **_anyres_tower()},
        text_config={"model_type": "mistral", "sliding_window": None, **_anyres_decoder(len(tokenizer))},
        image_grid_pinpoints=pinpoints, image_token_id=5,
    )  # fmt: skip
    torch.manual_seed(0)
    LlavaNextForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@cache
def random_onevision_checkpoint() -> str:
    """The folder of a LLaVA-OneVision with the published crops (but of fewer patches), scaled in width and depth."""
    folder = mkdtemp(prefix="vtprune-onevision-checkpoint-")
    pinpoints = [[CROP * height, CROP * width] for height in range(1, 7) for width in range(1, 7)]
    size, tokenizer = {"height": CROP, "width": CROP}, _anyres_tokenizer()
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints),
        tokenizer=tokenizer, video_processor=LlavaOnevisionVideoProcessor(size=size), num_image_tokens=64,
        vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_9", image_token="<|image_pad|>",
        video_token="<|video_pad|>", chat_template=ANYRES_TEMPLATE,
    )  # fmt: skip
    config = LlavaOnevisionConfig(
        vision_config={"model_type": "siglip_vision_model", **_anyres_tower()},
        text_config={"model_type": "qwen2", **_anyres_decoder(len(tokenizer))},
        image_grid_pinpoints=pinpoints, image_token_id=5, video_token_id=6, vision_feature_layer=-1,
        vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_9",
    )  # fmt: skip
    torch.manual_seed(0)
    LlavaOnevisionForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _anyres_tower() -> dict[str, Any]:
    return {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
        "image_size": CROP, "patch_size": 14,
    }  # fmt: skip


def _anyres_decoder(vocabulary: int) -> dict[str, Any]:
    return {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": vocabulary, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "initializer_range": 0.2,
    }  # fmt: skip


@cache
def random_qwen_checkpoint() -> str:
    """The folder of a tiny Qwen2.5-VL, written once a process."""
    folder = mkdtemp(prefix="vtprune-qwen-checkpoint-")
    processor = qwen_processor()
    config = Qwen2_5_VLConfig(
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "depth": 4, "num_heads": 4, "patch_size": 14,
            "window_size": 112, "fullatt_block_indexes": [1, 3], "out_hidden_size": 32,
        },
        text_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": len(processor.tokenizer), "pad_token_id": 0,
            "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        },
        vision_start_token_id=3, vision_end_token_id=4, image_token_id=5, video_token_id=6,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def png(width: int, height: int, colour: str = "red") -> bytes:
    """A plain picture."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, format="PNG")
    return buffer.getvalue()


def write_task(folder: Path, name: str, images: list[bytes], **generation: Any) -> None:
    """An lmms-eval task in `folder` that asks the same about each image; ids are picture-0, picture-1, …"""
    from datasets import Features, Value
    from datasets import Image as ImageFeature

    columns = {
        "id": [f"picture-{i}" for i in range(len(images))],
        "image": [{"bytes": image, "path": None} for image in images],
        "question": ["what color is the circle?"] * len(images),
        "answer": ["red"] * len(images),
    }
    text = Value("string")
    features = Features({"id": text, "image": ImageFeature(), "question": text, "answer": text})
    pq.write_table(pa.table(columns, schema=features.arrow_schema), folder / f"{name}.parquet")
    options = {"max_new_tokens": 4, **generation}
    lines = "".join(f"  {key}: {value!r}\n" for key, value in options.items())
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\ndataset_path: parquet\ndataset_kwargs:\n  data_files:\n"
        f"    test: {folder / name}.parquet\ntest_split: test\noutput_type: generate_until\n"
        "doc_to_visual: !function vtprune.evals.lmms.shapes_task.doc_to_visual\n"
        "doc_to_text: !function vtprune.evals.lmms.shapes_task.doc_to_text\n"
        "doc_to_target: answer\n"
        "process_results: !function vtprune.evals.lmms.shapes_task.process_results\n"
        f"generation_kwargs:\n{lines}"
        "metric_list:\n  - metric: accuracy\n    aggregation: mean\n    higher_is_better: true\n"
    )
