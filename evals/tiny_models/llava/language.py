"""Stages 2 and 3: several questions about one image in one sequence, loss on the answers alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from vtprune.evals.tiny_models.labels import VisionTargets
from vtprune.evals.tiny_models.llava.architecture import IMAGE_TOKENS
from vtprune.evals.tiny_models.tokens import Encoder
from vtprune.shapes.questions import (
    CATEGORIES,
    QA,
    draw_questions,
    quadrant,
)
from vtprune.shapes.scene import Scene, make_scene, scene_rng

TEXT_TOKENS = 136
# Most rows show each question the image alone, as a single-turn prompt does. In the others the
# questions follow one another as turns of a conversation.
CONVERSATION_CHANCE = 0.15
OPENING = 2  # begin, user
PREFIX = OPENING + IMAGE_TOKENS
CAPTION = "caption"


@dataclass
class TextBatch:
    """One sequence a row: a prefix (begin, user, image) and the text tokens after it.

    ids, labels, turns [b, TEXT_TOKENS]: token ids, next-token labels (-100 outside answers) and the
    index of the question; positions [b, PREFIX + TEXT_TOKENS]; mask, bool [b, 1, n, n].
    """

    ids: Tensor
    labels: Tensor
    turns: Tensor
    positions: Tensor
    mask: Tensor
    categories: list[list[str]]

    def to(self, device: torch.device) -> TextBatch:
        """The same on another device."""
        tensors: dict[str, Any] = {name: one.to(device) for name, one in vars(self).items() if name != "categories"}
        return replace(self, **tensors)


def draw_captions(scene: Scene, rng: np.random.Generator, count: int) -> list[QA]:
    """Lists of all things, each in an order of its own: colour, shape, glyph if any, place if clear.

    After "red" the next word is the shape of the red thing: a look-up of one hop, learnt within a few
    hundred steps, where questions alone (which need two hops) stay on a plateau for thousands. What can
    be asked by colour, by shape and by both is therefore also listed in these orders.
    """
    captions = []
    for _ in range(count):
        name_order, rest_order = rng.integers(2, size=2) * 2 - 1
        words: list[str] = []
        for i in rng.permutation(len(scene.things)):
            thing = scene.things[i]
            rest = [part for part in (thing.glyph, quadrant(scene, thing)) if part is not None]
            words += [*(thing.color, thing.shape)[::name_order], *rest[::rest_order]]
        captions.append(QA("what shapes are there?", " ".join(words), CAPTION, CAPTION))
    return captions


def _row(encoder: Encoder, questions: list[QA], conversation: bool) -> tuple[np.ndarray, list[str]]:
    """Rows ids, labels, turn, position [4, TEXT_TOKENS], filled with as many questions as fit."""
    row = np.zeros((4, TEXT_TOKENS), dtype=np.int64)
    row[0], row[1], row[2] = encoder.tokenizer.pad_token_id, -100, -1
    start, categories = 0, []
    for turn, qa in enumerate(questions):
        opening = [encoder.user] if conversation and turn else []
        asked = [*opening, *encoder.text(qa.question), encoder.assistant]
        ids = [*asked, *encoder.text(qa.answer), encoder.eos]
        end = start + len(ids)
        if end > TEXT_TOKENS:
            break
        row[0, start:end] = ids
        row[1, start + len(asked) - 1 : end - 1] = ids[len(asked) :]
        row[2, start:end] = turn
        row[3, start:end] = PREFIX + np.arange(len(ids)) + (start if conversation else 0)
        start = end
        categories.append(qa.category)
    return row, categories


def _mask(turns: Tensor, conversation: Tensor) -> Tensor:
    """Bool [b, 1, n, n]: causal, and outside conversations no question sees another one."""
    block = F.pad(turns + 1, (PREFIX, 0))
    seen = (block[:, None, :] == 0) | (block[:, None, :] == block[:, :, None])
    seen = torch.where(conversation[:, None, None], torch.ones_like(seen), seen)
    length = block.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    # Padding forms a block of its own behind all others, so no question sees it.
    return (seen & causal)[:, None]


def text_batch(encoder: Encoder, split: str, seed: int, scenes: dict[int, Scene], captions: int = 0) -> TextBatch:
    """Questions for a batch of scenes by their indices, after so many captions of each."""
    rows, categories, conversation = [], [], []
    for index, scene in scenes.items():
        rng = scene_rng(split, seed, index, stream=1)
        talk = split == "train" and rng.random() < CONVERSATION_CHANCE
        texts = draw_captions(scene, rng, captions) + draw_questions(scene, rng, 18)
        row, names = _row(encoder, texts, talk)
        rows.append(row)
        categories.append(names)
        conversation.append(talk)
    ids, labels, turns, positions = torch.from_numpy(np.stack(rows, axis=1))
    turns = torch.where(turns < 0, TEXT_TOKENS, turns)  # padding: a block behind all questions
    prefix = torch.arange(PREFIX).expand(len(rows), PREFIX)
    return TextBatch(
        ids=ids,
        labels=labels,
        turns=turns,
        positions=torch.cat([prefix, positions], 1),
        mask=_mask(turns, torch.tensor(conversation)),
        categories=categories,
    )


def scenes_for(split: str, seed: int, indices: range) -> dict[int, Scene]:
    """The scenes with these indices."""
    return {index: make_scene(split, seed, index) for index in indices}


def main_patches(targets: VisionTargets, count: int, seed: int) -> Tensor:
    """Ascending indices [b, count] of patches: centres of things, glyphs, other parts, then bare ground."""
    noise = torch.rand(targets.centre.shape, generator=torch.Generator().manual_seed(seed))
    rank = 4 * targets.centre + 2 * (targets.glyph > 0) + (targets.shape > 0) + noise / 2
    return rank.topk(count, dim=1).indices.sort(dim=1).values


def show_patches(batch: TextBatch, features: Tensor, kept: Tensor) -> Tensor:
    """Leave only the kept patches [b, k] in the batch, in place; returns their features [b, k, w]."""
    gone = IMAGE_TOKENS - kept.shape[1]
    opening, text = batch.positions[:, :OPENING], batch.positions[:, PREFIX:]
    batch.positions = torch.cat([opening, kept + OPENING, text], dim=1)
    batch.mask = batch.mask[:, :, gone:, gone:]
    return features.gather(1, kept[:, :, None].expand(-1, -1, features.shape[-1]))


def decoder_inputs(model: LlavaForConditionalGeneration, encoder: Encoder, features: Tensor, ids: Tensor) -> Tensor:
    """Embeddings [b, n, w] of begin, user, the projected features [b, k, w] and the text."""
    embed = model.get_input_embeddings()
    opening = embed(torch.tensor([encoder.bos, encoder.user], device=ids.device)).expand(len(ids), OPENING, -1)
    return torch.cat([opening, model.model.multi_modal_projector(features), embed(ids)], dim=1)


def answer_logits(model: LlavaForConditionalGeneration, hidden: Tensor, batch: TextBatch) -> Tensor:
    """Logits [answers, vocabulary] at the positions that carry a label."""
    return model.lm_head(hidden[:, -TEXT_TOKENS:][batch.labels >= 0])


def answer_loss(logits: Tensor, batch: TextBatch) -> Tensor:
    """Mean cross entropy over answer tokens and the end token."""
    return F.cross_entropy(logits, batch.labels[batch.labels >= 0])


def category_hits(logits: Tensor, batch: TextBatch) -> dict[str, list[bool]]:
    """Per category, whether every token of an answer is the most likely one."""
    wrong = logits.argmax(-1) != batch.labels[batch.labels >= 0]
    rows, columns = (batch.labels >= 0).nonzero(as_tuple=True)
    missed = {(int(r), int(t)) for r, t in zip(rows[wrong], batch.turns[rows, columns][wrong], strict=True)}
    hits: dict[str, list[bool]] = {category: [] for category in CATEGORIES}
    for r, names in enumerate(batch.categories):
        for turn, category in enumerate(names):
            if category != CAPTION:
                hits[category].append((r, turn) not in missed)
    return hits
