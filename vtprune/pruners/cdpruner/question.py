"""Which of a row's text tokens are the user's question, and which belong to the chat template."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtprune.method.beside import local_json, tokenizer_of

MARK = "QUESTION"


@dataclass(frozen=True)
class Question:
    """places: (Q,) int64 of the question's tokens among the row's text tokens; kind: what these tokens are."""

    places: Tensor
    kind: str

    @property
    def note(self) -> str:
        """How many tokens of which kind, for a report."""
        return f"{self.places.numel()} {self.kind}"


@dataclass(frozen=True)
class Template:
    """How many ids a tokenizer has, its special ones (image placeholders among them), and the other ids that its
    chat template puts before and after a question; both None if it has no template."""

    size: int
    special: frozenset[int]
    before: tuple[int, ...] | None
    after: tuple[int, ...] | None


def question_of(text_ids: Tensor | None, tokens: int, source: str) -> Question:
    """The question among the `tokens` text tokens of a row whose ids are `text_ids`, (tokens,) or None.

    Special tokens go, then the longest beginning and the longest end that the rest shares with the chat template
    of the tokenizer in `source`. Without ids or a tokenizer on this machine nothing is left out, and nothing
    where no token would remain. A system prompt that is not the template's own counts as part of the question.
    """
    device = None if text_ids is None else text_ids.device
    everything = torch.arange(tokens, device=device)
    if text_ids is None:
        return Question(everything, "text tokens (the prompt came as embeddings)")
    template = template_of(source)
    if template is None or not knows(template, text_ids):
        return Question(everything, "text tokens (no tokenizer is known)")
    ids = text_ids.tolist()
    places = [place for place, one in enumerate(ids) if one not in template.special]
    kind = "text tokens (special ones left out; no chat template is known)"
    if template.before is not None and template.after is not None:
        rest = [ids[place] for place in places]
        first = shared(rest, template.before)
        last = len(rest) - shared(rest[first:][::-1], template.after[::-1])
        places, kind = places[first:last], "question tokens"
    if not places:
        return Question(everything, "text tokens (the chat template leaves no question)")
    return Question(torch.tensor(places, device=device), kind)


def question_text(text_ids: Tensor, question: Question, source: str) -> str | None:
    """The question as a string, or None without a tokenizer on this machine."""
    tokenizer, template = tokenizer_of(source), template_of(source)
    if tokenizer is None or template is None or not knows(template, text_ids):
        return None
    return str(tokenizer.decode(text_ids[question.places].tolist(), skip_special_tokens=True)).strip()


def knows(template: Template, text_ids: Tensor) -> bool:
    """Whether all ids are the tokenizer's (transformers makes up an empty one where files are missing)."""
    return text_ids.numel() == 0 or int(text_ids.max()) < template.size


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids both begin with."""
    unlike = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(unlike, min(len(one), len(other)))


@functools.lru_cache(maxsize=16)
def template_of(source: str) -> Template | None:
    """The template of the tokenizer in `source`, or None if there is no tokenizer on this machine."""
    tokenizer = tokenizer_of(source)
    if tokenizer is None:
        return None
    special = special_ids(tokenizer, local_json(source, "config.json"))
    text = rendered(tokenizer, local_json(source, "chat_template.json").get("chat_template"))
    if text is None or text.count(MARK) != 1:
        return Template(len(tokenizer), special, None, None)

    def plain(part: str) -> tuple[int, ...]:
        ids = tokenizer(part, add_special_tokens=False)["input_ids"]
        return tuple(one for one in ids if one not in special)

    before, after = text.split(MARK)
    return Template(len(tokenizer), special, plain(before), plain(after))


def special_ids(tokenizer: Any, config: dict[str, Any]) -> frozenset[int]:
    """Ids of special tokens and of image and video placeholders."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).items()
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    placeholders = {config[name] for name in names if isinstance(config.get(name), int)}
    return frozenset(placeholders | set(tokenizer.all_special_ids) | {one for one, token in added if token.special})


def rendered(tokenizer: Any, processor_template: str | None) -> str | None:
    """One user turn with an image and `MARK` as its question, in the tokenizer's chat template or, where it has
    none, in its processor's; None if there is neither."""
    template = getattr(tokenizer, "chat_template", None) or processor_template
    if template is None:
        return None
    parts = [{"type": "image"}, {"type": "text", "text": MARK}]
    for content in (parts, MARK):
        turns = [{"role": "user", "content": content}]
        try:
            text = tokenizer.apply_chat_template(
                turns, chat_template=template, tokenize=False, add_generation_prompt=True
            )
        except Exception:  # a template is a program of its own; some take only strings
            continue
        if isinstance(text, str) and MARK in text:
            return text
    return None
