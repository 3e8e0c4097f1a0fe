"""What lmms-eval's tasks hand as a video: a path, perhaps with the seconds to look at, or its frames."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from vtprune.errors import VideoError
from vtprune.loading.videos import FOLDER_FPS, Video, open_video, video_of


def video_in(part: dict[str, Any], frames: int) -> Video:
    """The video of a message's part, at the most so many frames of it.

    part: {"video": …}, with "video_start" and "video_end" in seconds where a part of it is meant; the video itself is
    a path, such a mapping with a "path" or a "url", (T, H, W, 3) uint8 frames or a sequence of pictures. Frames come
    without times and are taken for two a second. Raises VideoError for anything else, and for what cannot be read.
    """
    given = part["video"]
    if isinstance(given, dict):
        part, given = given, given.get("path") or given.get("url") or given.get("video")
    start, end = part.get("video_start"), part.get("video_end")
    if isinstance(given, str | os.PathLike):
        path = os.fspath(given).removeprefix("file://")
        if "://" in path:
            raise VideoError(f"{path} is an address, and a video is read from a file of this machine")
        return open_video(path, frames, start=start or 0.0, end=math.inf if end is None else end)
    if isinstance(given, np.ndarray) and given.ndim == 4 and given.shape[3] == 3 and given.dtype == np.uint8:
        given = [Image.fromarray(frame) for frame in given]
    if isinstance(given, Sequence) and all(isinstance(frame, Image.Image) for frame in given):
        return video_of(given, frames, name="the video", fps=FOLDER_FPS)
    raise VideoError(f"a video is a path, pictures or (T, H, W, 3) bytes, got {type(given).__name__}")
