"""The stages: tower alone, then the decoder on few and on all patches, then everything together."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import LlavaProcessor

from vtprune.errors import VTPruneError
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
from vtprune.evals.tiny_models.schedule import CLIP_NORM, evaluating, rate_at
from vtprune.evals.tiny_models.state import (
    Progress,
    load_moments,
    load_weights,
    save_state,
)
from vtprune.evals.tiny_models.tokens import Encoder
from vtprune.files import write_folder
from vtprune.shapes.questions import CATEGORY_SHARES
from vtprune.shapes.scene import Scene

VAL_SCENES, VAL_BATCH = 256, 32


@dataclass(frozen=True)
class Stage:
    """What one stage trains and how fast; `vision` and `language` are the weights of the two losses.

    The decoder is shown `patches` vision tokens and `captions` lists of all things before the questions.
    """

    name: str
    steps: int
    rate: float
    final: float
    trained: tuple[str, ...]
    batch: int = 16
    warmup: int = 100
    vision: float = 0.0
    language: float = 0.0
    patches: int = IMAGE_TOKENS
    captions: int = 0

    def rate_at(self, step: int) -> float:
        """The rate of a step."""
        return rate_at(self, step)


def stages(steps: tuple[int, int, int, int]) -> tuple[Stage, ...]:
    """The four stages with these numbers of steps."""
    tower, rest = "model.model.vision_tower", ("model.model.multi_modal_projector", "model.model.language_model")
    vision = Stage("vision", steps[0], batch=48, rate=1.5e-3, final=0.05, trained=(tower, "heads"), vision=1.0)
    # Among a few telling patches the decoder finds out how to look things up; with all of them,
    # three quarters bare ground, its attention stays uniform for very long.
    focus = Stage("focus", steps[1], rate=2e-3, final=0.5, trained=rest, language=1.0, patches=24, captions=3)
    language = Stage("language", steps[2], rate=1.5e-3, final=0.3, trained=rest, language=1.0, captions=2)
    # The vision loss stays on, so that CLS keeps its meaning while the tower moves.
    joint = Stage(
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


class Trainer:
    """Holds the model, the training-only heads and the position in the stages."""

    def __init__(
        self,
        output: Path,
        processor: LlavaProcessor,
        plan: tuple[Stage, ...],
        *,
        device: str,
        seed: int,
        compiled: bool,
        console: Console,
    ) -> None:
        self.output, self.processor, self.plan, self.seed = output, processor, plan, seed
        self.console, self.device = console, torch.device(device)
        self.encoder = Encoder(processor.tokenizer)
        self.model = build_model(processor.tokenizer, seed)
        self.heads = VisionHeads()
        self.modules = nn.ModuleDict({"model": self.model, "heads": self.heads}).to(self.device)
        self.tower = self.model.model.vision_tower
        self.state_folder = output.with_name(f"{output.name}-state")
        self.settings = {"seed": seed, "steps": [stage.steps for stage in plan]}
        found = load_weights(self.state_folder, self.modules, self.settings)
        if found is None and (output / "config.json").exists():
            raise VTPruneError(f"output: {output} holds a model of another run already; give another --output")
        self.resumed, self.progress = found is not None, found or Progress()
        self.started = time.monotonic() - self.progress.seconds
        self.read = torch.compile(tower_states) if compiled else tower_states
        language_model = self.model.model.language_model
        self.decode = torch.compile(language_model) if compiled else language_model

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
                    self.save(stage, optimizer)
            self.progress.stage, self.progress.step = self.progress.stage + 1, 0
            self.save(stage, self._optimizer(stage))

    def save(self, stage: Stage, optimizer: torch.optim.Optimizer) -> None:
        """Write the checkpoint, and the model itself once it can answer."""
        self.progress.seconds = time.monotonic() - self.started
        save_state(self.state_folder, self.modules, optimizer, self.progress, settings=self.settings)
        if stage.language:
            write_folder(self.output, self._write_model)

    def _write_model(self, draft: Path) -> None:
        self.model.save_pretrained(draft)
        self.processor.save_pretrained(draft)

    def _optimizer(self, stage: Stage) -> torch.optim.AdamW:
        for name, parameter in self.modules.named_parameters():
            parameter.requires_grad_(name.startswith(stage.trained))
        trained = [p for p in self.modules.parameters() if p.requires_grad]
        # Matrices decay; norms, biases and other vectors do not.
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.05},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=stage.rate, betas=(0.9, 0.98))

    def _indices(self, stage: Stage) -> range:
        """Scenes of the next step: every step of every stage has scenes of its own."""
        done = sum(s.steps * s.batch for s in self.plan[: self.progress.stage])
        first = done + self.progress.step * stage.batch
        return range(first, first + stage.batch)

    def _step(self, stage: Stage, optimizer: torch.optim.Optimizer) -> float:
        for group in optimizer.param_groups:
            group["lr"] = stage.rate_at(self.progress.step)
        loss = self._loss(stage, self._indices(stage))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], CLIP_NORM)
        optimizer.step()
        return loss.item()

    def _loss(self, stage: Stage, indices: range) -> Tensor:
        scenes = scenes_for("train", self.seed, indices)
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

    def _answers(self, stage: Stage, split: str, scenes: dict[int, Scene], states: Tensor) -> tuple[Tensor, TextBatch]:
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

    @torch.no_grad()
    def _report(self, stage: Stage, loss: float) -> None:
        """Print validation scores: per patch in stage 1, per category afterwards."""
        scores: dict[str, list[float]] = {}
        with evaluating(self.modules):
            for first in range(0, VAL_SCENES, VAL_BATCH):
                for name, value in self._check(stage, range(first, first + VAL_BATCH)):
                    scores.setdefault(name, []).append(value)
        shown = "  ".join(f"{name} {100 * sum(v) / max(1, len(v)):.1f}" for name, v in scores.items())
        minutes = (time.monotonic() - self.started) / 60
        self.console.print(
            f"{minutes:6.1f} min  {stage.name} {self.progress.step}  loss {loss:.3f}  {shown}", soft_wrap=True
        )

    def _check(self, stage: Stage, indices: range) -> Iterator[tuple[str, float]]:
        scenes = scenes_for("val", self.seed, indices)
        states = self.read(self.tower, pixel_batch(scenes.values()).to(self.device))
        if stage.vision:
            yield from patch_accuracy(self.heads, states, vision_targets(scenes.values()).to(self.device)).items()
        if stage.language:
            hits = category_hits(*self._answers(stage, "val", scenes, states))
            yield from ((name, float(hit)) for name in CATEGORY_SHARES for hit in hits[name])
