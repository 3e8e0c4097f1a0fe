"""Pictures that are hard to prune, and what a prefill of each costs: counts that follow from scores follow from the
picture, so that a mean over usual questions does not tell what a method may spend."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import vtprune
from vtprune.loading.prompts import encode, place, question
from vtprune.method.stages import Growing
from vtprune.wrap import methods_of

# Pixels of a side; models of one size resize it.
SIDE = 336
QUESTION = "what is in the picture?"


def noise(rng: np.random.Generator) -> Image.Image:
    """Every pixel of a colour of its own."""
    return Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))


def checkerboard(rng: np.random.Generator) -> Image.Image:
    """Black and white fields of 8 pixels: all tokens alike."""
    rows, columns = np.indices((SIDE, SIDE)) // 8
    fields = ((rows + columns) % 2 * 255).astype(np.uint8)
    return Image.fromarray(np.stack([fields] * 3, axis=-1))


def page(rng: np.random.Generator) -> Image.Image:
    """A page full of words."""
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(11)
    for top in range(6, SIDE - 12, 14):
        words = ("".join(rng.choice(list(string.ascii_lowercase), rng.integers(2, 9))) for _ in range(14))
        draw.text((6, top), " ".join(words), fill="black", font=font)
    return picture


def crowd(rng: np.random.Generator) -> Image.Image:
    """Hundreds of small things of many colours, about which much could be said."""
    picture = Image.new("RGB", (SIDE, SIDE), "gray")
    draw = ImageDraw.Draw(picture)
    for _ in range(400):
        left, top = rng.integers(0, SIDE - 8, 2)
        width, height = rng.integers(6, 22, 2)
        paint = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        paint((int(left), int(top), int(left + width), int(top + height)), fill=colour)
    return picture


PICTURES: dict[str, Callable[[np.random.Generator], Image.Image]] = {
    "noise": noise,
    "checkerboard": checkerboard,
    "page": page,
    "crowd": crowd,
}


@torch.inference_mode()
def hard_costs(model: Any, processor: Any) -> dict[str, dict[str, float]]:
    """By picture the FLOPs of a wrapped model's prefill (of all attempts of a method that makes several), those of the
    unpruned one, and the vision tokens kept."""
    found, grows = {}, any(isinstance(one, Growing) for one in methods_of(model))
    for name, draw in PICTURES.items():
        chat = question(draw(np.random.default_rng(0)), QUESTION)
        inputs = place(encode(processor, [chat]), model)
        if grows:
            model.generate(**inputs, max_new_tokens=1, do_sample=False, num_beams=1)
        else:
            model(**inputs, use_cache=True, logits_to_keep=1)
        report = vtprune.report(model)
        found[name] = {"flops": report.flops, "flops_full": report.flops_full, "kept": report.kept_tokens}
    return found
