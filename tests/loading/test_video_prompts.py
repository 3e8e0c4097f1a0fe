"""Videos in prompts: what a processor is handed, and that the model gets all of what it answers."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vtprune
from tests.checkpoint import random_checkpoint, random_qwen3_checkpoint, random_qwen_checkpoint
from tests.clips import write_clip
from vtprune.errors import InputError
from vtprune.loading.model import load_model
from vtprune.loading.prompts import encode, encode_named, place, question
from vtprune.loading.videos import Video, open_video

FOLDERS: dict[str, Callable[[], str]] = {
    "qwen2.5-vl": random_qwen_checkpoint,
    "qwen3-vl": functools.partial(random_qwen3_checkpoint, experts=False),
}
every_family = pytest.mark.parametrize("kind", FOLDERS)


def loaded(kind: str) -> tuple[Any, Any]:
    model, processor = load_model(FOLDERS[kind]())
    model.generation_config.eos_token_id = None
    return model, processor


def clip(folder: Path, frames: int = 6) -> Video:
    return open_video(write_clip(folder / "clip.mp4", 40, 10, (96, 64)), frames)


@every_family
@pytest.mark.parametrize(("frames", "groups"), [(6, 3), (5, 3), (2, 1), (1, 1), (40, 20)])
def test_the_rows_are_those_of_the_frames_none_left_out(tmp_path: Path, kind: str, frames: int, groups: int) -> None:
    _, processor = loaded(kind)
    inputs = encode(processor, [question(clip(tmp_path, frames), "What moves?")])
    ((t, h, w),) = inputs["video_grid_thw"].tolist()
    assert t == groups
    assert len(inputs["pixel_values_videos"]) == t * h * w
    placeholders = inputs["input_ids"] == processor.video_token_id
    assert int(placeholders.sum()) == t * h * w // 4
    assert torch.equal(inputs["mm_token_type_ids"], 2 * placeholders)


def test_the_times_in_a_prompt_are_those_of_the_frames(tmp_path: Path) -> None:
    _, processor = loaded("qwen3-vl")
    for frames in (6, 5, 1):
        video = clip(tmp_path, frames)
        text = processor.tokenizer.decode(encode(processor, [question(video, "What moves?")])["input_ids"][0])
        stamps = [float(stamp) for stamp in re.findall(r"<([0-9.]+) seconds>", text)]
        pairs = [video.seconds[at : at + 2] for at in range(0, frames, 2)]
        # The middle of the first and the last of each two frames, as it is printed.
        assert stamps == pytest.approx([(pair[0] + pair[-1]) / 2 for pair in pairs], abs=0.0501)


@pytest.mark.parametrize(("fps", "seconds"), [(10, 2 / 1.5), (25, 2 / (6 / 40 * 25))])
def test_the_seconds_between_frames_reach_the_model_as_they_are(tmp_path: Path, fps: int, seconds: float) -> None:
    model, processor = loaded("qwen2.5-vl")
    video = open_video(write_clip(tmp_path / "clip.mp4", 40, fps, (96, 64)), 6)
    inputs = encode(processor, [question(video, "What moves?")])
    assert inputs["second_per_grid_ts"].tolist() == pytest.approx([seconds])
    placed = place(inputs, model.to(torch.bfloat16))
    assert placed.keys() == inputs.keys()
    assert placed["pixel_values_videos"].dtype == torch.bfloat16
    assert torch.equal(placed["second_per_grid_ts"], inputs["second_per_grid_ts"])


def test_the_inputs_are_those_of_a_processor_that_samples_by_itself(tmp_path: Path) -> None:
    _, processor = loaded("qwen3-vl")
    path = write_clip(tmp_path / "clip.mp4", 40, 10, (96, 64))
    ours = encode(processor, [question(open_video(path, 8), "What moves?")])
    whole = np.stack([np.asarray(frame) for frame in open_video(path, 40).frames])
    text = processor.apply_chat_template(
        question(open_video(path, 8), "What moves?"), tokenize=False, add_generation_prompt=True
    )
    metadata = [{"total_num_frames": 40, "fps": 10.0}]
    theirs = processor(
        text=[text],
        videos=[whole],
        videos_kwargs={"do_sample_frames": True, "num_frames": 8, "fps": None, "video_metadata": metadata},
        return_tensors="pt",
    )
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    torch.testing.assert_close(ours["pixel_values_videos"], theirs["pixel_values_videos"])


@every_family
def test_pictures_and_videos_share_a_batch(tmp_path: Path, kind: str) -> None:
    model, processor = loaded(kind)
    video, image = clip(tmp_path), Image.new("RGB", (90, 120), "red")
    both = question(image, "Is this in it?")
    both[0]["content"].insert(1, {"type": "video", "video": video})
    chats = [question(video, "What moves?"), both, question(image, "What is red?")]
    together = place(encode(processor, chats), model)
    options = {"max_new_tokens": 4, "do_sample": False}
    with vtprune.wrapped(model, "fopru", keep=0.5, keep_video=6):
        rows = model.generate(**together, **options)[:, together["input_ids"].shape[1] :]
        shown = [[(one.kind, len(one.kept)) for one in row.images] for row in vtprune.report(model).samples]
        for chat, row in zip(chats, rows, strict=True):
            alone = place(encode(processor, [chat]), model)
            assert torch.equal(model.generate(**alone, **options)[0, alone["input_ids"].shape[1] :], row)
    half = shown[2][0][1]
    assert shown == [[("video", 6)], [("image", half), ("video", 6)], [("image", half)]]


def test_a_model_that_takes_no_videos_is_named(tmp_path: Path) -> None:
    _, processor = load_model(random_checkpoint())
    words = "llava takes images; a video needs a model of the Qwen-VL families"
    with pytest.raises(InputError, match=f"^{words}"):
        encode(processor, [question(clip(tmp_path), "What moves?")])
    with pytest.raises(InputError, match=f"chat 1: {words}"):
        encode_named(
            processor,
            [question(Image.new("RGB", (9, 9)), "?"), question(clip(tmp_path), "?")],
            lambda number, reason: InputError(f"chat {number}: {reason}"),
        )
