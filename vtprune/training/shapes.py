"""Drawn pictures with questions: data without end, a function of (split, seed, index)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

from PIL import Image

from vtprune.shapes.questions import QA, draw_questions
from vtprune.shapes.render import render
from vtprune.shapes.scene import make_scene, scene_rng
from vtprune.training.conversations import Conversation


@dataclass(frozen=True)
class ShapesData:
    """One scene of the Shapes benchmark a sample, and several questions about it as turns of one conversation.

    The splits "train" and "val" draw from other seeds than the evaluation set. Sample i is the same on every machine.
    """

    seed: int = 0
    split: str = "train"
    questions: int = 6

    size: ClassVar[None] = None

    def __getitem__(self, index: int) -> Conversation:
        """The sample with this index."""
        scene = make_scene(self.split, self.seed, index)
        asked: list[QA] = []
        # A scene with one thing may have no answer to any of the questions that were drawn.
        for stream in itertools.count(1):
            asked = draw_questions(scene, scene_rng(self.split, self.seed, index, stream=stream), self.questions)
            if asked:
                break
        return Conversation((Image.fromarray(render(scene)),), _turns(asked), f"shapes {index}")

    def identity(self) -> dict[str, Any]:
        """What makes two of these the same."""
        return {"data": "shapes", "data_seed": self.seed, "questions": self.questions}


def _turns(asked: list[QA]) -> tuple[dict[str, Any], ...]:
    turns: list[dict[str, Any]] = []
    for qa in asked:
        opening = [] if turns else [{"type": "image"}]
        turns.append({"role": "user", "content": [*opening, {"type": "text", "text": qa.question}]})
        turns.append({"role": "assistant", "content": [{"type": "text", "text": qa.answer}]})
    return tuple(turns)
