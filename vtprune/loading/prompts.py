"""From a question and its images to the tensors that a model takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from vtprune.errors import InputError, first_line

Message = dict[str, Any]


def question(image: Image.Image, text: str) -> list[Message]:
    """A conversation of one turn: an image and a question about it."""
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]


def images_of(chat: Sequence[Message]) -> list[Any]:
    """The images of a conversation, in order."""
    return [
        part["image"]
        for message in chat
        if not isinstance(message["content"], str)
        for part in message["content"]
        if part["type"] == "image"
    ]


def media_marks(processor: Any) -> tuple[str, ...]:
    """The texts that a processor takes for the place of a picture, a video or a sound."""
    names = ("image_token", "video_token", "audio_token")
    found = (getattr(processor, name, None) for name in names)
    return tuple(dict.fromkeys(mark for mark in found if isinstance(mark, str) and mark))


def check_text(processor: Any, text: str, what: str) -> None:
    """Raises InputError, naming `what`, for a text that holds what the processor takes for a picture's place."""
    for mark in media_marks(processor):
        if mark in text:
            raise InputError(
                f"{what}: its text holds {mark!r}, which this model reads as the place of a picture and not as text; "
                f"write it otherwise, as {' '.join((mark[:1], mark[1:-1], mark[-1:]))!r}"
            )


def check_chat(processor: Any, chat: Sequence[Message], what: str) -> None:
    """`check_text` for every text of a conversation."""
    for message in chat:
        content = message["content"]
        for text in [content] if isinstance(content, str) else [part.get("text", "") for part in content]:
            check_text(processor, text, what)


def encode(processor: Any, chats: Sequence[list[Message]]) -> Any:
    """One padded batch of model inputs, on the CPU."""
    texts = [processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    images = [image for chat in chats for image in images_of(chat)]
    bos = processor.tokenizer.bos_token
    # A template that writes the begin token itself would otherwise get a second one from the tokenizer.
    plain = bos is not None and all(text.startswith(bos) for text in texts)
    return processor(
        text=texts,
        images=images or None,
        padding=True,
        return_tensors="pt",
        **({"add_special_tokens": False} if plain else {}),
    )


def encode_named(
    processor: Any, chats: Sequence[list[Message]], refused: Callable[[int | None, str], Exception]
) -> Any:
    """`encode`; where the processor refuses, raises what `refused` makes of the place of the conversation that cannot
    be encoded (None: each of them can be by itself) and of the reason."""
    try:
        return encode(processor, chats)
    except Exception as error:
        for place, chat in enumerate(chats):
            try:
                encode(processor, [chat])
            except Exception as reason:
                raise refused(place, first_line(reason)) from reason
        raise refused(None, first_line(error)) from error


def place(inputs: Any, model: Any) -> Any:
    """The inputs on the model's device; pictures in the model's dtype."""
    return {
        name: value.to(model.device, model.dtype) if torch.is_floating_point(value) else value.to(model.device)
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor)
    }
