"""Scores of a saved model on the evaluation set, answered through `generate` and the chat template."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from vtprune.shapes.dataset import EvalRow
from vtprune.shapes.questions import CATEGORIES, normalise


@dataclass(frozen=True)
class Score:
    """Share of right answers among `count` questions."""

    accuracy: float
    count: int

    @property
    def standard_error(self) -> float:
        """Binomial standard error of the accuracy."""
        return float((self.accuracy * (1 - self.accuracy) / self.count) ** 0.5)


def answer(model: Any, processor: Any, images: Sequence[Image.Image], questions: Sequence[str]) -> list[str]:
    """Greedy answers to one question about each image, as one padded batch."""
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
        for image, question in zip(images, questions, strict=True)
    ]
    inputs = processor.apply_chat_template(
        chats,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    ).to(model.device)
    ids = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    return list(processor.batch_decode(ids, skip_special_tokens=True))


@torch.no_grad()
def evaluate(
    folder: Path, rows: Sequence[EvalRow], *, device: str = "cpu", batch: int = 32, shift_images: bool = False
) -> dict[str, Score]:
    """Accuracy per category and overall; `shift_images` shows each question the next row's image."""
    processor = AutoProcessor.from_pretrained(folder)
    model: Any = AutoModelForImageTextToText.from_pretrained(folder)
    model.to(device).eval()
    shown = [*rows[1:], rows[0]] if shift_images else list(rows)
    hits: dict[str, list[bool]] = defaultdict(list)
    for first in range(0, len(rows), batch):
        part = rows[first : first + batch]
        images = [row.open_image() for row in shown[first : first + batch]]
        answers = answer(model, processor, images, [row.question for row in part])
        for row, text in zip(part, answers, strict=True):
            hits[row.category].append(normalise(text) == normalise(row.answer))
    scores = {name: Score(sum(hits[name]) / len(hits[name]), len(hits[name])) for name in CATEGORIES}
    right = sum(sum(values) for values in hits.values())
    return {**scores, "overall": Score(right / len(rows), len(rows))}


def as_markdown(scores: dict[str, Score]) -> str:
    """The scores as a table."""
    lines = ["| category | questions | accuracy | standard error |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {score.count} | {100 * score.accuracy:.1f} | {100 * score.standard_error:.1f} |"
        for name, score in scores.items()
    ]
    return "\n".join(lines)
