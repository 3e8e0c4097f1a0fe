"""lmms-eval's tasks about videos: what they hand, and which models take it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lmms_eval.tasks import TaskManager
from PIL import Image

from tests.checkpoint import random_checkpoint, random_qwen3_checkpoint, random_qwen_checkpoint
from tests.cli.test_cli import fails, run
from tests.clips import picture_of, write_clip, write_frames
from tests.evals.test_plugin import (
    answers,
    evaluate,
)
from vtprune.errors import InputError, SampleError, VideoError
from vtprune.evals.lmms.model import VTPrune
from vtprune.evals.lmms.videos import video_in
from vtprune.loading.videos import open_video

TASK = "vtprune_videos"
FUNCTIONS = """
def doc_to_visual(doc):
    start, end = doc["start"], doc["end"]
    if end:
        return [{"type": "video", "path": doc["video"], "video_start": start, "video_end": end}]
    return [doc["video"]]


def doc_to_text(doc):
    return "What moves?"


def process_results(doc, results):
    return {"accuracy": float(results[0] == doc["answer"])}
"""


def write_videos(folder: Path, rows: list[tuple[str, float, float]]) -> TaskManager:
    columns = {
        "video": [row[0] for row in rows],
        "start": [row[1] for row in rows],
        "end": [row[2] for row in rows],
        "answer": ["a square"] * len(rows),
    }
    pq.write_table(pa.table(columns), folder / "videos.parquet")
    (folder / "functions.py").write_text(FUNCTIONS)
    (folder / f"{TASK}.yaml").write_text(
        f"task: {TASK}\ndataset_path: parquet\ndataset_kwargs:\n  data_files:\n    test: {folder}/videos.parquet\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_visual: !function functions.doc_to_visual\n"
        "doc_to_text: !function functions.doc_to_text\ndoc_to_target: answer\n"
        "process_results: !function functions.process_results\ngeneration_kwargs:\n  max_new_tokens: 3\n"
        "metric_list:\n  - metric: accuracy\n    aggregation: mean\n    higher_is_better: true\n"
    )
    return TaskManager("ERROR", include_path=str(folder), include_defaults=False)


@pytest.fixture
def clips(tmp_path: Path) -> TaskManager:
    """A task over three videos, of the second a part alone."""
    first = write_clip(tmp_path / "first.mp4", 40, 10, (96, 64))
    second = write_clip(tmp_path / "second.mkv", 80, 10, (96, 64))
    frames = write_frames(tmp_path / "frames", 4, (96, 64))
    return write_videos(tmp_path, [(str(first), 0, 0), (str(second), 2, 2.5), (str(frames), 0, 0)])


@pytest.mark.parametrize("checkpoint", [random_qwen_checkpoint, lambda: random_qwen3_checkpoint(experts=False)])
def test_videos_are_taken_where_the_model_takes_them(clips: TaskManager, checkpoint: Any) -> None:
    found = []
    for batch in (1, 3):
        lm = VTPrune(checkpoint(), method="fopru:keep_video=6", keep=1.0, frames=8, batch_size=batch)
        samples = evaluate(lm, clips, TASK)["samples"][TASK]
        found.append([(s["token_counts"][0]["visual_tokens"], s["token_counts"][0]["kept_tokens"]) for s in samples])
    # Pairs of frames, of 3 x 2 tokens each: of 8, of the 6 in half a second, of 4.
    assert found == [[(24, 6), (18, 6), (12, 6)]] * 2


def test_frames_come_from_model_args(clips: TaskManager) -> None:
    result = evaluate("vtprune", clips, TASK, model_args=f"pretrained={random_qwen_checkpoint()},frames=4")
    assert [one["token_counts"][0]["visual_tokens"] for one in result["samples"][TASK]] == [12, 12, 12]
    assert len(answers(result, TASK)) == 3
    with pytest.raises(InputError, match="frames: a whole number of frames of a video"):
        VTPrune(random_qwen_checkpoint(), frames="many")


def test_a_model_that_takes_none_is_refused_before_anything_is_computed(
    clips: TaskManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = VTPrune(random_checkpoint())
    monkeypatch.setattr(lm, "_answer", lambda requests: pytest.fail("something was computed"))
    with pytest.raises(InputError, match=f"tasks: {TASK} shows videos: llava takes images; a video needs a model of"):
        evaluate(lm, clips, TASK)


def test_a_broken_video_is_named(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4")
    path.write_bytes(path.read_bytes()[:900])
    for video in (str(path), str(tmp_path / "gone.mp4"), "https://example.com/a.mp4"):
        manager = write_videos(tmp_path, [(video, 0, 0)])
        with pytest.raises(SampleError, match=rf"{TASK}, sample 0: cannot be read: .*{Path(video).name}"):
            evaluate(VTPrune(random_qwen_checkpoint()), manager, TASK)


def test_a_task_may_hand_frames(tmp_path: Path) -> None:
    array = np.stack([picture_of(index, 10, (64, 48)) for index in range(10)])
    pictures = [Image.fromarray(frame) for frame in array]
    for given in (array, pictures, tuple(pictures)):
        video = video_in({"video": given}, 4)
        assert video.seconds == (0.0, 1.5, 3.0, 4.5)
        assert np.array_equal(video.array(), array[[0, 3, 6, 9]])
    path = write_clip(tmp_path / "clip.mp4")
    expected = open_video(path, 5, start=1.0, end=2.0).seconds
    for part in (
        {"video": f"file://{path}", "video_start": 1, "video_end": 2},
        {"video": {"url": path, "video_start": 1, "video_end": 2}},
    ):
        assert video_in(part, 5).seconds == expected
    for given in (array.astype(np.float32), 3, None, [array]):
        with pytest.raises(VideoError, match="a video is a path, pictures or"):
            video_in({"video": given}, 4)
    with pytest.raises(VideoError, match="no frame"):
        video_in({"video": []}, 4)
    with pytest.raises(VideoError, match="several sizes"):
        video_in({"video": [*pictures, Image.new("RGB", (9, 9))]}, 4)


def test_bench_takes_videos_and_a_number_of_frames(tmp_path: Path, clips: TaskManager) -> None:
    options = ["--tasks", TASK, "--include-path", tmp_path, "--methods", "fopru", "--keep", "50%", "--frames", "4"]
    result = run("bench", *options, "--model", random_qwen_checkpoint(), "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "results.json").read_text())["config"]["frames"] == 4
    result = run("bench", *options, "--output", tmp_path / "other")
    fails(result, 1, f"tasks: {TASK} shows videos: llava takes images")
