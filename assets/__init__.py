"""Bundled tiny checkpoints, their evaluation data and an example image."""

from pathlib import Path

ASSETS = Path(__file__).parent
TINY_LLAVA = ASSETS / "tiny-llava"
SHAPES_EVAL = ASSETS / "shapes_eval.parquet"
EXAMPLE_IMAGE = ASSETS / "example.png"
# The same model trained on with a method that brings weights; `vtprune bench` runs them beside the others.
TRAINED = (ASSETS / "tiny-llava-pmod",)

__all__ = ["ASSETS", "EXAMPLE_IMAGE", "SHAPES_EVAL", "TINY_LLAVA", "TRAINED"]
