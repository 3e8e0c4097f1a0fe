"""The functions behind `tasks/vtprune_shapes.yaml`."""

from __future__ import annotations

import string
from typing import Any

from vtprune.assets import SHAPES_EVAL

# A task file cannot say where a package was installed, so it reads the place from here.
DATA_FILES = {"test": str(SHAPES_EVAL)}

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def doc_to_visual(doc: dict[str, Any]) -> list[Any]:
    """The image."""
    return [doc["image"]]


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    """The question."""
    return str(doc["question"])


def normalise(text: str) -> str:
    """What exact match compares: lower case, no punctuation, single spaces."""
    return " ".join(text.lower().translate(_PUNCTUATION).split())


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1.0 for a right answer, else 0.0."""
    return {"accuracy": float(normalise(results[0]) == normalise(doc["answer"]))}
