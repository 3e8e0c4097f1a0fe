"""Train the bundled Qwen: ``python -m vtprune.evals.tiny_models.qwen --output DIR``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from transformers.utils import logging

from vtprune.console.output import one_line_errors
from vtprune.evals.tiny_models.qwen.architecture import build_processor
from vtprune.evals.tiny_models.qwen.loop import Trainer, stages
from vtprune.files import held


def main(
    output: Annotated[Path, typer.Option(help="Folder for the model; checkpoints go to its '-state' sibling.")],
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the training scenes.")] = 0,
    stage1_steps: Annotated[int, typer.Option(help="Steps of the tower alone.")] = 1500,
    stage2_steps: Annotated[int, typer.Option(help="Steps of everything together.")] = 3000,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 250,
    check_every: Annotated[int, typer.Option(help="Steps between validations.")] = 250,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
) -> None:
    """Train in two stages, going on from the last checkpoint if there is one."""
    if threads is not None:
        torch.set_num_threads(threads)
    logging.disable_progress_bar()
    console = Console()
    with one_line_errors(traceback=False), held(output):
        trainer = Trainer(output, build_processor(), stages((stage1_steps, stage2_steps)), seed=seed, console=console)
        for _ in trainer.run(save_every, check_every):
            pass


if __name__ == "__main__":
    typer.run(main)
