"""Train the bundled LLaVA: ``python -m vtprune.evals.tiny_models.llava --output DIR``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers.utils import logging

from vtprune.console.output import one_line_errors
from vtprune.evals.tiny_models.evaluate import as_markdown, evaluate
from vtprune.evals.tiny_models.llava.architecture import build_processor
from vtprune.evals.tiny_models.llava.loop import Trainer, stages
from vtprune.files import held
from vtprune.shapes.dataset import read_eval_rows


def main(
    output: Annotated[Path, typer.Option(help="Folder for the model; checkpoints go to its '-state' sibling.")],
    device: Annotated[str, typer.Option(help="Such as cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the training scenes.")] = 0,
    stage1_steps: Annotated[int, typer.Option(help="Steps of the vision tower alone.")] = 1000,
    stage2_steps: Annotated[int, typer.Option(help="Steps of projector and decoder on few patches.")] = 1000,
    stage3_steps: Annotated[int, typer.Option(help="Steps of projector and decoder on all patches.")] = 1200,
    stage4_steps: Annotated[int, typer.Option(help="Steps of everything together.")] = 4500,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 250,
    check_every: Annotated[int, typer.Option(help="Steps between validations.")] = 250,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Use torch.compile.")] = False,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    eval_set: Annotated[Path | None, typer.Option(help="Parquet file to evaluate on in the end.")] = None,
) -> None:
    """Train in four stages, going on from the last checkpoint if there is one."""
    if threads is not None:
        torch.set_num_threads(threads)
    logging.disable_progress_bar()  # saving has a bar of its own, which would break ours
    console = Console()
    plan = stages((stage1_steps, stage2_steps, stage3_steps, stage4_steps))
    with one_line_errors(traceback=False), held(output):
        trainer = Trainer(
            output, build_processor(), plan, device=device, seed=seed, compiled=compiled, console=console
        )
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as progress:
            bars = {stage.name: progress.add_task(stage.name, total=stage.steps) for stage in plan}
            for stage, step, loss in trainer.run(save_every, check_every):
                progress.update(bars[stage.name], completed=step, description=f"{stage.name} {loss:.3f}")
    if eval_set is not None:
        console.print(as_markdown(evaluate(output, read_eval_rows(eval_set), device=device)))


if __name__ == "__main__":
    typer.run(main)
