"""Training in stages: how fast each one learns, what it leaves on disk, and how it goes on after an interruption."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from rich.console import Console
from torch import Tensor, nn

from vtprune.errors import VTPruneError
from vtprune.evals.tiny_models.state import Progress, load_moments, load_weights, save_state
from vtprune.files import write_folder

CLIP_NORM = 1.0


@dataclass(frozen=True)
class Stage:
    """What one stage trains and how fast: names of modules, and in batches of what size; `vision` and `language` are
    the weights of the two losses."""

    name: str
    steps: int
    rate: float
    final: float
    trained: tuple[str, ...]
    batch: int = 16
    warmup: int = 100
    vision: float = 0.0
    language: float = 0.0

    def rate_at(self, step: int) -> float:
        """Linear warm-up, level for two thirds, then linear down to `final` of the rate."""
        left = max(0.0, 3 * (self.steps - step) / max(1, self.steps))
        return self.rate * min((step + 1) / self.warmup, self.final + (1 - self.final) * min(1.0, left))


S = TypeVar("S", bound=Stage)


class Training(ABC, Generic[S]):
    """Holds the model, the training-only heads and the place in the stages.

    decay: weight decay of matrices; norms, biases and other vectors have none.
    """

    decay: ClassVar[float]

    def __init__(
        self, output: Path, processor: Any, plan: tuple[S, ...], *, modules: nn.ModuleDict, seed: int, console: Console
    ) -> None:
        self.output, self.processor, self.plan, self.seed = output, processor, plan, seed
        self.modules, self.console = modules, console
        self.model: Any = modules["model"]
        self.state_folder = output.with_name(f"{output.name}-state")
        self.settings = {"seed": seed, "steps": [stage.steps for stage in plan]}
        found = load_weights(self.state_folder, modules, self.settings)
        if found is None and (output / "config.json").exists():
            raise VTPruneError(f"output: {output} holds a model of another run already; give another --output")
        self.resumed, self.progress = found is not None, found or Progress()
        self.started = time.monotonic() - self.progress.seconds

    @abstractmethod
    def next_loss(self, stage: S) -> Tensor:
        """The loss of the step that comes next."""

    @abstractmethod
    def scores(self, stage: S) -> dict[str, list[float]]:
        """Scores on held-out scenes, from 0 to 1, by what they are of."""

    def run(self, save_every: int, check_every: int) -> Iterator[tuple[S, int, float]]:
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

    def save(self, stage: S, optimizer: torch.optim.Optimizer) -> None:
        """Write the checkpoint, and the model itself once it can answer."""
        self.progress.seconds = time.monotonic() - self.started
        save_state(self.state_folder, self.modules, optimizer, progress=self.progress, settings=self.settings)
        if stage.language:
            write_folder(self.output, self._write_model)

    def _write_model(self, draft: Path) -> None:
        self.model.save_pretrained(draft)
        self.processor.save_pretrained(draft)

    def _optimizer(self, stage: S) -> torch.optim.Optimizer:
        for name, parameter in self.modules.named_parameters():
            parameter.requires_grad_(name.startswith(stage.trained))
        trained = [p for p in self.modules.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": self.decay},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=stage.rate, betas=(0.9, 0.98))

    def _step(self, stage: S, optimizer: torch.optim.Optimizer) -> float:
        for group in optimizer.param_groups:
            group["lr"] = stage.rate_at(self.progress.step)
        loss = self.next_loss(stage)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], CLIP_NORM)
        optimizer.step()
        return loss.item()

    @torch.no_grad()
    def _report(self, stage: S, loss: float) -> None:
        """Print validation scores."""
        with evaluating(self.modules):
            scores = self.scores(stage)
        shown = "  ".join(f"{name} {100 * sum(v) / max(1, len(v)):.1f}" for name, v in scores.items())
        minutes, step = (time.monotonic() - self.started) / 60, self.progress.step
        self.console.print(f"{minutes:6.1f} min  {stage.name} {step}  loss {loss:.3f}  {shown}", soft_wrap=True)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while."""
    module.eval()
    try:
        yield
    finally:
        module.train()
