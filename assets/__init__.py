"""Bundled tiny checkpoints, their evaluation data and an example image."""

from pathlib import Path

ASSETS = Path(__file__).parent
TINY_LLAVA = ASSETS / "tiny-llava"
SHAPES_EVAL = ASSETS / "shapes_eval.parquet"
EXAMPLE_IMAGE = ASSETS / "example.png"

__all__ = ["ASSETS", "EXAMPLE_IMAGE", "SHAPES_EVAL", "TINY_LLAVA"]
