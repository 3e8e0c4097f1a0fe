"""Pictures and videos with fewer pixels, as a processor makes them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    CLIPImageProcessor,
    LlavaNextImageProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLVideoProcessor,
)

import vtprune
from vtprune.loading.pictures import open_picture

SIZE = {"shortest_edge": 16 * 16, "longest_edge": 4096 * 64}


class Processor:
    """What `downscale` asks of a processor."""

    def __init__(self, video: Any = Qwen2VLVideoProcessor) -> None:
        sizes = {"patch_size": 8, "merge_size": 2, "size": SIZE}
        self.image_processor = Qwen2VLImageProcessor(**sizes)
        self.video_processor = video(**sizes, do_sample_frames=False)


def picture(height: int, width: int) -> Any:
    return np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)


def tokens_of(processor: Any, *shown: Any) -> list[list[int]]:
    """(h, w) in tokens of each picture."""
    found = processor.image_processor(list(shown), return_tensors="pt")
    assert found["pixel_values"].shape[0] == int(found["image_grid_thw"].prod(dim=-1).sum())
    return (found["image_grid_thw"][:, 1:] // 2).tolist()


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (1.0, [[6, 8], [10, 4]]),
        (0.5, [[4, 6], [6, 3]]),
        (0.25, [[3, 4], [5, 2]]),
        (4, [[2, 2], [4, 1]]),
        (1, [[1, 1], [1, 1]]),
    ],
)
def test_each_picture_has_its_share_of_the_tokens_in_its_own_shape(keep: Any, expected: list[list[int]]) -> None:
    processor = Processor()
    smaller = vtprune.downscale(processor, keep)
    assert tokens_of(smaller, picture(96, 128), picture(160, 64)) == expected
    # The one that was given makes what it made before.
    assert tokens_of(processor, picture(96, 128), picture(160, 64)) == [[6, 8], [10, 4]]


def test_a_picture_is_resized_once_from_its_original() -> None:
    smaller = vtprune.downscale(Processor(), 0.25)
    found = smaller.image_processor([picture(100, 130)], return_tensors="pt")
    direct = Processor().image_processor
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(picture(100, 130)).permute(2, 0, 1)[None].float(), (48, 64), mode="bicubic", antialias=True
    ).clamp(0, 255)
    alike = direct([expected[0].round().byte()], return_tensors="pt")
    assert found["image_grid_thw"].tolist() == alike["image_grid_thw"].tolist() == [[1, 6, 8]]
    assert float((found["pixel_values"] - alike["pixel_values"]).abs().mean()) < 0.01


@pytest.mark.parametrize("video", [Qwen2VLVideoProcessor, Qwen3VLVideoProcessor])
@pytest.mark.parametrize(("keep", "expected"), [(0.25, [3, 4]), (40, [2, 4]), (3, [1, 1])])
def test_the_frames_of_a_video_share_its_tokens(video: Any, keep: Any, expected: list[int]) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (10, 96, 128, 3), dtype=np.uint8)
    smaller = vtprune.downscale(Processor(video), 0.9, keep_video=keep)
    found = smaller.video_processor([frames], return_tensors="pt")
    assert (found["video_grid_thw"][0] // torch.tensor([1, 2, 2])).tolist() == [5, *expected]
    assert tokens_of(smaller, picture(96, 128)) == [[6, 7]]


def test_a_smaller_processor_may_be_made_smaller_still_and_goes_to_other_processes() -> None:
    once = vtprune.downscale(Processor(), 0.5)
    assert tokens_of(once, picture(96, 128)) == [[4, 6]]
    twice = vtprune.downscale(once, 0.25)
    assert tokens_of(twice, picture(96, 128)) == [[2, 3]]
    for same in (pickle.loads(pickle.dumps(twice)), copy.deepcopy(twice)):
        assert tokens_of(same, picture(96, 128)) == [[2, 3]]
    assert tokens_of(vtprune.downscale(Processor(), np.int64(4)), picture(96, 128)) == [[2, 2]]


def test_what_cannot_be_made_smaller_is_refused() -> None:
    with pytest.raises(vtprune.VTPruneError, match="do_resize=False leaves pictures as large as they are"):
        vtprune.downscale(Processor(), 0.5).image_processor([picture(96, 128)], do_resize=False)
    processor = Processor()
    processor.image_processor = CLIPImageProcessor()
    with pytest.raises(vtprune.VTPruneError, match="makes pictures of one size, which the positions"):
        vtprune.downscale(processor, 0.5)
    processor.image_processor = LlavaNextImageProcessor()
    with pytest.raises(vtprune.VTPruneError, match="LlavaNextImageProcessor cuts pictures into crops of one size"):
        vtprune.downscale(processor, 0.5)
    with pytest.raises(vtprune.VTPruneError, match="has no image processor"):
        vtprune.downscale(open_picture, 0.5)
    with pytest.raises(vtprune.VTPruneError, match=r"a fraction \(a float in \(0, 1\]\), got 2.0"):
        vtprune.downscale(processor, 2.0)
