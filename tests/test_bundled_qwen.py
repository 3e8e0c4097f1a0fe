"""The bundled Qwen: it sees pictures of any size, two of them, and clips, and pruning does to it what it should."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import vtprune
from vtprune.assets import SHAPES_EVAL, SHAPES_MORE, TINY_QWEN, folder_of, title_of
from vtprune.evals.lmms.gen_kwargs import Generation
from vtprune.evals.lmms.generation import answer_batch
from vtprune.loading.pictures import open_picture
from vtprune.loading.prompts import encode, question
from vtprune.loading.videos import video_of
from vtprune.shapes.clips import FPS
from vtprune.shapes.dataset import read_eval_rows
from vtprune.shapes.more import MoreRow, read_more_rows, score_more
from vtprune.shapes.questions import normalise


@pytest.fixture(scope="module")
def bundled() -> tuple[Any, Any]:
    """The model and its processor."""
    processor = AutoProcessor.from_pretrained(TINY_QWEN)
    processor.tokenizer.padding_side = "left"
    return AutoModelForImageTextToText.from_pretrained(TINY_QWEN).eval(), processor


def answers(model: Any, processor: Any, chats: Sequence[Any], tokens: int = 64) -> list[str]:
    if not vtprune.is_wrapped(model):
        with vtprune.wrapped(model, "none"):
            return answers(model, processor, chats, tokens)
    found: list[str] = []
    for start in range(0, len(chats), 16):
        inputs = encode(processor, chats[start : start + 16])
        generation = Generation(arguments={"max_new_tokens": tokens, "do_sample": False, "num_beams": 1})
        found += [one.text for one in answer_batch(model, processor.tokenizer, inputs, generation=generation)]
    return found


def chat_of(row: MoreRow) -> list[dict[str, Any]]:
    pictures = [open_picture(png, row.id) for png in row.media]
    shown: list[Any] = [video_of(pictures, len(pictures), name=row.id, fps=FPS)] if len(pictures) > 2 else pictures
    content = [part for one in shown for part in question(one, "")[0]["content"] if part["type"] != "text"]
    return [{"role": "user", "content": [*content, {"type": "text", "text": row.question}]}]


def scores(model: Any, processor: Any, part: str, count: int) -> float:
    rows = read_more_rows(SHAPES_MORE[part])[:count]
    said = answers(model, processor, [chat_of(row) for row in rows])
    marks = [
        score_more(row.category, row.form, answer=one, truth=row.answer) for row, one in zip(rows, said, strict=True)
    ]
    return sum(marks) / len(marks)


def accuracy(model: Any, processor: Any, count: int) -> float:
    rows = read_eval_rows(SHAPES_EVAL)[:count]
    said = answers(model, processor, [question(row.open_image(), row.question) for row in rows], 8)
    return sum(normalise(one) == row.answer for one, row in zip(said, rows, strict=True)) / count


def test_published_weights_fit_in_twelve_megabytes() -> None:
    sizes = {path.name: path.stat().st_size for path in TINY_QWEN.iterdir()}
    assert sum(sizes.values()) <= 12_000_000
    assert not [name for name in sizes if name.endswith((".bin", ".pt", ".pth", ".pkl", ".py"))]
    assert folder_of("tiny-qwen") == str(TINY_QWEN)
    assert title_of("tiny-qwen") == title_of(str(TINY_QWEN)) == "bundled tiny-qwen"


def test_it_answers_the_frozen_questions_and_pruning_by_attention_beats_chance(bundled: tuple[Any, Any]) -> None:
    model, processor = bundled
    assert accuracy(model, processor, 150) > 0.85
    found = {}
    for name in ("random", "flowcut"):
        with vtprune.wrapped(model, name, keep=0.25):
            found[name] = accuracy(model, processor, 100)
            assert vtprune.report(model).achieved_keep == 0.25
    assert found["flowcut"] > found["random"]


@pytest.mark.parametrize(
    ("part", "least"),
    [
        ("grounding", 0.5),
        ("clips", 0.6),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in (("descriptions", 0.6), ("forms", 0.8), ("pairs", 0.7))
        ),
    ],
)
def test_it_answers_what_the_second_set_asks(part: str, least: float, bundled: tuple[Any, Any]) -> None:
    assert scores(*bundled, part, 48) > least


def test_a_clip_is_read_with_its_times_and_pruned_as_one(bundled: tuple[Any, Any]) -> None:
    model, processor = bundled
    row = read_more_rows(SHAPES_MORE["clips"])[0]
    inputs = encode(processor, [chat_of(row)])
    assert inputs["video_grid_thw"].tolist() == [[3, 16, 16]]
    assert "0.2 seconds" in processor.decode(inputs["input_ids"][0])
    with torch.no_grad(), vtprune.wrapped(model, "evs", keep=0.5):
        model(**inputs)
        image = vtprune.report(model).samples[0].images[0]
    assert image.kind == "video"
    assert len(image.kept) == 96
    assert image.kept_per_part[0] == 64


def test_pictures_of_any_size_are_taken_as_they_are(bundled: tuple[Any, Any]) -> None:
    _, processor = bundled
    grids = [
        encode(processor, [question(open_picture(row.media[0], "it"), "is there?")])["image_grid_thw"][0].tolist()
        for row in read_more_rows(SHAPES_MORE["grounding"])[:20]
    ]
    sizes = [open_picture(row.media[0], "it").size for row in read_more_rows(SHAPES_MORE["grounding"])[:20]]
    assert grids == [[1, height // 4, width // 4] for width, height in sizes]
    assert len({tuple(grid) for grid in grids}) > 2
