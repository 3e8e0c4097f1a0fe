"""What the tiny Qwen is asked: pictures of many sizes, two pictures, clips; several questions in one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtprune.evals.tiny_models.labels import pixel_batch
from vtprune.evals.tiny_models.qwen.architecture import END, FRAMES_A_PATCH, IMAGE, START, TOKEN, VIDEO
from vtprune.evals.tiny_models.tokens import Encoder
from vtprune.shapes.clips import CLIP_FORMS, FPS, FRAMES, SIDE, sample_clip
from vtprune.shapes.describing import ask_description
from vtprune.shapes.forms import FACTS, FORMS_OF_ONE, ask_fact, draw_fact
from vtprune.shapes.grounding import ask_box, ask_point
from vtprune.shapes.pairs import PAIR_FORMS
from vtprune.shapes.questions import QA, draw_questions, pick
from vtprune.shapes.scene import SIZE, SPLITS, Scene, sample_scene

TEXT_TOKENS = 144
# Most rows show each question the pictures alone, as a single-turn prompt does; in the others the questions follow one
# another as turns of a conversation.
CONVERSATION_CHANCE = 0.15
# The scenes of these lessons are drawn apart from those of the first set and of its training.
STREAM = 7
USUAL = (SIZE, SIZE)
OTHER_SIZES = ((64, 64), (64, 96), (96, 64), (128, 96), (96, 128), (128, 128))
PAIR_SIZES = ((64, 64), (64, 96), (96, 64))
# How often a batch shows what; all rows of a batch show things of the same size.
KINDS = {"usual": 0.45, "sized": 0.2, "pair": 0.17, "clip": 0.18}


@dataclass(frozen=True)
class Layout:
    """What every prompt of a batch shows: pictures or steps in time (two frames each) of one size in pixels."""

    kind: str
    width: int
    height: int

    @property
    def shown(self) -> int:
        """How many pictures, or steps of a clip."""
        return {"pair": 2, "clip": FRAMES // FRAMES_A_PATCH}.get(self.kind, 1)

    @property
    def tokens(self) -> int:
        """Vision tokens of each."""
        return self.width * self.height // TOKEN**2


@dataclass
class Lesson:
    """A batch: frames [b * shown, 2, 3, H, W]; scenes, where pictures of one scene each are shown; the questions of
    each row, and whether they are a conversation."""

    layout: Layout
    frames: Tensor
    scenes: list[Scene]
    questions: list[list[QA]]
    talks: list[bool]


def draw_layout(rng: np.random.Generator) -> Layout:
    """What the next batch shows."""
    kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
    if kind == "clip":
        return Layout(kind, SIDE, SIDE)
    sizes = {"usual": (USUAL,), "sized": OTHER_SIZES, "pair": PAIR_SIZES}[kind]
    return Layout(kind, *pick(rng, sizes))


def lesson_rng(split: str, seed: int, step: int, row: int = 0) -> np.random.Generator:
    """The random numbers of one row of a step, or (row 0) of what the step shows."""
    return np.random.default_rng([SPLITS[split], seed, step, row, STREAM])


def draw_lesson(split: str, seed: int, step: int, *, layout: Layout, rows: int) -> Lesson:
    """One step's batch."""
    frames: list[Scene] = []
    scenes, questions, talks = [], [], []
    for row in range(1, rows + 1):
        rng = lesson_rng(split, seed, step, row)
        if layout.kind == "clip":
            clip = sample_clip(rng)
            frames += clip.frames
            questions.append(_distinct(CLIP_FORMS, clip, rng, 8))
        elif layout.kind == "pair":
            pair = (sample_scene(rng, layout.width, layout.height), sample_scene(rng, layout.width, layout.height))
            frames += [scene for scene in pair for _ in range(FRAMES_A_PATCH)]
            questions.append(_distinct(PAIR_FORMS, pair, rng, 18))
        else:
            scene = sample_scene(rng, layout.width, layout.height)
            scenes.append(scene)
            frames += [scene] * FRAMES_A_PATCH
            questions.append(draw_all(scene, rng))
        talks.append(split == "train" and rng.random() < CONVERSATION_CHANCE)
    pixels = pixel_batch(frames) if layout.kind == "clip" else pixel_batch(frames[::FRAMES_A_PATCH])
    if layout.kind == "clip":
        shown = pixels.unflatten(0, (-1, FRAMES_A_PATCH))
    else:
        shown = torch.stack([pixels] * FRAMES_A_PATCH, dim=1)
    return Lesson(layout, shown, scenes, questions=questions, talks=talks)


def _distinct(forms: dict[str, Any], shown: Any, rng: np.random.Generator, tries: int) -> list[QA]:
    """Distinct questions, at most so many."""
    found: dict[str, QA] = {}
    for name in rng.choice(list(forms), size=tries):
        qa = forms[name][0](shown, rng)
        if qa is not None:
            found.setdefault(qa.question, qa)
    return list(found.values())


def draw_all(scene: Scene, rng: np.random.Generator) -> list[QA]:
    """Distinct questions about one picture: one description, boxes and points, forms of facts, and the first set's."""
    described: list[QA | None] = [ask_description(scene)]
    found: list[QA | None] = [
        ask_box(scene, rng),
        ask_box(scene, rng),
        ask_point(scene, rng),
        *draw_questions(scene, rng, 9),
    ]
    for _ in range(5):
        fact = draw_fact(scene, rng, pick(rng, sorted(FACTS)))
        found.append(None if fact is None else ask_fact(fact, pick(rng, FORMS_OF_ONE), rng))
    asked = [qa for qa in described + [found[i] for i in rng.permutation(len(found))] if qa is not None]
    return list({qa.question: qa for qa in asked}.values())


@dataclass(frozen=True)
class Prefix:
    """What stands before the questions of every row: token ids [p], positions [3, p], and the next free position."""

    ids: Tensor
    positions: Tensor
    after: int
    vision: Tensor


def prefix_of(model: Any, encoder: Encoder, layout: Layout) -> Prefix:
    """Begin, user, and what is shown, as the processor writes it, with the positions that the model gives it."""
    vocab = encoder.tokenizer.get_vocab()
    start, end, image, video = (vocab[token] for token in (START, END, IMAGE, VIDEO))
    ids = [encoder.bos, encoder.user]
    for step in range(layout.shown):
        if layout.kind == "clip":
            first = step * FRAMES_A_PATCH / FPS
            middle = (first + (step * FRAMES_A_PATCH + FRAMES_A_PATCH - 1) / FPS) / 2
            ids += encoder.text(f"<{middle:.1f} seconds>")
        ids += [start, *[video if layout.kind == "clip" else image] * layout.tokens, end]
    row = torch.tensor(ids)
    vision = (row == image) | (row == video)
    grid = torch.tensor([[1, 2 * layout.height // TOKEN, 2 * layout.width // TOKEN]] * layout.shown)
    named = {"video_grid_thw": grid} if layout.kind == "clip" else {"image_grid_thw": grid}
    kinds = vision.int() * (2 if layout.kind == "clip" else 1)
    positions, _ = model.model.get_rope_index(row[None], kinds[None], **named)
    return Prefix(row, positions[:, 0], int(positions.max()) + 1, vision)


@dataclass
class Rows:
    """Text after the prefix: ids, labels (-100 outside answers), turns [b, TEXT_TOKENS]; positions [b, TEXT_TOKENS];
    mask, bool [b, 1, n, n]; which form and category each turn has."""

    ids: Tensor
    labels: Tensor
    turns: Tensor
    positions: Tensor
    mask: Tensor
    asked: list[list[QA]]


def write_rows(encoder: Encoder, prefix: Prefix, questions: Sequence[Sequence[QA]], talks: Sequence[bool]) -> Rows:
    """As many questions of each row as fit; outside conversations none sees another one."""
    table = np.zeros((4, len(questions), TEXT_TOKENS), dtype=np.int64)
    table[0], table[1], table[2] = encoder.tokenizer.pad_token_id, -100, TEXT_TOKENS
    asked: list[list[QA]] = []
    for row, (texts, talk) in enumerate(zip(questions, talks, strict=True)):
        start = 0
        kept: list[QA] = []
        for qa in texts:
            opening = [encoder.user] if talk and kept else []
            prompt = [*opening, *encoder.text(qa.question), encoder.assistant]
            ids = [*prompt, *encoder.text(qa.answer), encoder.eos]
            end = start + len(ids)
            if end > TEXT_TOKENS:
                continue
            table[0, row, start:end] = ids
            table[1, row, start + len(prompt) - 1 : end - 1] = ids[len(prompt) :]
            table[2, row, start:end] = len(kept)
            table[3, row, start:end] = prefix.after + np.arange(len(ids)) + (start if talk else 0)
            start = end
            kept.append(qa)
        asked.append(kept)
    ids, labels, turns, positions = torch.from_numpy(table)
    mask = _mask(turns, torch.tensor(talks), len(prefix.ids))
    return Rows(ids, labels, turns, positions=positions, mask=mask, asked=asked)


def _mask(turns: Tensor, talks: Tensor, prefix: int) -> Tensor:
    """Bool [b, 1, n, n]: causal, and outside conversations no question sees another one."""
    block = torch.nn.functional.pad(turns + 1, (prefix, 0))
    seen = (block[:, None, :] == 0) | (block[:, None, :] == block[:, :, None]) | talks[:, None, None]
    return (seen & _causal(block.shape[1]))[:, None]


@cache
def _causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()
