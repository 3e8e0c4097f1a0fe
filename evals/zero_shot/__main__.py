"""Train an open_clip model on the drawn shapes and prune its tower: ``python -m vtprune.evals.zero_shot``."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers.utils import logging

import vtprune
from vtprune.console.output import one_line_errors
from vtprune.evals.zero_shot.clip import build, pairs, tokens_of, train
from vtprune.files import write_text

# A picture's caption is looked for among so many.
AMONG = 50
KEEPS = (0.75, 0.5, 0.25, 0.11)
METHODS = ("flowcut", "turbo", "visionzip")


@dataclass(frozen=True)
class Row:
    """One setting: tokens left of a picture, FLOPs as a share of the unpruned tower's, the share of pictures whose
    caption was found among others, its standard error, and the mean cosine to the unpruned embedding."""

    method: str
    keep: float | None
    tokens: float
    flops: float
    found: float
    error: float
    cosine: float


@torch.no_grad()
def measure(model: Any, pixels: Tensor, texts: Tensor, *, plain: Tensor, setting: tuple[str, dict[str, Any]]) -> Row:
    """Embeds all pictures under a method."""
    method, options = setting
    found, tokens, flops, full = [], 0.0, 0, 0
    with vtprune.wrapped(model, method, **options):
        for part in pixels.split(AMONG):
            found.append(F.normalize(model.encode_image(part), dim=-1))
            report = vtprune.report(model)
            tokens += report.kept_tokens * len(part)
            flops, full = flops + report.flops, full + report.flops_full
    images = torch.cat(found)
    right = torch.cat([
        (image @ text.T).argmax(dim=1) == torch.arange(len(image))
        for image, text in zip(images.split(AMONG), texts.split(AMONG), strict=True)
    ]).float()  # fmt: skip
    accuracy, count = right.mean().item(), len(images)
    cosine = (images * plain).sum(dim=1).mean().item()
    name = f"{method}, threshold {options['merge_threshold']}" if "merge_threshold" in options else method
    return Row(
        name, options.get("keep"), tokens=tokens / count, flops=flops / full, found=accuracy,
        error=(accuracy * (1 - accuracy) / count) ** 0.5, cosine=cosine,
    )  # fmt: skip


def as_markdown(rows: list[Row]) -> str:
    """The rows as a table."""
    lines = ["| method | keep | tokens | FLOPs % | caption found % | cosine |", "|---|---|---|---|---|---|"]
    for row in rows:
        keep = "-" if row.keep is None else f"{row.keep:.0%}"
        lines.append(
            f"| {row.method} | {keep} | {row.tokens:.1f} | {100 * row.flops:.1f} | "
            f"{100 * row.found:.1f} ± {100 * row.error:.1f} | {row.cosine:.3f} |"
        )
    return "\n".join(lines)


def main(
    steps: Annotated[int, typer.Option(min=1, help="Steps of contrastive training, of 64 pictures each.")] = 400,
    pictures: Annotated[int, typer.Option(min=AMONG, help="Pictures that captions are looked for.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the weights and of the pictures.")] = 0,
    output: Annotated[Path | None, typer.Option(help="A JSON file for the numbers.")] = None,
) -> None:
    """Accuracy and cosine of an open_clip model's embeddings against how much of its tower's tokens are kept."""
    logging.disable_progress_bar()
    console = Console()
    with one_line_errors(traceback=False):
        model = build(seed)
        loss = 0.0
        for step, loss in enumerate(track(train(model, steps, seed), total=steps, console=console), 1):
            if step % 100 == 0:
                console.print(f"step {step}: loss {loss:.3f}", highlight=False)
        pixels, captions = pairs("eval", seed, 0, pictures // AMONG * AMONG)
        with torch.no_grad():
            texts = F.normalize(model.encode_text(tokens_of(captions)), dim=-1)
            plain = torch.cat([F.normalize(model.encode_image(part), dim=-1) for part in pixels.split(AMONG)])
        settings: list[tuple[str, dict[str, Any]]] = [("none", {})]
        settings += [(method, {"keep": keep}) for method in METHODS for keep in KEEPS]
        settings += [("mustdrop", {"merge_threshold": threshold}) for threshold in (0.9, 0.7, 0.5)]
        rows = [measure(model, pixels, texts, plain=plain, setting=setting) for setting in settings]
        console.print(as_markdown(rows), highlight=False, soft_wrap=True)
        if output is not None:
            write_text(output, json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    typer.run(main)
