"""The stages: the tower learns to see for the LLaVA's decoder, then everything is trained together."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from vtprune.assets import TINY_LLAVA
from vtprune.errors import VTPruneError
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
from vtprune.evals.tiny_models.schedule import CLIP_NORM, evaluating, rate_at
from vtprune.evals.tiny_models.state import Progress, load_moments, load_weights, save_state
from vtprune.evals.tiny_models.tokens import Encoder
from vtprune.files import write_folder
from vtprune.shapes.questions import pick

TOWER, DECODER = "model.model.visual", "model.model.language_model"
# Of the steps of the first stage, so many show pictures of the usual size, which the LLaVA's features are known for.
USUAL_SHARE = 0.7
CHECKED = (Layout("usual", *USUAL), Layout("sized", 128, 96), Layout("pair", 96, 64), Layout("clip", 64, 64))
CHECK_STEPS, CHECK_ROWS = 4, 32


@dataclass(frozen=True)
class Stage:
    """What one stage trains, how fast, and the weights of what tokens show and of the answers."""

    name: str
    steps: int
    batch: int
    rate: float
    final: float
    trained: tuple[str, ...]
    warmup: int
    vision: float
    language: float

    def rate_at(self, step: int) -> float:
        """The rate of a step."""
        return rate_at(self, step)


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


class Trainer:
    """Holds the model, the training-only heads, the LLaVA whose features are aimed at, and the place in the stages."""

    def __init__(self, output: Path, processor: Any, plan: tuple[Stage, ...], *, seed: int, console: Console) -> None:
        self.output, self.processor, self.plan, self.seed, self.console = output, processor, plan, seed, console
        self.encoder = Encoder(processor.tokenizer)
        self.model = build_model(processor.tokenizer, seed)
        self.heads = TokenHeads()
        self.modules = nn.ModuleDict({"model": self.model, "heads": self.heads})
        self.llava = LlavaForConditionalGeneration.from_pretrained(TINY_LLAVA).eval()
        self.prefixes: dict[Layout, Prefix] = {}
        self.state_folder = output.with_name(f"{output.name}-state")
        self.settings = {"seed": seed, "steps": [stage.steps for stage in plan]}
        found = load_weights(self.state_folder, self.modules, self.settings)
        if found is None and (output / "config.json").exists():
            raise VTPruneError(f"output: {output} holds a model of another run already; give another --output")
        self.resumed, self.progress = found is not None, found or Progress()
        self.started = time.monotonic() - self.progress.seconds

    def run(self, save_every: int, check_every: int) -> Iterator[tuple[Stage, int, float]]:
        """Train on from where the checkpoint stands; yields (stage, step, loss) after every step."""
        while self.progress.stage < len(self.plan):
            stage = self.plan[self.progress.stage]
            optimizer = self._optimizer(stage)
            if self.resumed:
                load_moments(self.state_folder, self.modules, optimizer)
                self.resumed = False
            while self.progress.step < stage.steps:
                loss = self._step(stage, optimizer)
                self.progress.step += 1
                yield stage, self.progress.step, loss
                if self.progress.step % check_every == 0 or self.progress.step == stage.steps:
                    self._report(stage, loss)
                if self.progress.step % save_every == 0:
                    self._save(optimizer)
            self.progress.stage += 1
            self.progress.step = 0
        write_folder(self.output, self._write_model)

    def _write_model(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    def _save(self, optimizer: torch.optim.Optimizer) -> None:
        self.progress.seconds = time.monotonic() - self.started
        save_state(self.state_folder, self.modules, optimizer, progress=self.progress, settings=self.settings)

    def _optimizer(self, stage: Stage) -> torch.optim.Optimizer:
        decayed: list[nn.Parameter] = []
        kept: list[nn.Parameter] = []
        for name, parameter in self.modules.named_parameters():
            parameter.requires_grad_(name.startswith(stage.trained))
            if parameter.requires_grad:
                (decayed if parameter.ndim > 1 else kept).append(parameter)
        groups = [{"params": decayed, "weight_decay": 0.02}, {"params": kept, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=stage.rate, betas=(0.9, 0.98))

    def _step(self, stage: Stage, optimizer: torch.optim.Optimizer) -> float:
        for group in optimizer.param_groups:
            group["lr"] = stage.rate_at(self.progress.step)
        step = sum(s.steps for s in self.plan[: self.progress.stage]) + self.progress.step
        rng = lesson_rng("train", self.seed, step)
        if stage.language:
            layout = draw_layout(rng)
        elif rng.random() < USUAL_SHARE:
            layout = Layout("usual", *USUAL)
        else:
            layout = Layout("sized", *pick(rng, OTHER_SIZES))
        loss = self._loss(stage, draw_lesson("train", self.seed, step, layout=layout, rows=stage.batch))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], CLIP_NORM)
        optimizer.step()
        return loss.item()

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

    @torch.no_grad()
    def _report(self, stage: Stage, loss: float) -> None:
        """Print validation scores: of tokens first, then by category."""
        scores: dict[str, list[float]] = defaultdict(list)
        with evaluating(self.modules):
            for layout in CHECKED if stage.language else CHECKED[:2]:
                for step in range(CHECK_STEPS):
                    self._check(stage, draw_lesson("val", self.seed, step, layout=layout, rows=CHECK_ROWS), scores)
        shown = "  ".join(f"{name} {100 * sum(v) / len(v):.1f}" for name, v in sorted(scores.items()))
        minutes = (time.monotonic() - self.started) / 60
        step = self.progress.step
        self.console.print(f"{minutes:6.1f} min  {stage.name} {step}  loss {loss:.3f}  {shown}", soft_wrap=True)

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
