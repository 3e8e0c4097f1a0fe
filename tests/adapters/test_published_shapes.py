"""Folders as the published models lie in them load, are wrapped and generate, along the ways that people use."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

import vtprune
from tests.checkpoint import (
    random_hybrid_checkpoint,
    random_next_checkpoint,
    random_onevision_checkpoint,
    random_qwen3_checkpoint,
)
from tests.clips import write_frames
from tests.hooks.test_hybrid_generation import encoded_ahead
from vtprune.evals.ask.ask import run_ask
from vtprune.evals.ask.overlay import rectangles_of
from vtprune.loading.model import load_model
from vtprune.loading.prompts import encode, place, question

both = pytest.mark.parametrize("experts", [False, True], ids=["dense", "experts"])


def _loaded(experts: bool, *, hybrid: bool = False) -> tuple[Any, Any]:
    checkpoint = random_hybrid_checkpoint if hybrid else random_qwen3_checkpoint
    model, processor = load_model(checkpoint(experts=experts))
    model.generation_config.eos_token_id = None
    return model, processor


anyres = pytest.mark.parametrize(
    "folder", [random_next_checkpoint, random_onevision_checkpoint], ids=["llava-next", "llava-onevision"]
)


def _loaded_from(folder: str) -> tuple[Any, Any]:
    model, processor = load_model(folder)
    model.generation_config.eos_token_id = None
    return model, processor


def _pictures() -> list[Image.Image]:
    noise = torch.Generator().manual_seed(0)
    sizes = [(160, 224), (128, 128), (200, 96)]
    return [
        Image.fromarray(torch.randint(0, 256, (*size, 3), generator=noise, dtype=torch.uint8).numpy())
        for size in sizes
    ]


@both
@pytest.mark.parametrize("method", ["fopru", "turbo", "pyramid_drop", "vflowopt", "lazyllm"])
def test_a_row_of_a_batch_is_that_row_alone_with_beams_too(experts: bool, method: str) -> None:
    _check_rows(*_loaded(experts), method)


@encoded_ahead
@both
@pytest.mark.parametrize("method", ["fopru", "turbo", "pyramid_drop", "vflowopt", "visionzip"])
def test_a_row_of_a_hybrid_is_that_row_alone_with_beams_too(experts: bool, method: str) -> None:
    model, processor = _loaded(experts, hybrid=True)
    kinds = [kind == "full_attention" for kind in model.config.text_config.layer_types]
    assert kinds == [False, False, False, True] * 2
    _check_rows(model, processor, method)


@anyres
@pytest.mark.parametrize("method", ["fopru", "random", "pyramid_drop", "vflowopt", "lazyllm", "visionzip"])
def test_a_row_of_a_batch_of_pictures_in_crops_is_that_row_alone_with_beams_too(
    folder: Callable[[], str], method: str
) -> None:
    _check_rows(*_loaded_from(folder()), method)


def _check_rows(model: Any, processor: Any, method: str) -> None:
    """With a method, three questions together are answered as each of them alone."""
    chats = [
        question(picture, text) for picture, text in zip(_pictures(), ["why?", "what is here?", "no"], strict=True)
    ]
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2}
    with vtprune.wrapped(model, method, keep=0.5):
        together = place(encode(processor, chats), model)
        rows = model.generate(**together, **options)[:, together["input_ids"].shape[1] :]
        report = vtprune.report(model)
        for chat, row in zip(chats, rows, strict=True):
            alone = place(encode(processor, [chat]), model)
            assert torch.equal(model.generate(**alone, **options)[0, alone["input_ids"].shape[1] :], row)
    assert report.flops < report.flops_full
    assert len(report.samples) == 6


@pytest.mark.parametrize("hybrid", [False, True], ids=["qwen3", "qwen3.5"])
@both
def test_keeping_everything_generates_what_the_unwrapped_model_does(experts: bool, hybrid: bool) -> None:
    _check_whole(*_loaded(experts, hybrid=hybrid))


@anyres
def test_keeping_every_crop_generates_what_the_unwrapped_model_does(folder: Callable[[], str]) -> None:
    _check_whole(*_loaded_from(folder()))


def _check_whole(model: Any, processor: Any) -> None:
    """With a method that keeps everything the model generates by the very same scores."""
    inputs = place(encode(processor, [question(_pictures()[0], "why?")]), model)
    options: dict[str, Any] = {
        "max_new_tokens": 4, "do_sample": False, "output_scores": True, "return_dict_in_generate": True
    }  # fmt: skip
    plain = model.generate(**inputs, **options)
    with vtprune.wrapped(model, "fopru", keep=1.0):
        wrapped = model.generate(**inputs, **options)
    assert all(torch.equal(one, other) for one, other in zip(plain.scores, wrapped.scores, strict=True))


def test_ask_shows_what_a_qwen3_vl_keeps(tmp_path: Path) -> None:
    picture, output = tmp_path / "in.png", tmp_path / "out.png"
    _pictures()[0].save(picture)
    console = Console(file=io.StringIO(), width=160)
    folder = random_qwen3_checkpoint(experts=False)
    asked = run_ask(
        picture, "why?", console, method="flowcut", keep=0.5, output=output, model_name=folder, max_new_tokens=4
    )
    image = asked.report.samples[0].images[0]
    # 160 x 224 pixels are 5 x 7 vision tokens of 2 x 2 patches of 16 pixels.
    assert (image.grid, len(image.kept_per_layer[-1])) == ((1, 5, 7), 18)
    assert Image.open(output).width > 300


def test_ask_shows_the_picture_and_its_crops(tmp_path: Path) -> None:
    picture, output = tmp_path / "in.png", tmp_path / "out.png"
    Image.fromarray(torch.randint(0, 256, (170, 240, 3), dtype=torch.uint8).numpy()).save(picture)
    asked = run_ask(
        picture, "why?", Console(file=io.StringIO(), width=160), method="flowcut", keep=0.5, output=output,
        model_name=random_next_checkpoint(), max_new_tokens=2,
    )  # fmt: skip
    image = asked.report.samples[0].images[0]
    # 170 x 240 pixels fill 159 x 224 of 2 x 2 crops, of which 12 x 16 patches are seen (11.3 rows, rounded outwards).
    assert image.parts[0] == (1, 8, 8)
    assert image.parts[1][2] == 16
    assert image.structural == image.parts[1][1]
    assert sum(image.kept_per_part) == round(0.5 * image.tokens)
    drawn = [one.grid for one in rectangles_of(image)]
    assert drawn == image.parts
    assert sum(len(one.kept) for one in rectangles_of(image)) == len(image.kept)
    assert Image.open(output).width > 600


def test_ask_takes_a_video_where_frames_are_pooled(tmp_path: Path) -> None:
    video, output = write_frames(tmp_path / "frames"), tmp_path / "out.png"
    asked = run_ask(
        video, "why?", Console(file=io.StringIO(), width=160), method="evs", keep=0.5, output=output,
        model_name=random_onevision_checkpoint(), max_new_tokens=2,
    )  # fmt: skip
    image = asked.report.samples[0].images[0]
    frames = len(list(video.iterdir()))
    assert (image.kind, image.grid, image.structural) == ("video", (frames, 4, 4), 1)
    assert len(image.kept) == 8 * frames
