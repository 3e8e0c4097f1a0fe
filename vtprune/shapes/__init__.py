"""Shapes: a small generated visual question answering benchmark whose answers need fine detail."""

from vtprune.shapes.dataset import (
    CATEGORIES,
    EvalRow,
    build_eval_rows,
    read_eval_rows,
)
from vtprune.shapes.questions import QA, ask
from vtprune.shapes.render import render
from vtprune.shapes.scene import (
    Glyph,
    Scene,
    Thing,
    make_scene,
)

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
