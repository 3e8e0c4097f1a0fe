"""Short training runs of the bundled model."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoModelForImageTextToText, AutoProcessor

import vtprune
from vtprune.assets import TINY_LLAVA
from vtprune.training import ShapesData, TrainConfig, train


def load() -> Any:
    """The bundled model."""
    return AutoModelForImageTextToText.from_pretrained(TINY_LLAVA)


def processor() -> Any:
    """Its processor."""
    return AutoProcessor.from_pretrained(TINY_LLAVA)


def run(
    output: Path, method: str = "pmod", *, lines: list[str] | None = None, data: Any = None, **options: Any
) -> Any:
    """The bundled model with a method, after a short training on the CPU; `lines` gets what was printed."""
    model, text = vtprune.wrap(load(), method), io.StringIO()
    config = TrainConfig(
        **{"output": output, "batch_size": 2, "lr": 1e-3, "log_every": 1, "device": "cpu", "dtype": "float32"}
        | options
    )
    train(model, processor(), data or ShapesData(questions=2), config, console=Console(file=text, width=200))
    if lines is not None:
        lines += text.getvalue().splitlines()
    return model


def ask(of: Any) -> dict[str, Any]:
    """The inputs for one drawn question."""
    sample = ShapesData(split="val")[0]
    text = of.apply_chat_template(list(sample.messages[:1]), add_generation_prompt=True)
    return dict(of(text=text, images=sample.images[0], return_tensors="pt", add_special_tokens=False))
