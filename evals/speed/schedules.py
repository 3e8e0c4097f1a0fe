"""The pictures of schedules.md: ``python -m vtprune.evals.speed.schedules FOLDER``."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from PIL import Image

import vtprune
from vtprune.assets import SHAPES_EVAL
from vtprune.console.figures import COLOURS, GREY, figure_png, plain
from vtprune.errors import RunError, VTPruneError
from vtprune.files import held, write_bytes
from vtprune.loading.model import load_model
from vtprune.loading.pictures import open_picture
from vtprune.loading.prompts import encode, place, question
from vtprune.method import schedules
from vtprune.method.facts import PUBLISHED
from vtprune.pruners import FastV, PyramidDrop
from vtprune.pruners.parts.staged import scaled_layers
from vtprune.shapes.dataset import read_eval_rows

# A decoder of 7B parameters, and the means that are drawn for it.
DEPTH = 32
MEANS = (0.75, 0.5, 0.25)
ENTROPY_KEEP, IMAGES = 0.5, 5

Line = tuple[str, Sequence[float], dict[str, Any]]


def percent(share: float) -> str:
    """53.75%, 50%: what is needed of four digits."""
    return f"{100 * share:.4g}%"


def budget_lines(name: str) -> list[Line]:
    """A schedule at each of the means, where the methods that use it place it."""
    lines: list[Line] = []
    for mean, colour in zip(MEANS, COLOURS, strict=False):
        layers: tuple[int, ...] = scaled_layers(FastV.published_layers, DEPTH)
        if name == "steps":
            layers = PyramidDrop().places(mean)
        ratios = schedules.fitted(name, DEPTH, layers, mean)
        lines.append((f"mean {percent(mean)}", ratios, {"color": colour}))
    return lines


def published_line(label: str, ratios: schedules.Ratios) -> Line:
    """A method's own setting, on top of the others."""
    dashed = {"color": "black", "linestyle": (0, (4, 2)), "linewidth": 1.3}
    return f"{label}\nas published,\nmean {percent(schedules.mean(ratios))}", ratios, dashed


def entropy_lines(images: int) -> tuple[list[Line], int]:
    """What the bundled model's decoder processed of some bundled images, and the depth of that decoder."""
    model, processor = load_model()
    rows = list({row.image: row for row in read_eval_rows(SHAPES_EVAL)}.values())[:images]
    method = PyramidDrop(keep=ENTROPY_KEEP, schedule=schedules.ENTROPY)
    counts, totals = [], []
    for row in rows:
        inputs = place(encode(processor, [question(row.open_image(), row.question)]), model)
        with vtprune.wrapped(model, method), torch.no_grad():
            model(**inputs)
            image = vtprune.report(model).samples[0].images[0]
        counts.append([len(kept) for kept in image.kept_per_layer])
        totals.append(image.tokens)
    depth = len(counts[0])
    even = schedules.fitted(
        "steps", depth, method.bind(replace(PUBLISHED, decoder_depth=depth)).places(ENTROPY_KEEP), ENTROPY_KEEP
    )
    lines: list[Line] = []
    for index, (own, total) in enumerate(zip(counts, totals, strict=True)):
        shares = [count / total for count in own]
        label = f"image {index + 1}, mean {percent(schedules.mean(shares))}"
        lines.append((label, shares, {"color": COLOURS[index % len(COLOURS)]}))
    dashed = {"color": GREY, "linestyle": (0, (4, 2)), "linewidth": 1.3}
    return [*lines, (f"equal steps,\nmean {percent(ENTROPY_KEEP)}", even, dashed)], depth


def picture(lines: Sequence[Line], depth: int, title: str) -> bytes:
    """A PNG with one flight of stairs a line, a tread for each decoder layer."""
    figure = Figure(figsize=(7.4, 3.5), layout="constrained", dpi=130)
    axes = figure.subplots()
    edges = np.arange(depth + 1) - 0.5
    for label, ratios, style in lines:
        shares = 100 * np.asarray(ratios)
        axes.stairs(shares, edges, baseline=None, label=label, **{"linewidth": 2.0, **style})
    axes.set_xlim(-0.5, depth - 0.5)
    axes.set_ylim(0, 105)
    axes.set_xticks(range(0, depth, max(1, depth // 8)))
    axes.set_yticks(range(0, 101, 25))
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("vision tokens processed, %")
    plain(axes)
    figure.legend(loc="outside right center", frameon=False, labelspacing=0.9)
    figure.suptitle(title, fontsize=11)
    small = io.BytesIO()
    # A palette is enough for a few lines, and a third of the size.
    palette = open_picture(figure_png(figure)).quantize(64, dither=Image.Dither.NONE)
    palette.save(small, format="PNG", optimize=True)
    return small.getvalue()


def pictures(images: int = IMAGES) -> dict[str, bytes]:
    """The PNG of each schedule, by its name."""
    constant = [*budget_lines("constant"), published_line("FastV", FastV().ratios(DEPTH))]
    steps = [*budget_lines("steps"), published_line("PyramidDrop", PyramidDrop().ratios(DEPTH))]
    cosine = [*budget_lines("shifted_cosine"), published_line("p-MoD", schedules.cosine_ratios(DEPTH, 0.5))]
    drawn, depth = entropy_lines(images)
    return {
        "constant": picture(constant, DEPTH, "constant: one drop"),
        "steps": picture(steps, DEPTH, "steps: the same factor before each stage"),
        "linear": picture(budget_lines("linear"), DEPTH, "linear: a straight fall to a floor"),
        "shifted_cosine": picture(cosine, DEPTH, "shifted_cosine: half a cosine, moved up or down"),
        "entropy": picture(drawn, depth, "entropy: as many as the attention is spread over (bundled tiny-llava)"),
    }


def main(
    folder: Annotated[Path, typer.Argument(help="Where the PNGs go; made if it is not there.")],
    images: Annotated[int, typer.Option(min=1, help="Bundled images in the entropy's picture.")] = IMAGES,
) -> None:
    """Draw every schedule: what each decoder layer processes at a few budgets."""
    try:
        with held(folder):
            for name, data in pictures(images).items():
                write_bytes(folder / f"{name}.png", data)
                typer.echo(f"wrote {folder / f'{name}.png'}")
    except (VTPruneError, RunError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    typer.run(main)
