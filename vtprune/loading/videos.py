"""The one door for videos: whatever a file or a folder of frames holds comes out as some of its frames, upright and
RGB, each with its time."""

from __future__ import annotations

import bisect
import io
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from vtprune.errors import PictureError, VideoError
from vtprune.loading.pictures import SUFFIXES as PICTURES
from vtprune.loading.pictures import open_picture

Source = str | os.PathLike[str] | bytes | BinaryIO
# The first and the last second that are looked at.
Span = tuple[float, float]
# What the names of files end in that are taken for videos.
SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".flv", ".wmv",
    ".asf", ".ogv", ".ogg",
)  # fmt: skip
# The containers that are opened, as FFmpeg calls them. Playlists and the like are not among them: they would have it
# open whatever other files and addresses they name.
FORMATS = ("mov", "matroska", "avi", "mpeg", "mpegts", "flv", "asf", "ogg")
# Of these an index says where each key frame lies, so that what lies between two chosen frames need not be decoded.
INDEXED = ("mov", "matroska")
# These say no times, but how many frames are a second; what is said of the order of frames is guessed.
UNTIMED = "avi"
FRAMES = 16
# A folder of frames says nothing of time: so many of its frames are a second.
FOLDER_FPS = 2.0
# Pixels that all frames of one video may have together, about 1.6 GB, and one frame.
MOST_TOGETHER = 2**29
MOST_PIXELS = 2**26
# A file that ends before this share of the time that it says it lasts, and two frames, was cut short.
SHORT = 0.95
# Times that are this near to a whole number of frames are of a steady rate; containers round them.
STEADY = 0.05


@dataclass(frozen=True, eq=False)
class Video:
    """Some frames of a video.

    frames: upright RGB pictures of one size; seconds: when each is shown, the first frame of the whole video at 0;
    fps: frames a second of the whole video; total: how many frames these were chosen from; name: what a message calls
    it.
    """

    frames: tuple[Image.Image, ...]
    seconds: tuple[float, ...]
    fps: float
    total: int
    name: str = "the video"

    @property
    def width(self) -> int:
        """Pixels of a frame from left to right."""
        return self.frames[0].width

    @property
    def height(self) -> int:
        """Pixels of a frame from top to bottom."""
        return self.frames[0].height

    @property
    def indices(self) -> list[float]:
        """Which frame of the whole video each is, counted from 0: between two of them where its rate changes, so that
        an index over `fps` is always the time in seconds."""
        places = [second * self.fps for second in self.seconds]
        return [round(place) if abs(place - round(place)) < STEADY else place for place in places]

    def array(self) -> np.ndarray:
        """(T, H, W, 3) uint8, the frames."""
        return np.stack([np.asarray(frame) for frame in self.frames])


def is_video(path: str | os.PathLike[str]) -> bool:
    """Whether a path is taken for a video: a folder, of frames, or a file whose name says so."""
    return Path(path).is_dir() or Path(path).suffix.lower() in SUFFIXES


def open_video(
    source: Source,
    frames: int = FRAMES,
    *,
    name: str | None = None,
    fps: float | None = None,
    start: float = 0.0,
    end: float = math.inf,
    most_pixels: int = MOST_PIXELS,
) -> Video:
    """At the most `frames` frames of a video, evenly spread from its first to its last one.

    source: a file, its bytes, or a folder of frames, which are its pictures in the order of their names (numbers in
    them by value). Files are decoded by PyAV (the extra `video`), their rotation is applied. fps: of a folder, how
    many of its frames are a second (None: 2); a file says it itself. name: what a message calls it (None: its path).
    start, end: the seconds between which frames are taken. most_pixels: what a frame may have.

    Raises VideoError, naming the file, for one that is not there, is no video, has no frame (between start and end),
    is cut short or too large, for a folder with pictures of several sizes, and where PyAV is not installed.
    """
    if name is None:
        name = os.fspath(source) if isinstance(source, str | os.PathLike) else "the video"
    if isinstance(frames, bool) or frames < 1:
        raise VideoError(f"{name}: a video is read as 1 frame or more, got {frames!r}")
    if fps is not None and not 0 < fps < float("inf"):
        raise VideoError(f"{name}: frames a second are a number above 0, got {fps!r}")
    try:
        if isinstance(source, str | os.PathLike) and Path(source).is_dir():
            return _folder(
                Path(source), frames, name, fps=fps or FOLDER_FPS, span=(start, end), most_pixels=most_pixels
            )
        if fps is not None:
            raise ValueError("a file says itself how many frames are a second; fps is for a folder of frames")
        return _file(source, frames, name, span=(start, end), most_pixels=most_pixels)
    except VideoError:
        raise
    except PictureError as error:
        raise VideoError(f"{name}: {error}") from error
    except FileNotFoundError as error:
        raise VideoError(f"no file {name}") from error
    # FFmpeg's decoders answer whatever their parsing runs into.
    except Exception as error:
        raise VideoError(f"cannot read {name}: {_reason(error)}") from error


def video_of(pictures: Sequence[Source | Image.Image], frames: int = FRAMES, *, name: str, fps: float) -> Video:
    """At the most `frames` of the pictures of a video, of which so many are a second, evenly spread from the first to
    the last one; raises VideoError for none, for one that cannot be read, and for several sizes."""
    if not pictures:
        raise VideoError(f"{name}: it has no frame")
    chosen, total = _chosen([index / fps for index in range(len(pictures))], frames, (0.0, math.inf))
    try:
        opened = tuple(open_picture(pictures[index]) for index in chosen)
    except PictureError as error:
        raise VideoError(f"{name}: {error}") from error
    if len({picture.size for picture in opened}) > 1:
        raise VideoError(f"{name}: its frames are of several sizes")
    return Video(opened, tuple(index / fps for index in chosen), fps=fps, total=total, name=name)


def _reason(error: Exception) -> str:
    if type(error).__module__.startswith("av."):
        # PyAV's own text names its C function and the file once more.
        return f"it is no video that can be decoded, or it is cut short ({getattr(error, 'strerror', error)})"
    return " ".join(str(error).split()) or type(error).__name__


def _chosen(moments: Sequence[float], frames: int, span: Span) -> tuple[list[int], int]:
    """Which frames are taken, of those that are shown at these seconds, and how many of them lie in the span: of those
    the first, the last, and between them evenly."""
    start, end = span
    within = [index for index, moment in enumerate(moments) if start <= moment <= end]
    if not within:
        raise ValueError(f"it has no frame between {start:g} and {end:g} seconds; its last one is at {moments[-1]:g}")
    places = np.linspace(0, len(within) - 1, min(frames, len(within))).round().astype(int)
    return [within[place] for place in places], len(within)


def _check_size(width: int, height: int, frames: int, most_pixels: int) -> None:
    if width * height > most_pixels:
        raise ValueError(
            f"its frames have {width:,} x {height:,} pixels, and at the most {most_pixels:,} a frame are taken"
        )
    if width * height * frames > MOST_TOGETHER:
        raise ValueError(
            f"{frames} frames of {width:,} x {height:,} pixels are more than the {MOST_TOGETHER:,} pixels that one "
            f"video may have; take {MOST_TOGETHER // (width * height)} frames or fewer"
        )


def _folder(folder: Path, frames: int, name: str, *, fps: float, span: Span, most_pixels: int) -> Video:
    paths = [path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in PICTURES]
    if not paths:
        raise VideoError(f"no picture in the folder {name}, which should hold the frames of a video")
    paths.sort(key=lambda path: _in_order(path.name))
    chosen, total = _chosen([index / fps for index in range(len(paths))], frames, span)
    pictures: list[Image.Image] = []
    for index in chosen:
        picture = open_picture(paths[index], most_pixels=most_pixels)
        if pictures and picture.size != pictures[0].size:
            sizes = (f"{one.width}x{one.height}" for one in (picture, pictures[0]))
            raise VideoError(f"{name}: frames are of one size, and {paths[index].name} has {' and not '.join(sizes)}")
        pictures.append(picture)
        _check_size(*picture.size, len(chosen), most_pixels)
    return Video(tuple(pictures), tuple(index / fps for index in chosen), fps=fps, total=total, name=name)


def _in_order(name: str) -> list[str | int]:
    """What names are sorted by: text, number, text, … of each."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"([0-9]+)", name))]


def _file(source: Source, frames: int, name: str, *, span: Span, most_pixels: int) -> Video:
    with _stream(source, most_pixels) as (container, stream):
        times, keys = _scan(container, stream)
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        base, indexed = stream.time_base, container.format.name.split(",")[0] in INDEXED
        size = stream.codec_context.width, stream.codec_context.height
    if times:
        moments = [float((time - times[0]) * base) for time in times]
        rate = rate or (len(times) - 1) / max(moments[-1], 1e-6) or 1.0
    else:
        rate = rate or 1.0
        moments = [index / rate for index in range(_counted(source, most_pixels))]
    chosen, total = _chosen(moments, frames, span)
    _check_size(*size, len(chosen), most_pixels)
    with _stream(source, most_pixels) as (container, stream):
        if times:
            found = _at_times(container, stream, [times[index] for index in chosen], keys if indexed else None)
        else:
            wanted = set(chosen)
            found = (frame for index, frame in enumerate(container.decode(stream)) if index in wanted)
        pictures = tuple(_upright(frame) for frame in found)
    if len({picture.size for picture in pictures}) != 1:
        raise ValueError("its frames are of several sizes")
    return Video(pictures, tuple(moments[index] for index in chosen), fps=rate, total=total, name=name)


@contextmanager
def _stream(source: Source, most_pixels: int) -> Iterator[tuple[Any, Any]]:
    """A file, opened, and its video stream."""
    try:
        import av
    except ImportError as error:
        raise VideoError("reading a video takes PyAV: pip install 'vtprune[video]'") from error
    with _opened(source) as file:
        if not file.seek(0, os.SEEK_END):
            raise ValueError("it is empty")
        file.seek(0)
        allowed = {"format_whitelist": ",".join(FORMATS)}
        with av.open(file, container_options=allowed) as container:
            # A cover picture is a stream of its own, too.
            cover = av.stream.Disposition.attached_pic
            streams = [one for one in container.streams.video if not one.disposition & cover]
            if not streams:
                raise ValueError("it has no video stream")
            stream = streams[0]
            stream.thread_type = "AUTO"
            # Whatever the header says of its size: the decoder refuses a frame that is larger.
            stream.codec_context.options = {"max_pixels": str(most_pixels)}
            yield container, stream


@contextmanager
def _opened(source: Source) -> Iterator[BinaryIO]:
    """The bytes of a source. A path is opened here and not by FFmpeg, which takes some of them for addresses."""
    if isinstance(source, bytes):
        yield io.BytesIO(source)
    elif isinstance(source, str | os.PathLike):
        with open(source, "rb") as file:
            yield file
    else:
        yield source


def _scan(container: Any, stream: Any) -> tuple[list[int], list[int]]:
    """When each frame of a stream is shown, in order, and when its key frames are, without decoding any: ticks of the
    stream's clock. No times where the file does not say them of all frames. Raises ValueError for a file that is cut
    short."""
    times: list[int | None] = []
    keys: list[int] = []
    begins: list[float] = []
    ends, broken = 0.0, False
    for packet in container.demux():
        if packet.pts is not None:
            begins.append(float(packet.pts * packet.time_base))
            ends = max(ends, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream_index == stream.index and packet.size and not packet.is_discard:
            broken = packet.is_corrupt
            times.append(packet.pts)
            if packet.is_keyframe and packet.pts is not None:
                keys.append(packet.pts)
    if not times:
        raise ValueError("it holds no frame")
    known = [time for time in times if time is not None and container.format.name != UNTIMED]
    # A container's duration is in microseconds.
    lasts, there = (container.duration or 0) / 1e6, ends - min(begins, default=0.0)
    spare = 2 / float(stream.average_rate or 1)
    if broken:
        raise ValueError("it is cut short: its last frame is not whole")
    if known and there + spare < SHORT * lasts:
        raise ValueError(f"it is cut short: {there:.1f} of its {lasts:.1f} seconds are there")
    return (sorted(known), sorted(keys)) if len(known) == len(times) else ([], [])


def _counted(source: Source, most_pixels: int) -> int:
    """How many frames a file has that says no times, by decoding it."""
    with _stream(source, most_pixels) as (container, stream):
        return sum(1 for _ in container.decode(stream))


def _at_times(container: Any, stream: Any, times: Sequence[int], keys: Sequence[int] | None) -> Iterator[Any]:
    """The frame that is shown at each of some ascending times. keys: where decoding may begin, None where it begins
    at the start alone."""
    frames, current = container.decode(stream), None
    for time in times:
        before = bisect.bisect_right(keys, time) - 1 if keys else -1
        if keys and before >= 0 and (current is None or current.pts < keys[before]):
            container.seek(keys[before], stream=stream)
            frames, current = container.decode(stream), None
        while current is None or current.pts < time:
            current = next(frames, None)
            if current is None:
                raise ValueError("it is cut short: its last frames cannot be decoded")
        yield current
    if current is not None and current.is_corrupt:
        raise ValueError("it is cut short: its last frame is not whole")


def _upright(frame: Any) -> Image.Image:
    """A frame as a picture, turned as the file says."""
    picture: Image.Image = frame.to_image()
    return picture.rotate(frame.rotation, expand=True) if frame.rotation % 360 else picture
