"""The stages: the tower learns to see for the LLaVA's decoder, then everything is trained together."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from vtprune.assets import TINY_LLAVA
from vtprune.evals.tiny_models.labels import vision_targets
from vtprune.evals.tiny_models.llava.vision import tower_states
from vtprune.evals.tiny_models.qwen.architecture import WIDTH, build_model
from vtprune.evals.tiny_models.qwen.lessons import (
    OTHER_SIZES,
    USUAL,
    Layout,
    Lesson,
    Prefix,
    Rows,
    draw_layout,
    draw_lesson,
    lesson_rng,
    prefix_of,
    write_rows,
)
from vtprune.evals.tiny_models.qwen.seeing import Features, TokenHeads, look, patches_of
from vtprune.evals.tiny_models.tokens import Encoder
from vtprune.evals.tiny_models.training import Stage, Training
from vtprune.shapes.questions import pick

TOWER, DECODER = "model.model.visual", "model.model.language_model"
# Of the steps of the first stage, so many show pictures of the usual size, which the LLaVA's features are known for.
USUAL_SHARE = 0.7
CHECKED = (Layout("usual", *USUAL), Layout("sized", 128, 96), Layout("pair", 96, 64), Layout("clip", 64, 64))
CHECK_STEPS, CHECK_ROWS = 4, 32


def stages(steps: tuple[int, int]) -> tuple[Stage, ...]:
    """Seeing and answering, with these numbers of steps."""
    seeing = Stage(
        "see",
        steps[0],
        batch=32,
        rate=1.5e-3,
        final=0.3,
        trained=(TOWER, "heads"),
        warmup=100,
        vision=1.0,
        language=0.0,
    )
    answering = Stage(
        "answer", steps[1], batch=16, rate=1e-3, final=0.02, trained=("heads", TOWER, DECODER), warmup=100, vision=0.1,
        language=1.0,
    )  # fmt: skip
    return seeing, answering


class Trainer(Training[Stage]):
    """Trains the tiny Qwen; llava: whose features the tower first aims at."""

    decay = 0.02

    def __init__(self, output: Path, processor: Any, plan: tuple[Stage, ...], *, seed: int, console: Console) -> None:
        model, self.heads = build_model(processor.tokenizer, seed), TokenHeads()
        modules = nn.ModuleDict({"model": model, "heads": self.heads})
        super().__init__(output, processor, plan, modules=modules, seed=seed, console=console)
        self.encoder = Encoder(processor.tokenizer)
        self.llava = LlavaForConditionalGeneration.from_pretrained(TINY_LLAVA).eval()
        self.prefixes: dict[Layout, Prefix] = {}

    def next_loss(self, stage: Stage) -> Tensor:
        step = sum(s.steps for s in self.plan[: self.progress.stage]) + self.progress.step
        rng = lesson_rng("train", self.seed, step)
        if stage.language:
            layout = draw_layout(rng)
        elif rng.random() < USUAL_SHARE:
            layout = Layout("usual", *USUAL)
        else:
            layout = Layout("sized", *pick(rng, OTHER_SIZES))
        return self._loss(stage, draw_lesson("train", self.seed, step, layout=layout, rows=stage.batch))

    def _loss(self, stage: Stage, lesson: Lesson) -> Tensor:
        features = look(self.model.model.visual, *patches_of(lesson.frames))
        loss = features.tokens.new_zeros(())
        if lesson.scenes:
            loss = loss + stage.vision * self.heads(features.tokens, vision_targets(lesson.scenes))
            if not stage.language and lesson.layout == Layout("usual", *USUAL):
                wanted = self._wanted(lesson.frames[:, 0])
                loss = loss + 4 * F.mse_loss(features.tokens, wanted) / wanted.var()
        if stage.language:
            logits, rows = self._answers(lesson, features)
            loss = loss + stage.language * F.cross_entropy(logits, rows.labels[rows.labels >= 0])
        return loss

    @torch.no_grad()
    def _wanted(self, pixels: Tensor) -> Tensor:
        """What the LLaVA's projector makes of the same pictures, [b, 144, w]."""
        states = tower_states(self.llava.model.vision_tower, pixels)[:, 1:]
        projected: Tensor = self.llava.model.multi_modal_projector(states)
        return projected

    def _prefix(self, layout: Layout) -> Prefix:
        if layout not in self.prefixes:
            self.prefixes[layout] = prefix_of(self.model, self.encoder, layout)
        return self.prefixes[layout]

    def _answers(self, lesson: Lesson, features: Features) -> tuple[Tensor, Rows]:
        """Logits [answers, vocabulary] at the positions that carry a label."""
        prefix = self._prefix(lesson.layout)
        rows = write_rows(self.encoder, prefix, lesson.questions, lesson.talks)
        count, shown = len(rows.ids), int(prefix.vision.sum())
        embed = self.model.get_input_embeddings()
        states = embed(torch.cat([prefix.ids.expand(count, -1), rows.ids], dim=1))
        vision = F.pad(prefix.vision, (0, rows.ids.shape[1])).expand(count, -1)
        states = states.masked_scatter(vision[..., None], features.tokens.reshape(count, shown, WIDTH))
        text = rows.positions.expand(3, -1, -1)
        positions = torch.cat([prefix.positions[:, None].expand(-1, count, -1), text], dim=2)
        output = self.model.model.language_model(
            inputs_embeds=states,
            attention_mask=rows.mask,
            position_ids=positions,
            use_cache=False,
            visual_pos_masks=vision,
            deepstack_visual_embeds=[plane.reshape(-1, WIDTH) for plane in features.planes],
        )
        hidden = output.last_hidden_state[:, -rows.ids.shape[1] :][rows.labels >= 0]
        logits: Tensor = self.model.lm_head(hidden)
        return logits, rows

    def scores(self, stage: Stage) -> dict[str, list[float]]:
        found: dict[str, list[float]] = defaultdict(list)
        for layout in CHECKED if stage.language else CHECKED[:2]:
            for step in range(CHECK_STEPS):
                self._check(stage, draw_lesson("val", self.seed, step, layout=layout, rows=CHECK_ROWS), found)
        return dict(sorted(found.items()))

    def _check(self, stage: Stage, lesson: Lesson, scores: dict[str, list[float]]) -> None:
        features = look(self.model.model.visual, *patches_of(lesson.frames))
        if lesson.scenes:
            for name, share in self.heads.accuracy(features.tokens, vision_targets(lesson.scenes)).items():
                scores[f"_{name}"].append(share)
        logits, rows = self._answers(lesson, features)
        labelled = rows.labels >= 0
        wrong = logits.argmax(-1) != rows.labels[labelled]
        places, columns = labelled.nonzero(as_tuple=True)
        missed = set(zip(places[wrong].tolist(), rows.turns[places, columns][wrong].tolist(), strict=True))
        for row, asked in enumerate(rows.asked):
            for turn, qa in enumerate(asked):
                scores[qa.category].append((row, turn) not in missed)
