"""Videos as files: a coloured square that moves over a dark ground, from left to right."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

SQUARE, GROUND = 12, 40


def picture_of(index: int, count: int, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) one frame of `count`; the square is red and stands in the upper half."""
    width, height = size
    frame = np.full((height, width, 3), GROUND, np.uint8)
    left = round(index * (width - SQUARE) / max(1, count - 1))
    frame[height // 8 : height // 8 + SQUARE, left : left + SQUARE] = (250, 40, 40)
    return frame


def write_clip(
    path: Path, count: int = 24, fps: int = 8, size: tuple[int, int] = (64, 48), codec: str = "libx264", **options: str
) -> Path:
    """A video of so many frames; options: of the encoder."""
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream(codec, rate=fps, options=options)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for index in range(count):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture_of(index, count, size), format="rgb24")))
        file.mux(stream.encode())
    return path


def write_frames(folder: Path, count: int = 6, size: tuple[int, int] = (64, 48)) -> Path:
    """The same as a folder of frames, named frame1.png to frame12.png and so on."""
    folder.mkdir()
    for index in range(count):
        Image.fromarray(picture_of(index, count, size)).save(folder / f"frame{index + 1}.png")
    return folder


def turn(path: Path, height: int) -> Path:
    """Writes into an MP4 of this height that viewers turn it by a quarter, clockwise."""
    content = bytearray(path.read_bytes())
    matrix = content.find(b"tkhd") + 44
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, height << 16, 0, 1 << 30)
    path.write_bytes(content)
    return path


def square_at(frame: Image.Image) -> tuple[int, int]:
    """The column and the row of the middle of the red square."""
    values = np.asarray(frame).astype(int)
    rows, columns = np.nonzero(values[:, :, 0] - values[:, :, 2] > 100)
    return round(float(columns.mean())), round(float(rows.mean()))
