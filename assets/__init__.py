"""Bundled tiny checkpoints, their evaluation data and an example image."""

from pathlib import Path

ASSETS = Path(__file__).parent
TINY_LLAVA = ASSETS / "tiny-llava"
SHAPES_EVAL = ASSETS / "shapes_eval.parquet"
# What the first set cannot ask, a part a file (`vtprune.shapes.more`).
PARTS = ("grounding", "descriptions", "forms", "pairs", "clips")
SHAPES_MORE = {part: ASSETS / "shapes_more" / f"{part}.parquet" for part in PARTS}
EXAMPLE_IMAGE = ASSETS / "example.png"
# The same model trained on with a method that brings weights; `vtprune bench` runs them beside the others.
TRAINED = (ASSETS / "tiny-llava-pmod",)

__all__ = ["ASSETS", "EXAMPLE_IMAGE", "SHAPES_EVAL", "SHAPES_MORE", "TINY_LLAVA", "TRAINED"]
