"""`vtprune ask` about a video: from the file to the answers and the sheet of its frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.checkpoint import png, random_checkpoint, random_qwen3_checkpoint, random_qwen_checkpoint
from tests.cli.test_cli import fails, run
from tests.clips import write_clip, write_frames
from vtprune.evals.ask.overlay import draw_kept, draw_parts
from vtprune.evals.ask.sheet import MOST, captions, chosen
from vtprune.loading.videos import Video
from vtprune.report.report import ImageReport, MergeReport

COLOURS = ((250, 40, 40), (40, 220, 40), (60, 60, 250), (240, 240, 60))
CELL = 10


def film(frames: int) -> Video:
    pictures = tuple(Image.new("RGB", (3, 2), COLOURS[at % len(COLOURS)]) for at in range(frames))
    return Video(pictures, tuple(at / 4 for at in range(frames)), 4.0, frames, "film")


def middle(picture: Image.Image, row: int, column: int) -> tuple[int, ...]:
    found = picture.getpixel((CELL * column + CELL // 2, CELL * row + CELL // 2))
    assert isinstance(found, tuple)
    return found


def test_each_frame_is_drawn_over_its_own_picture() -> None:
    kept = [0, 1, 2, 3, 4, 5, 12, 17]
    report = ImageReport((3, 2, 3), 18, kept, [kept], [])
    drawn = draw_parts(film(3).frames, report, [0, 1, 2], CELL)
    assert [picture.size for picture in drawn] == [(30, 20)] * 3
    assert {middle(drawn[0], row, column) for row in range(2) for column in range(3)} == {COLOURS[0]}
    assert middle(drawn[2], 0, 0) == middle(drawn[2], 1, 2) == COLOURS[2]
    # Dropped: what is left of green, and of blue.
    assert middle(drawn[1], 0, 0)[1] == max(middle(drawn[1], 0, 0)) < 60
    assert middle(drawn[2], 0, 1)[2] == max(middle(drawn[2], 0, 1)) < 60


def test_some_parts_are_drawn_as_they_are_among_all() -> None:
    layers = [list(range(24)), [0, 3, 7, 12, 13, 20]]
    merge = MergeReport(into=3, members=[3, 14, 23], weights=[1 / 3] * 3, layer=0)
    report = ImageReport((4, 2, 3), 24, layers[0], layers, [merge])
    pictures = [Image.new("RGB", (3, 2), "silver")] * 4
    all_parts = draw_parts(pictures, report, range(4), 24)
    some = draw_parts(pictures[:2], report, [1, 3], 24)
    for part, picture in zip((1, 3), some, strict=True):
        assert np.array_equal(np.asarray(picture), np.asarray(all_parts[part]))
    stacked = draw_kept(pictures[0], report)
    assert stacked.height == 4 * stacked.width * 2 // 3


def test_captions_say_when_and_how_much_the_last_layer_has_left() -> None:
    layers = [[*range(6), 7, 12, 13], [0, 1, 7, 12]]
    report = ImageReport((3, 2, 3), 18, layers[0], layers, [])
    assert captions(film(5), 2, report) == [
        "0.0 to 0.2 s: 2 of 6 left",
        "0.5 to 0.8 s: 1 of 6 left",
        "1.0 s: 1 of 6 left",
    ]


@pytest.mark.parametrize("parts", [1, 2, MOST, MOST + 1, 500])
def test_of_many_frames_some_are_drawn_from_the_first_to_the_last(parts: int) -> None:
    found = chosen(parts)
    assert len(set(found)) == len(found) == min(parts, MOST)
    assert (found[0], found[-1]) == (0, parts - 1)
    assert found == sorted(found)


@pytest.mark.parametrize("checkpoint", [random_qwen_checkpoint, lambda: random_qwen3_checkpoint(experts=False)])
def test_ask_answers_about_a_video(tmp_path: Path, checkpoint: object) -> None:
    assert callable(checkpoint)
    path, output = write_clip(tmp_path / "clip.mp4", 40, 10, (96, 64)), tmp_path / "kept.png"
    arguments = ["--model", checkpoint(), "--output", output, "--max-new-tokens", "2"]
    result = run("ask", path, "What moves?", *arguments, "--keep-video", "25%", "--frames", "8", "--method", "fopru")
    assert result.exit_code == 0, result.output
    for word in ("unpruned", "fopru:keep_video=0.25", "24.0", "6.0", "25.0%", "GFLOPs", "KV cache", "prefill ms"):
        assert word in result.output
    # Four pairs of frames, each 3 x 2 tokens, of 48 pixels, and its caption.
    picture = np.asarray(Image.open(output)).astype(int)
    ground = np.abs(picture - 40).sum(axis=2) < 12
    assert (ground.sum(axis=0) >= 48).sum() >= 4 * 3 * 48
    assert run("ask", path, "What moves?", *arguments).exit_code == 0


def test_the_sheet_says_that_it_draws_some_of_many(tmp_path: Path) -> None:
    path, output = write_clip(tmp_path / "clip.mp4", 60, 10, (64, 48)), tmp_path / "kept.png"
    arguments = ["--model", random_qwen3_checkpoint(experts=False), "--max-new-tokens", "1", "--method", "evs"]
    heights = []
    for frames in ("48", "60"):
        result = run("ask", path, "?", *arguments, "--frames", frames, "--output", output)
        assert result.exit_code == 0, result.output
        heights.append(Image.open(output).height)
    # As many frames, and one more line of the title.
    assert 10 < heights[1] - heights[0] < 40


def test_a_folder_of_frames_is_a_video_too(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "frames", 6, (96, 64))
    arguments = ["--model", random_qwen_checkpoint(), "--output", tmp_path / "kept.png", "--max-new-tokens", "1"]
    result = run("ask", folder, "?", *arguments, "--method", "dycoke", "--fps", "5")
    assert result.exit_code == 0, result.output


def test_what_cannot_be_asked_of_a_video_is_refused(tmp_path: Path) -> None:
    path, picture = write_clip(tmp_path / "clip.mp4"), tmp_path / "picture.png"
    picture.write_bytes(png(32, 32))
    llava, qwen = ["--model", random_checkpoint()], ["--model", random_qwen_checkpoint()]
    fails(run("ask", path, "?", *llava), 2, "video: llava takes images; a video needs a model of the Qwen-VL families")
    fails(run("ask", tmp_path / "no.mp4", "?", *qwen), 2, "video: no file", "no.mp4")
    fails(run("ask", picture, "?", *qwen, "--frames", "4"), 2, "frames:", "is taken for a picture")
    fails(run("ask", picture, "?", *qwen, "--keep-video", "4"), 2, "keep-video:", "is taken for a picture")
    fails(run("ask", picture, "?", *qwen, "--fps", "4"), 2, "no folder of frames")
    fails(run("ask", path, "?", *qwen, "--fps", "4"), 2, "video:", "fps is for a folder of frames")
    twice = ("--method", "fastv:keep_video=3", "--keep-video", "4")
    fails(run("ask", path, "?", *qwen, *twice), 2, "keep-video: fastv:keep_video=3 says how much it keeps itself")
    path.write_bytes(path.read_bytes()[:900])
    fails(run("ask", path, "?", *qwen), 2, "video: cannot read", "clip.mp4")
