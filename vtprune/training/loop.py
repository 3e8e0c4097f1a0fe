"""The training loop: global batches, one schedule, checkpoints that a run goes on from bit for bit."""

from __future__ import annotations

import json
import math
import os
import time
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, send_to_device
from torch import Tensor, nn

from vtprune.adapters import adapter_for, config_hash, core_model
from vtprune.errors import RunError, ScoreError, VTPruneError
from vtprune.files import refuse_changed
from vtprune.training import parameters
from vtprune.training.config import TrainConfig
from vtprune.training.conversations import Collator
from vtprune.training.data import Order, TrainingData
from vtprune.training.objective import Objective, count_targets
from vtprune.training.output import computed_shares, write_log
from vtprune.training.progress import Display
from vtprune.training.state import (
    Progress,
    load_state,
    random_state,
    read_settings,
    save_state,
)
from vtprune.wrap import methods_of

CLIP_NORM = 1.0
BETAS = (0.9, 0.999)
Batch = dict[str, Tensor]


def make_accelerator(device: str | None) -> Accelerator:
    """The process group, as `accelerate launch` made it, or this process alone; raises VTPruneError."""
    if device not in (None, "auto"):
        try:
            chosen = torch.device(device)
        except RuntimeError as error:
            raise VTPruneError(f"device: unknown device {device!r}; try cpu, cuda or cuda:1") from error
        if chosen.type == "cuda":
            if not torch.cuda.is_available():
                raise VTPruneError(f"device: {device} was asked for, but torch finds no CUDA device")
            if chosen.index is not None:
                torch.cuda.set_device(chosen)
    # Routed layers and images that are missing leave weights without a gradient in some steps.
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    cpu = device == "cpu" or not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=handlers)
    if accelerator.num_processes < int(os.environ.get("WORLD_SIZE", "1")):
        raise VTPruneError("several processes were started, but accelerate sees one; see `accelerate env`")
    simple = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if accelerator.distributed_type not in simple:
        raise VTPruneError(
            f"training runs on one process or under plain data parallelism, not {accelerator.distributed_type.value}"
        )
    return accelerator


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype to compute in."""
    if name == "auto":
        half = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if half else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32


class Run:
    """One training of one model, from where its output folder's checkpoint stands."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        data: TrainingData,
        config: TrainConfig,
        *,
        validation: TrainingData | None,
        identity: dict[str, Any],
    ) -> None:
        self.config, self.data, self.validation = config, data, validation
        self.accelerator = make_accelerator(config.device)
        self.device, self.main = self.accelerator.device, self.accelerator.is_main_process
        self.processes = self.accelerator.num_processes
        self.together = config.batch_size * config.accumulate * self.processes
        self.steps = config.total_steps(data.size, self.together)
        self.settings = self._settings(model, identity)
        self.collate = Collator(processor)
        torch.manual_seed(config.seed)
        dtype = compute_dtype(config.dtype, self.device)
        self.model = parameters.choose(model.float(), config).to(self.device)
        parameters.halve_frozen(self.model, config, dtype)
        if config.gradient_checkpointing:
            _checkpoint_activations(self.model)
        groups = parameters.groups(self.model, config)
        self.weights = [weight for group in groups for weight in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=config.rate, betas=BETAS)
        self.objective: nn.Module = Objective(self.model, dtype)
        torch.manual_seed(config.seed + self.accelerator.process_index)
        self.progress = Progress()
        self.resumed = self._resume()
        self.prepared: nn.Module = self.accelerator.prepare_model(self.objective)
        self.order = Order(data.size, config.seed)

    def _settings(self, model: Any, identity: dict[str, Any]) -> dict[str, Any]:
        """What must be the same to go on: the method, the base, the data, and how they are trained."""
        core = core_model(model)
        methods = [one.to_dict() for one in methods_of(core)]
        own = {"method": methods, "base": config_hash(core), "steps": self.steps, "processes": self.processes}
        settings: dict[str, Any] = json.loads(
            json.dumps({**self.config.identity(), **own, **self.data.identity(), **identity})
        )
        return settings

    def _resume(self) -> bool:
        """Goes on from a checkpoint; raises VTPruneError for that of another run."""
        old = read_settings(self.config.output)
        if old is None:
            return False
        self.check_same(old)
        process = self.accelerator.process_index
        self.progress = load_state(self.config.output, self.model, self.optimizer, device=self.device, process=process)
        return True

    def check_same(self, old: dict[str, Any]) -> None:
        """Raises VTPruneError, naming what differs, where a run of other settings has left its own."""
        refuse_changed(f"output: {self.config.output}", old, self.settings, hint="; give another folder")

    def run(self, display: Display) -> Progress:
        """Trains to the end."""
        started = time.monotonic() - self.progress.seconds
        self._train_mode()
        sums: list[tuple[float, float, int]] = []
        while self.progress.step < self.steps:
            sums.append(self._step())
            self.progress.seconds = time.monotonic() - started
            last = self.progress.step == self.steps
            if last or self.progress.step % self.config.log_every == 0:
                self._log(sums, display)
                sums = []
            else:
                display.tick(self.progress)
            if last or self.progress.step % self.config.save_every == 0:
                self._validate(display)
                self.save()
        return self.progress

    def _train_mode(self) -> None:
        self.model.train()
        tower = adapter_for(self.model).vision_tower
        if not any(weight.requires_grad for weight in tower.parameters()):
            tower.eval()

    def _places(self, step: int) -> list[range]:
        """Where in the run's order the samples of this process stand, a micro-batch each."""
        size, process = self.config.batch_size, self.accelerator.process_index
        first = step * self.together
        starts = [first + (one * self.processes + process) * size for one in range(self.config.accumulate)]
        return [range(start, start + size) for start in starts]

    def _batches(self) -> list[Batch]:
        return [
            self.collate([self.data[self.order[place]] for place in places])
            for places in self._places(self.progress.step)
        ]

    def _step(self) -> tuple[float, float, int]:
        """One step of the optimiser; the global sums of cross-entropies and of auxiliary losses, and the targets."""
        batches, config = self._batches(), self.config
        counts = self._reduce([float(sum(map(count_targets, batches)))])
        targets = int(counts[0])
        share = config.rate_at(self.progress.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = share * group["peak"]
        sums = torch.zeros(2, device=self.device)
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.prepared):
                try:
                    loss, extra = self.prepared(send_to_device(batch, self.device))
                except ScoreError as error:
                    raise RunError(f"step {self.progress.step + 1}: {error}") from error
                # Gradients are averaged over processes, and this loss is a sum over them.
                (loss * self.processes / targets + extra / config.accumulate).backward()
            sums += torch.stack([loss.detach(), extra.detach() / config.accumulate / self.processes])
        entropy, extra_loss = self._reduce(sums)
        norm = nn.utils.clip_grad_norm_(self.weights, CLIP_NORM)
        if not math.isfinite(entropy + extra_loss + norm.item()):
            raise RunError(
                f"the loss or its gradient is not finite at step {self.progress.step + 1}; a lower --lr may help"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        self.progress.samples += self.together
        self.progress.tokens += targets
        return entropy, extra_loss, targets

    def _reduce(self, values: list[float] | Tensor) -> list[float]:
        """The sums over all processes."""
        tensor = torch.as_tensor(values, dtype=torch.float64 if self.device.type != "mps" else torch.float32)
        total = self.accelerator.reduce(tensor.to(self.device), "sum")
        found: list[float] = total.tolist()
        return found

    def _log(self, sums: list[tuple[float, float, int]], display: Display) -> None:
        entropies, extras, targets = zip(*sums, strict=True)
        share = self.config.rate_at(self.progress.step - 1, self.steps)
        self.progress.curve.append(
            {
                "step": self.progress.step,
                "loss": sum(entropies) / sum(targets),
                "auxiliary": sum(extras) / len(extras),
                "rate": share * self.config.rate,
            }
        )
        display.log(self.progress)

    @torch.no_grad()
    def _validate(self, display: Display) -> None:
        """The loss over `eval_limit` batches that are not trained on."""
        if not self.config.eval_limit or self.validation is None:
            return
        self.model.eval()
        size, sums = self.config.batch_size, torch.zeros(2, device=self.device)
        for number in range(self.accelerator.process_index, self.config.eval_limit, self.processes):
            batch = self.collate([self.validation[index] for index in range(number * size, (number + 1) * size)])
            loss, _ = self.objective(send_to_device(batch, self.device))
            sums += torch.stack([loss, loss.new_tensor(float(count_targets(batch)))])
        self._train_mode()
        loss_sum, count = self._reduce(sums)
        self.progress.validation.append({"step": self.progress.step, "loss": loss_sum / count})
        display.validated(self.progress)

    @torch.no_grad()
    def shares(self) -> list[float]:
        """Which share of the vision tokens each decoder layer computes, over the first batch of the data."""
        self.model.eval()
        first = self.collate([self.data[self.order[place]] for place in range(self.config.batch_size)])
        self.objective(send_to_device(first, self.device))
        return computed_shares(self.model)

    def save(self) -> None:
        """Writes the checkpoint, and the curve so far."""
        random = self.accelerator.gather(random_state(self.device)[None].to(self.device))
        if self.main:
            save_state(
                self.config.output,
                self.model,
                self.optimizer,
                progress=self.progress,
                settings=self.settings,
                random=random,
            )
            write_log(self.config.output, self.settings, self.progress, self.model)
        self.accelerator.wait_for_everyone()


def _checkpoint_activations(model: Any) -> None:
    """Layers are computed again in the backward pass; transformers 5.24 has another name for it than 5.20."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
