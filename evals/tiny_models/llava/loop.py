"""The stages: tower alone, then the decoder on few and on all patches, then everything together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import LlavaProcessor

from vtprune.evals.tiny_models.labels import pixel_batch, vision_targets
from vtprune.evals.tiny_models.llava.architecture import IMAGE_TOKENS, build_model
from vtprune.evals.tiny_models.llava.language import (
    TextBatch,
    answer_logits,
    answer_loss,
    category_hits,
    decoder_inputs,
    main_patches,
    scenes_for,
    show_patches,
    text_batch,
)
from vtprune.evals.tiny_models.llava.vision import (
    VisionHeads,
    patch_accuracy,
    pooled_state,
    tower_states,
)
from vtprune.evals.tiny_models.tokens import Encoder
from vtprune.evals.tiny_models.training import Stage, Training
from vtprune.shapes.questions import CATEGORY_SHARES
from vtprune.shapes.scene import Scene

VAL_SCENES, VAL_BATCH = 256, 32


@dataclass(frozen=True)
class LlavaStage(Stage):
    """A stage in which the decoder is shown `patches` vision tokens and `captions` lists of all things before the
    questions."""

    patches: int = IMAGE_TOKENS
    captions: int = 0


def stages(steps: tuple[int, int, int, int]) -> tuple[LlavaStage, ...]:
    """The four stages with these numbers of steps."""
    tower, rest = "model.model.vision_tower", ("model.model.multi_modal_projector", "model.model.language_model")
    vision = LlavaStage("vision", steps[0], batch=48, rate=1.5e-3, final=0.05, trained=(tower, "heads"), vision=1.0)
    # Among a few telling patches the decoder finds out how to look things up; with all of them,
    # three quarters bare ground, its attention stays uniform for very long.
    focus = LlavaStage("focus", steps[1], rate=2e-3, final=0.5, trained=rest, language=1.0, patches=24, captions=3)
    language = LlavaStage("language", steps[2], rate=1.5e-3, final=0.3, trained=rest, language=1.0, captions=2)
    # The vision loss stays on, so that CLS keeps its meaning while the tower moves.
    joint = LlavaStage(
        "joint",
        steps[3],
        rate=1.2e-3,
        final=0.02,
        trained=(tower, "heads", *rest),
        warmup=50,
        vision=0.2,
        language=1.0,
        captions=1,
    )
    return vision, focus, language, joint


class Trainer(Training[LlavaStage]):
    """Trains the tiny LLaVA: per-patch scores in stage 1, per category afterwards."""

    decay = 0.05

    def __init__(
        self,
        output: Path,
        processor: LlavaProcessor,
        plan: tuple[LlavaStage, ...],
        *,
        device: str,
        seed: int,
        compiled: bool,
        console: Console,
    ) -> None:
        self.device = torch.device(device)
        model, self.heads = build_model(processor.tokenizer, seed), VisionHeads()
        modules = nn.ModuleDict({"model": model, "heads": self.heads}).to(self.device)
        super().__init__(output, processor, plan, modules=modules, seed=seed, console=console)
        self.encoder = Encoder(processor.tokenizer)
        self.tower = self.model.model.vision_tower
        self.read = torch.compile(tower_states) if compiled else tower_states
        language_model = self.model.model.language_model
        self.decode = torch.compile(language_model) if compiled else language_model

    def _indices(self, stage: LlavaStage) -> range:
        """Scenes of the next step: every step of every stage has scenes of its own."""
        done = sum(s.steps * s.batch for s in self.plan[: self.progress.stage])
        first = done + self.progress.step * stage.batch
        return range(first, first + stage.batch)

    def next_loss(self, stage: LlavaStage) -> Tensor:
        scenes = scenes_for("train", self.seed, self._indices(stage))
        pixels = pixel_batch(scenes.values()).to(self.device)
        with torch.set_grad_enabled(stage.vision > 0):
            states = self.read(self.tower, pixels)
        loss = states.new_zeros(())
        if stage.vision:
            targets = vision_targets(scenes.values()).to(self.device)
            loss = loss + stage.vision * self.heads(states, pooled_state(self.tower, states), targets)
        if stage.language:
            logits, batch = self._answers(stage, "train", scenes, states)
            loss = loss + stage.language * answer_loss(logits, batch)
        return loss

    def _answers(
        self, stage: LlavaStage, split: str, scenes: dict[int, Scene], states: Tensor
    ) -> tuple[Tensor, TextBatch]:
        """Logits [answers, vocabulary] for the questions about a batch of scenes."""
        captions = stage.captions if split == "train" else 0
        batch = text_batch(self.encoder, split, self.seed, scenes, captions=captions).to(self.device)
        features = states[:, 1:]
        if stage.patches < IMAGE_TOKENS:
            targets = vision_targets(scenes.values())
            kept = main_patches(targets, stage.patches, min(scenes)).to(self.device)
            features = show_patches(batch, features, kept)
        output = self.decode(
            inputs_embeds=decoder_inputs(self.model, self.encoder, features, batch.ids),
            attention_mask=batch.mask,
            position_ids=batch.positions,
            use_cache=False,
        )
        return answer_logits(self.model, output.last_hidden_state, batch), batch

    def scores(self, stage: LlavaStage) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        for first in range(0, VAL_SCENES, VAL_BATCH):
            for name, value in self._check(stage, range(first, first + VAL_BATCH)):
                found.setdefault(name, []).append(value)
        return found

    def _check(self, stage: LlavaStage, indices: range) -> Iterator[tuple[str, float]]:
        scenes = scenes_for("val", self.seed, indices)
        states = self.read(self.tower, pixel_batch(scenes.values()).to(self.device))
        if stage.vision:
            yield from patch_accuracy(self.heads, states, vision_targets(scenes.values()).to(self.device)).items()
        if stage.language:
            hits = category_hits(*self._answers(stage, "val", scenes, states))
            yield from ((name, float(hit)) for name in CATEGORY_SHARES for hit in hits[name])
