"""Conversations about pictures and videos as a model's own chat template writes them, with labels on answers alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vtprune.decoder.prompt import IGNORED
from vtprune.errors import VTPruneError
from vtprune.loading.prompts import video_arguments
from vtprune.loading.videos import Video


@dataclass(frozen=True)
class Conversation:
    """Pictures and videos, and turns about them in the form that chat templates take; the assistant's are the answers.

    messages: {"role": "user" or "assistant", "content": [{"type": "image"}, {"type": "video"} or {"type": "text",
    "text": …}]}, user and assistant in turn; name: what an error calls it.
    """

    images: tuple[Image.Image, ...]
    messages: tuple[dict[str, Any], ...]
    name: str = ""
    videos: tuple[Video, ...] = ()


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and the answers in it as ranges of its tokens other than vision tokens.

    answers: [first, end), the end token among them.
    """

    text: str
    ids: list[int]
    answers: list[tuple[int, int]]


class Collator:
    """Conversations to a batch: right padding, `labels` (B, L) with -100 on all but the answers and their end token.

    The texts go through the processor's chat template, the ids and pixels are those that the processor gives. Takes
    the place of transformers' `data_collator` too. Raises VTPruneError, naming the conversation, where the template
    writes the beginning of a conversation differently once it goes on.
    """

    def __init__(self, processor: Any) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        if getattr(processor, "chat_template", None) is None:
            raise VTPruneError("the model's processor has no chat template, so no conversation can be written")
        marks = {name: getattr(processor, name, None) for name in ("image_token", "video_token")}
        self._marks = [mark for mark in marks.values() if isinstance(mark, str)]
        # Placeholders of pictures and of videos, by their ids.
        self.placeholders = [int(getattr(processor, f"{name}_id")) for name, mark in marks.items() if mark is not None]
        self.end: int | None = self.tokenizer.eos_token_id

    def __call__(self, conversations: Sequence[Conversation]) -> dict[str, Tensor]:
        """The batch of these conversations."""
        texts = [self._whole(one)[0] for one in conversations]
        images = [list(one.images) for one in conversations if one.images]
        videos = video_arguments(self.processor, [video for one in conversations for video in one.videos])
        batch = dict(
            self.processor(
                text=list(texts),
                images=images or None,
                return_tensors="pt",
                padding=True,
                padding_side="right",
                add_special_tokens=self._begins(texts[0]),
                **({**videos, "return_text_replacement_offsets": True} if videos else {}),
            )
        )
        replaced = batch.pop("text_replacement_offsets", None) or [[]] * len(texts)
        rendered = [
            self.render(one, [part["replacement"] for part in parts])
            for one, parts in zip(conversations, replaced, strict=True)
        ]
        batch["labels"] = self._labels(batch, rendered, conversations)
        return batch

    def render(self, conversation: Conversation, replaced: Sequence[str] = ()) -> Rendered:
        """The text, and where its answers are.

        replaced: what the processor writes in place of each placeholder, where that is more than placeholders, as the
        times of a video's frames.
        """
        (text, prompts), messages = self._whole(conversation), list(conversation.messages)
        turns = range(1, len(messages), 2)
        ids = self._tokens(text, replaced)

        def length(beginning: str) -> int:
            """How many of the tokens of the conversation its beginning takes."""
            part = self._tokens(beginning, replaced)
            if not text.startswith(beginning) or ids[: len(part)] != part:
                raise VTPruneError(
                    f"{conversation.name or 'a conversation'}: the chat template does not write the beginning of a "
                    "conversation as it writes it in the whole, so the answers cannot be found (the beginning ends in "
                    f"{beginning[-40:]!r})"
                )
            return len(part)

        starts = [length(prompt) for prompt in prompts]
        answers = []
        for turn, start, limit in zip(turns, starts, [*starts[1:], len(ids)], strict=True):
            if self.end in ids[start:limit]:
                end = ids.index(self.end, start) + 1
            else:
                end = length(self._write(messages[: turn + 1]))
            answers.append((start, end))
        return Rendered(text, ids, answers)

    def _whole(self, conversation: Conversation) -> tuple[str, list[str]]:
        """The text of a conversation, and of its beginnings up to each answer."""
        messages, turns = list(conversation.messages), range(1, len(conversation.messages), 2)
        text, prompts = self._write(messages), [self._write(messages[:turn], prompt=True) for turn in turns]
        if self.end is not None and self.tokenizer.eos_token not in text[len(prompts[-1]) :]:
            # The template closes no answer: without this the model would never learn to stop.
            text += self.tokenizer.eos_token
        return text, prompts

    def _write(self, messages: list[dict[str, Any]], *, prompt: bool = False) -> str:
        text: str = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        return text

    def _begins(self, text: str) -> bool:
        """Whether the tokenizer is to add what a text begins with: not where the template wrote it."""
        bos = self.tokenizer.bos_token
        return not (bos is not None and text.startswith(bos))

    def _tokens(self, text: str, replaced: Sequence[str]) -> list[int]:
        """The tokens of a text other than placeholders, those that the processor writes around these among them."""
        if replaced:
            marks, parts = "|".join(map(re.escape, self._marks)), iter(replaced)
            text = re.sub(marks, lambda found: re.sub(marks, "", next(parts)), text)
        ids = self.tokenizer(text, add_special_tokens=self._begins(text))["input_ids"]
        return [token for token in ids if token not in self.placeholders]

    def _labels(
        self, batch: dict[str, Tensor], rendered: list[Rendered], conversations: Sequence[Conversation]
    ) -> Tensor:
        """(B, L) the ids of the answers; text tokens are in the order of the text, whatever a picture takes."""
        ids, labels = batch["input_ids"], torch.full_like(batch["input_ids"], IGNORED)
        real = batch["attention_mask"].bool() & ~torch.isin(ids, torch.tensor(self.placeholders))
        for row, one in enumerate(rendered):
            places = real[row].nonzero()[:, 0]
            if ids[row, places].tolist() != one.ids:
                raise VTPruneError(
                    f"{conversations[row].name or 'a conversation'}: the processor writes other text tokens than its "
                    "tokenizer, so the answers cannot be found"
                )
            for start, end in one.answers:
                answer = places[start:end]
                labels[row, answer] = ids[row, answer]
        return labels
