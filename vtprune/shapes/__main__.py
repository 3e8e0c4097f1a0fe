"""Build the frozen evaluation set: ``python -m vtprune.shapes assets/shapes_eval.parquet``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vtprune.shapes.dataset import (
    blind_baseline,
    build_eval_rows,
    overlap_with_training,
    write_eval_rows,
)
from vtprune.shapes.more import PARTS, build_more_rows, write_more_rows


def main(
    output: Annotated[Path, typer.Argument(help="The parquet file to write.")],
    per_category: Annotated[int, typer.Option(help="Questions in each of the five categories.")] = 300,
    seed: Annotated[int, typer.Option(help="Seed of the evaluation scenes.")] = 0,
    train_scenes: Annotated[int, typer.Option(help="Training scenes to compare against.")] = 200_000,
    train_seed: Annotated[int, typer.Option(help="Seed of the training scenes.")] = 0,
    more: Annotated[
        Path | None, typer.Option(help="A folder for the second set, a file for each of its parts.")
    ] = None,
) -> None:
    """Write the evaluation questions, after checking that no evaluation scene is a training scene."""
    shared = overlap_with_training(per_category, seed, train_seed, train_scenes)
    if shared:
        raise typer.BadParameter(f"{shared} evaluation scenes occur in training; choose another seed")
    rows = build_eval_rows(per_category, seed)
    write_eval_rows(rows, output)
    typer.echo(f"{len(rows)} questions on {len({row.image for row in rows})} images: {output}")
    for category, accuracy in blind_baseline(rows).items():
        typer.echo(f"  {category}: {accuracy:.1%} without looking")
    if more is None:
        return
    for part in PARTS:
        questions = build_more_rows(part, seed)
        write_more_rows(questions, more / f"{part}.parquet")
        typer.echo(f"{len(questions)} questions: {more / part}.parquet")


if __name__ == "__main__":
    typer.run(main)
