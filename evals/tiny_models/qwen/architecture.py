"""The tiny Qwen3-VL: its configuration, its processor, and how it starts from the bundled LLaVA."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from vtprune.assets import TINY_LLAVA
from vtprune.evals.tiny_models.tokens import ASSISTANT, BOS, EOS, PAD, USER, byte_level_tokenizer
from vtprune.shapes.more import more_vocabulary
from vtprune.shapes.questions import vocabulary
from vtprune.shapes.scene import SIZE

# Four patches make a vision token of 8x8 pixels, as large as the LLaVA's: 144 of them for a picture of 96x96.
PATCH, MERGE, FRAMES_A_PATCH = 4, 2, 2
TOKEN = PATCH * MERGE
WIDTH, HEADS, LAYERS = 128, 4, 6
TOWER_WIDTH, TOWER_LAYERS = 96, 5
PLANES = (1, 3)
# The root mean square of a head's query or key in the bundled LLaVA's decoder: 1.0 to 1.3 in its layers.
QUERY_SIZE = 1.2
# Vision tokens that pictures and the frames of a video are brought to, at the least and at the most.
FEWEST, MOST = 16, 576

START, END, IMAGE, VIDEO = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
SPECIAL_TOKENS = (PAD, BOS, EOS, IMAGE, VIDEO, START, END, USER, ASSISTANT)
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

# Standard messages: content is a string or a list of {"type": "image"}, {"type": "video"} and {"type": "text"} parts.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|assistant|>' if message['role'] == 'assistant' else '<|user|>' }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    # The processor writes a frame's own start and end for each of them.
    "{% elif part['type'] == 'video' %}<|video_pad|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] | trim }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The LLaVA's tokenizer with the words of more questions and Qwen's own tokens."""
    return byte_level_tokenizer(SPECIAL_TOKENS, [*vocabulary(), *more_vocabulary()])


def build_processor() -> Qwen3VLProcessor:
    """Pictures and videos of any size; one of 8x8-pixel cells is left as it is."""
    cell = TOKEN * TOKEN
    sizes: dict[str, Any] = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": FRAMES_A_PATCH}
    statistics: dict[str, Any] = {"image_mean": list(MEAN), "image_std": list(STD)}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(
            size={"shortest_edge": FEWEST * cell, "longest_edge": MOST * cell}, **sizes, **statistics
        ),
        tokenizer=build_tokenizer(),
        # Of a whole video here: the pixels of all its frames.
        video_processor=Qwen3VLVideoProcessor(
            size={"shortest_edge": 2 * FEWEST * cell, "longest_edge": 32 * MOST * cell}, **sizes, **statistics
        ),
        chat_template=CHAT_TEMPLATE,
    )


def build_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLConfig:
    """About 2.4 million parameters in all."""
    ids = tokenizer.get_vocab()
    return Qwen3VLConfig(
        vision_config={
            "hidden_size": TOWER_WIDTH,
            "intermediate_size": 256,
            "depth": TOWER_LAYERS,
            "num_heads": HEADS,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": FRAMES_A_PATCH,
            "out_hidden_size": WIDTH,
            "num_position_embeddings": (SIZE // PATCH) ** 2,
            "deepstack_visual_indexes": list(PLANES),
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": WIDTH,
            "intermediate_size": 5 * WIDTH // 2,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "head_dim": WIDTH // HEADS,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
            "pad_token_id": ids[PAD],
            "bos_token_id": ids[BOS],
            "eos_token_id": ids[EOS],
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
        },
        image_token_id=ids[IMAGE],
        video_token_id=ids[VIDEO],
        vision_start_token_id=ids[START],
        vision_end_token_id=ids[END],
        tie_word_embeddings=True,
    )


@torch.no_grad()
def initialise(model: Qwen3VLForConditionalGeneration) -> None:
    """Scale by fan-in; planes start at nothing, so that at first the decoder sees what the merger makes alone."""
    visual = model.model.visual
    for module in visual.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            nn.init.zeros_(module.bias)
    for merger in visual.deepstack_merger_list:
        nn.init.zeros_(merger.linear_fc2.weight)
    kernel = visual.patch_embed.proj.weight
    nn.init.normal_(kernel, std=(FRAMES_A_PATCH * 3 * PATCH * PATCH) ** -0.5)
    # Positions start about as strong as patch contents, or the tower is slow to tell places apart.
    nn.init.normal_(visual.pos_embed.weight, std=0.5)


@torch.no_grad()
def take_decoder(
    model: Qwen3VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, llava: Any, llava_tokenizer: Any
) -> None:
    """Copy the LLaVA's decoder, and the embeddings of the tokens that both know.

    Qwen's decoder norms queries and keys, which the LLaVA's does not: the norms' weights start at the size that the
    LLaVA's own queries of text and keys of pictures have.
    """
    own, other = model.model.language_model, llava.model.language_model
    for mine, theirs in zip(own.layers, other.layers, strict=True):
        mine.mlp.load_state_dict(theirs.mlp.state_dict())
        mine.self_attn.load_state_dict(theirs.self_attn.state_dict(), strict=False)
        for name in ("input_layernorm", "post_attention_layernorm"):
            getattr(mine, name).load_state_dict(getattr(theirs, name).state_dict())
        for norm in (mine.self_attn.q_norm, mine.self_attn.k_norm):
            nn.init.constant_(norm.weight, QUERY_SIZE)
    own.norm.load_state_dict(other.norm.state_dict())
    embeddings, known = own.embed_tokens.weight, llava_tokenizer.get_vocab()
    nn.init.normal_(embeddings, std=WIDTH**-0.5)
    for token, place in tokenizer.get_vocab().items():
        if token in known:
            embeddings[place] = other.embed_tokens.weight[known[token]]
    model.tie_weights()


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3VLForConditionalGeneration:
    """A model whose tower is fresh and whose decoder is the bundled LLaVA's; its `generate` is greedy."""
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(build_config(tokenizer))
    initialise(model)
    llava = LlavaForConditionalGeneration.from_pretrained(TINY_LLAVA)
    take_decoder(model, tokenizer, llava, PreTrainedTokenizerFast.from_pretrained(TINY_LLAVA))
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=64,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return model
