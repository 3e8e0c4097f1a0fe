"""What a training run does: its settings, checked when they are given."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtprune.errors import VTPruneError

TRAINED = ("all", "decoder", "routers", "lora")
DTYPES = ("auto", "float32", "bfloat16")
# What fine-tuning of a whole model takes, and what low-rank adapters take.
RATE, LORA_RATE = 2e-5, 2e-4
DRAWN_STEPS = 1000
LORA_RANK = 16


@dataclass(frozen=True)
class TrainConfig:
    """How to train. At most one of steps and epochs is given; neither is one epoch, or 1,000 steps of drawn data.

    batch_size: samples a process and micro-batch; accumulate: micro-batches a step; lr: the highest rate (None: 2e-5,
    or 2e-4 for LoRA); router_lr: that of the method's own weights (None: `lr`); warmup: the share of steps in which it
    rises; train: "all", "decoder" (all but the vision tower), "routers" (the method's weights alone) or "lora"
    (adapters on the decoder, and the method's weights); save_every, log_every: in steps; eval_limit: validation
    batches at each save; dtype: "bfloat16" computes in it, weights and optimiser stay in float32.
    Raises VTPruneError for a value that cannot be.
    """

    output: Path
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 16
    accumulate: int = 1
    lr: float | None = None
    router_lr: float | None = None
    warmup: float = 0.03
    weight_decay: float = 0.0
    train: str = "decoder"
    lora_rank: int = LORA_RANK
    save_every: int = 500
    log_every: int = 10
    eval_limit: int = 0
    seed: int = 0
    device: str | None = None
    dtype: str = "auto"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "lora_rank", "save_every", "log_every"):
            _whole(name, getattr(self, name), 1)
        for name in ("eval_limit", "seed"):
            _whole(name, getattr(self, name), 0)
        if self.steps is not None and self.epochs is not None:
            raise VTPruneError("steps and epochs say the same thing; give one of them")
        if self.steps is not None:
            _whole("steps", self.steps, 1)
        if self.train == "routers" and self.lr is not None and self.router_lr is not None:
            raise VTPruneError("lr is of the base model's weights, which train='routers' leaves alone; give router_lr")
        if self.train == "routers" and self.weight_decay:
            raise VTPruneError("weight_decay is of the base model's weights, which train='routers' leaves alone")
        for name in ("epochs", "lr", "router_lr"):
            value = getattr(self, name)
            if value is not None and not (_finite(value) and value > 0):
                raise VTPruneError(f"{name} is a number above 0, got {value!r}")
        if not (_finite(self.warmup) and 0 <= self.warmup < 1):
            raise VTPruneError(f"warmup is the share of the steps in [0, 1) in which the rate rises: {self.warmup!r}")
        if not (_finite(self.weight_decay) and self.weight_decay >= 0):
            raise VTPruneError(f"weight_decay is a number of at least 0, got {self.weight_decay!r}")
        for name, choices in (("train", TRAINED), ("dtype", DTYPES)):
            if getattr(self, name) not in choices:
                raise VTPruneError(f"{name} is one of {', '.join(choices)}, got {getattr(self, name)!r}")

    @property
    def rate(self) -> float:
        """The highest learning rate of the base model's weights."""
        return self.lr or (LORA_RATE if self.train == "lora" else RATE)

    def total_steps(self, size: int | None, together: int) -> int:
        """How many steps of `together` samples there are, for data of this size (None: drawn, without end)."""
        if self.steps is not None:
            return self.steps
        if size is None:
            if self.epochs is not None:
                raise VTPruneError("drawn data has no epochs; give steps")
            return DRAWN_STEPS
        return max(1, math.ceil((self.epochs or 1) * size / together))

    def rate_at(self, step: int, steps: int) -> float:
        """The share of the highest rate that step 0, 1, … takes: a linear rise, then half a cosine down to 0."""
        rise = round(self.warmup * steps)
        if step < rise:
            return (step + 1) / (rise + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))

    def identity(self) -> dict[str, Any]:
        """What a run must share with the one that it goes on from."""
        passing = ("output", "save_every", "log_every", "eval_limit", "device", "steps", "epochs", "lr")
        return {name: value for name, value in vars(self).items() if name not in passing} | {"lr": self.rate}


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise VTPruneError(f"{name} is a whole number of at least {least}, got {value!r}")
