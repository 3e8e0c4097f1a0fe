"""Videos, and pictures in crops, on the page: what is asked, drawn and said of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from PIL import Image

from tests.checkpoint import random_next_checkpoint, random_qwen_checkpoint
from tests.clips import write_clip
from tests.evals.demo.conftest import free_port
from vtprune.evals.demo.fates import fates, place
from vtprune.evals.demo.handlers import Handlers
from vtprune.evals.demo.layout import layout
from vtprune.evals.demo.link import read
from vtprune.evals.demo.models import Models, load_models
from vtprune.evals.demo.options import choosable, choosable_on
from vtprune.evals.demo.server import Options, served
from vtprune.report.report import ImageReport

TEMPORAL = {"evs", "dycoke", "vidcom2", "holitom", "fastvid", "frame_pool", "frame_skip"}


@pytest.fixture(scope="module")
def qwen() -> Models:
    return load_models([random_qwen_checkpoint()])


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", size=(112, 84))


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtprune.evals.demo.asking.LONGEST_ANSWER", 3)
    monkeypatch.setattr("vtprune.evals.demo.asking.ROUNDS", 1)


def test_methods_of_videos_are_offered_where_a_model_takes_some(qwen: Models, models: Models) -> None:
    assert set(choosable_on(qwen[qwen.names[0]])) >= TEMPORAL
    assert not TEMPORAL & set(choosable_on(models[models.names[0]]))
    assert not TEMPORAL & set(choosable())
    assert read({"method": "evs"}, qwen).method == "evs"
    assert read({"method": "evs"}, models).method != "evs"


@pytest.mark.parametrize("method", ["evs", "fastv"])
def test_a_question_about_a_video_is_answered_and_its_frames_are_drawn(
    method: str, qwen: Models, clip: Path, tmp_path: Path
) -> None:
    handlers = Handlers(qwen, tmp_path)
    asking = handlers.ask("", "what moves?", qwen.names[0], method, 40.0, "", str(clip))
    for last in asking:
        if "cells" in last[3]:
            break
    _, _, _, view, numbers, png, data, code = last
    # 16 frames, two to a row of the tower, each of 3 x 4 tokens.
    assert len(view["cells"]) == len(view["words"]) == 8 * 12
    assert len({tuple(cell) for cell in view["cells"]}) == 96
    assert view["words"][12].startswith("frame 2, row 1, column 1: ")
    assert view["counts"][-1] < 96
    assert "vision tokens" in numbers
    assert Image.open(png.value["path"] if isinstance(png.value, dict) else png.value).width > 500
    report = json.loads(Path(data.value["path"] if isinstance(data.value, dict) else data.value).read_text())
    image = report["answers"][1]["report"]["samples"][0]["images"][0]
    assert (image["kind"], image["grid"]) == ("video", [8, 3, 4])
    assert "open_video('clip.mp4')" in code
    compile(code, "snippet", "exec")
    asking.close()


def test_a_video_where_a_model_takes_none_is_told_so(models: Models, clip: Path, tmp_path: Path) -> None:
    with pytest.raises(gr.Error, match="video: llava takes images; a video needs a model of"):
        list(Handlers(models, tmp_path).ask("", "why?", models.names[0], "fastv", 40.0, "", str(clip)))


def test_what_is_no_video_is_told_so(qwen: Models, tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    with pytest.raises(gr.Error, match="cannot read the video"):
        list(Handlers(qwen, tmp_path).ask("", "why?", qwen.names[0], "evs", 40.0, "", str(broken)))


def test_the_curve_and_the_interface_of_programs_take_videos(qwen: Models, clip: Path, tmp_path: Path) -> None:
    handlers = Handlers(qwen, tmp_path)
    answer = handlers.answer("", "why?", qwen.names[0], "frame_skip", 50.0, "", str(clip))
    assert answer["answers"][1]["report"]["samples"][0]["images"][0]["kept_per_part"] == [12, 0] * 4
    *_, (_, points) = handlers.curve("", "why?", qwen.names[0], "random", 50.0, "", str(clip))
    assert points.count("%") >= 9


def test_frames_stand_side_by_side_and_a_patch_is_where_it_is_said_to_be() -> None:
    report = ImageReport((5, 2, 3), 30, kept=[0], kept_per_layer=[[0]], merged=[], kind="video", parts=[(1, 2, 3)] * 5)
    frames = [Image.new("RGB", (30, 20), (40 * number, 0, 0)) for number in range(5)]
    drawn = layout(frames, report)
    assert len(set(drawn.cells)) == 30
    cell = drawn.picture.width // drawn.columns
    for token, (column, row) in enumerate(drawn.cells):
        middle = column * cell + cell // 2, row * cell + cell // 2
        assert drawn.picture.getpixel(middle) == (40 * (token // 6), 0, 0)
    assert place(report, 13) == "frame 3, row 1, column 2"
    found = fates(frames, report, "x")
    assert (found["columns"], found["rows"]) == (drawn.columns, drawn.rows)


def test_a_picture_in_crops_is_drawn_whole_and_beside_it_cut(tmp_path: Path) -> None:
    models = load_models([random_next_checkpoint()])
    picture = tmp_path / "in.png"
    Image.new("RGB", (170, 240), "red").save(picture)
    asking = Handlers(models, tmp_path).ask(str(picture), "why?", models.names[0], "flowcut", 40.0, "", None)
    view = next(last[3] for last in asking if "cells" in last[3])
    assert view["words"][0].startswith("the picture itself, row 1, column 1: ")
    assert view["words"][64].startswith("its crops, row 1, column 1: ")
    assert view["cells"][64] == (9, 0)
    assert len(view["cells"]) == len(view["words"])


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with served(Options(models=(random_qwen_checkpoint(),), port=free_port())) as found:
        yield found.rstrip("/")


def test_a_visitor_uploads_a_video_and_walks_through_its_frames(page: Any, clip: Path, pictures: Path) -> None:
    page.set_input_files("#video input[type=file]", clip)
    page.wait_for_selector("#video video")
    page.click("#method input")
    page.get_by_role("option", name="evs", exact=True).click()
    page.fill("#question textarea", "what moves?")
    page.click("#ask-go")
    page.wait_for_function("document.querySelector('#numbers table') && document.querySelector('#view canvas')")
    page.focus("#view canvas")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.querySelector('#view .vt-fate').innerText.startsWith('frame 1, row 1, column 1')")
    for _ in range(3):
        page.keyboard.press("ArrowDown")
    # Three rows to a frame: the next one stands below it.
    page.wait_for_function("/^frame [2-8], row 1, column 1/.test(document.querySelector('#view .vt-fate').innerText)")
    page.screenshot(path=pictures / "video.png", full_page=True)
