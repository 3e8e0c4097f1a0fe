"""From a question and its images and videos to the tensors that a model takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers.video_utils import VideoMetadata

from vtprune.errors import InputError, first_line
from vtprune.loading.devices import device_of
from vtprune.loading.media import Media
from vtprune.loading.videos import Video

Message = dict[str, Any]
WITH_VIDEOS = "the Qwen-VL families (Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5), LLaVA-OneVision or LLaVA-NeXT-Video"
# What a model is given in its own type; all else that floats, as the seconds between frames, stays as it is.
PIXELS = ("pixel_values", "pixel_values_videos")


def question(media: Media, text: str) -> list[Message]:
    """A conversation of one turn: an image or a video, and a question about it."""
    kind = "video" if isinstance(media, Video) else "image"
    return [{"role": "user", "content": [{"type": kind, kind: media}, {"type": "text", "text": text}]}]


def images_of(chat: Sequence[Message]) -> list[Any]:
    """The images of a conversation, in order."""
    return _parts(chat, "image")


def videos_of(chat: Sequence[Message]) -> list[Video]:
    """The videos of a conversation, in order."""
    return _parts(chat, "video")


def _parts(chat: Sequence[Message], kind: str) -> list[Any]:
    return [
        part[kind]
        for message in chat
        if not isinstance(message["content"], str)
        for part in message["content"]
        if part["type"] == kind
    ]


def takes_videos(processor: Any) -> bool:
    """Whether a processor, and so its model, takes videos."""
    found = (getattr(processor, name, None) for name in ("video_processor", "video_token"))
    return all(one is not None for one in found)


def check_videos(processor: Any, what: str = "") -> None:
    """Raises InputError, naming `what` and the model's family, where a processor takes no videos."""
    if not takes_videos(processor):
        family = type(processor).__name__.removesuffix("Processor").lower()
        named = f"{what}: " if what else ""
        raise InputError(f"{named}{family} takes images; a video needs a model of {WITH_VIDEOS}")


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


def video_arguments(processor: Any, videos: Sequence[Video]) -> dict[str, Any]:
    """What a processor is called with for these videos: their frames as they are, none left out, and when each is
    shown; {} for none. Raises InputError, by name, where the processor takes no videos."""
    if not videos:
        return {}
    check_videos(processor)
    # A tower takes frames in groups of so many, and one of these needs a whole one.
    least = int(getattr(processor.video_processor, "temporal_patch_size", None) or 1)
    arrays, metadata = [], []
    for video in videos:
        lacking = max(0, least - len(video.frames))
        frames, indices = video.array(), video.indices
        arrays.append(np.concatenate([frames, *[frames[-1:]] * lacking]))
        indices += indices[-1:] * lacking
        # Made anew for each call: processors write into it.
        metadata.append(
            VideoMetadata(
                total_num_frames=max(video.total, least),
                fps=video.fps,
                frames_indices=indices,  # type: ignore[arg-type]
            )
        )
    options = {"do_sample_frames": False, "video_metadata": metadata, "input_data_format": "channels_last"}
    return {"videos": arrays, "videos_kwargs": options}


def encode(processor: Any, chats: Sequence[list[Message]]) -> Any:
    """One padded batch of model inputs, on the CPU; raises InputError for a video where the processor takes none."""
    texts = [processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    images = [image for chat in chats for image in images_of(chat)]
    videos = [video for chat in chats for video in videos_of(chat)]
    bos = processor.tokenizer.bos_token
    # A template that writes the begin token itself would otherwise get a second one from the tokenizer.
    plain = bos is not None and all(text.startswith(bos) for text in texts)
    return processor(
        text=texts,
        images=images or None,
        padding=True,
        return_tensors="pt",
        **video_arguments(processor, videos),
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
    """The inputs on the model's device; pictures and frames in the model's dtype."""
    device = device_of(model)
    return {
        name: value.to(device, model.dtype) if name in PIXELS else value.to(device)
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor)
    }
