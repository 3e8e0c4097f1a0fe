"""Shapes: a small generated visual question answering benchmark whose answers need fine detail."""

from .dataset import CATEGORIES, EvalRow, build_eval_rows, read_eval_rows
from .questions import QA, ask
from .render import render
from .scene import Glyph, Scene, Thing, make_scene

__all__ = [
    "CATEGORIES",
    "QA",
    "EvalRow",
    "Glyph",
    "Scene",
    "Thing",
    "ask",
    "build_eval_rows",
    "make_scene",
    "read_eval_rows",
    "render",
]
