"""The tiny LLaVA: its configuration, its processor, and an initial scale at which it learns."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vtprune.evals.tiny_models.tokens import ASSISTANT, BOS, EOS, PAD, USER, byte_level_tokenizer
from vtprune.shapes.questions import vocabulary
from vtprune.shapes.scene import SIZE

PATCH = 8
IMAGE_TOKENS = (SIZE // PATCH) ** 2
WIDTH = 128
HEADS = 4
VISION_LAYERS = 6
TEXT_LAYERS = 6
# The layer whose output LLaVA reads, counted from the end: -2 skips the tower's last layer.
FEATURE_LAYER = -2

IMAGE = "<image>"
SPECIAL_TOKENS = (PAD, BOS, EOS, IMAGE, USER, ASSISTANT)

# Standard messages: content is a string or a list of {"type": "image"} and {"type": "text", "text": ...}.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|assistant|>' if message['role'] == 'assistant' else '<|user|>' }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'text' %}{{ part['text'] | trim }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the benchmark's words."""
    return byte_level_tokenizer(SPECIAL_TOKENS, vocabulary())


def build_processor() -> LlavaProcessor:
    """The processor: any image is resized to 96x96, and the chat template takes standard messages."""
    image_processor = CLIPImageProcessor(
        do_resize=True,
        size={"height": SIZE, "width": SIZE},
        do_center_crop=False,
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.25, 0.25, 0.25],
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )


def build_config(tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    """About 2.2 million parameters in all."""
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=VISION_LAYERS,
        num_attention_heads=HEADS,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=WIDTH,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=5 * WIDTH // 2,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=2048,
        initializer_range=WIDTH**-0.5,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    ids: dict[str, Any] = {
        "image_token_id": tokenizer.convert_tokens_to_ids(IMAGE),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        **ids,
    )


@torch.no_grad()
def initialise(model: LlavaForConditionalGeneration) -> None:
    """Scale by fan-in: at the libraries' default 0.02 attention stays uniform and nothing is learnt."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    embeddings = model.model.vision_tower.embeddings
    nn.init.normal_(embeddings.patch_embedding.weight, std=(3 * PATCH * PATCH) ** -0.5)
    # Positions start about as strong as patch contents, or the tower is slow to tell places apart.
    nn.init.normal_(embeddings.position_embedding.weight, std=0.5)
    nn.init.normal_(embeddings.class_embedding, std=0.5)
    nn.init.normal_(model.model.language_model.embed_tokens.weight, std=WIDTH**-0.5)
    model.tie_weights()


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlavaForConditionalGeneration:
    """A fresh model whose `generate` is greedy and stops after the answer."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(build_config(tokenizer))
    initialise(model)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=16,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return model
