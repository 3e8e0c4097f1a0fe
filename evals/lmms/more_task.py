"""The functions behind the tasks of the second drawn set (`tasks/vtprune_grounding.yaml` and its siblings)."""

from __future__ import annotations

from typing import Any

from vtprune.assets import SHAPES_MORE
from vtprune.shapes.more import score_more

# A task file cannot say where a package was installed, so it reads the place from here.
GROUNDING, DESCRIPTIONS, FORMS, PAIRS, CLIPS = ({"test": str(path)} for path in SHAPES_MORE.values())


def doc_to_visual(doc: dict[str, Any]) -> list[Any]:
    """The pictures, or the frames of the clip."""
    return list(doc["media"])


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    """The question."""
    return str(doc["question"])


def messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
    """The pictures in their order, then the question."""
    shown = [{"type": "image", "url": picture} for picture in doc["media"]]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": doc_to_text(doc)}]}]


def clip_messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
    """The clip, then the question."""
    shown = {"type": "video", "url": doc_to_visual(doc)}
    return [{"role": "user", "content": [shown, {"type": "text", "text": doc_to_text(doc)}]}]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """How right the answer is, from 0 to 1."""
    return {"accuracy": score_more(doc["category"], doc["form"], answer=results[0], truth=doc["answer"])}


def process_description(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The same of a description: F1 of the things that it tells."""
    return {"f1": process_results(doc, results)["accuracy"]}
