"""The door for videos: the frames that it picks, when they are shown, and how it refuses what is none."""

from __future__ import annotations

import builtins
import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

import vtprune
from tests.clips import picture_of, square_at, turn, write_clip, write_frames
from vtprune.errors import InputError, VideoError
from vtprune.loading import videos
from vtprune.loading.media import read_media
from vtprune.loading.videos import is_video, open_video

CONTAINERS = {
    "mp4": "libx264", "mov": "mpeg4", "mkv": "libx264", "webm": "libvpx-vp9", "avi": "libx264", "mpg": "mpeg2video",
    "ts": "libx264", "flv": "flv", "wmv": "wmv2",
}  # fmt: skip


def every_frame(path: Path) -> list[Image.Image]:
    with av.open(str(path)) as file:
        return [frame.to_image() for frame in file.decode(video=0)]


@pytest.mark.parametrize("container", CONTAINERS)
def test_frames_are_spread_from_the_first_to_the_last_each_with_its_time(tmp_path: Path, container: str) -> None:
    # Key frames every ten, so that some of what is between two chosen frames may be passed over.
    path = write_clip(tmp_path / f"clip.{container}", 90, 25, (96, 64), CONTAINERS[container], g="10")
    video, whole = open_video(path, 7), every_frame(path)
    places = np.linspace(0, 89, 7).round().astype(int).tolist()
    assert len(whole) == video.total == 90
    assert video.indices == places
    assert video.seconds == pytest.approx([place / 25 for place in places], abs=1e-3)
    assert video.fps == pytest.approx(25)
    assert video.name == str(path)
    for frame, place in zip(video.frames, places, strict=True):
        assert np.array_equal(np.asarray(frame), np.asarray(whole[place]))
        column, row = square_at(frame)
        assert abs(column - square_at(Image.fromarray(picture_of(place, 90, (96, 64))))[0]) <= 3
        assert abs(row - 14) <= 3


@pytest.mark.parametrize("frames", [1, 5, 24, 100])
def test_no_frame_is_shown_twice(tmp_path: Path, frames: int) -> None:
    video = open_video(write_clip(tmp_path / "clip.mp4", 24, 8), frames)
    assert len(video.frames) == min(frames, 24)
    assert len(set(video.seconds)) == len(video.frames)
    assert video.array().shape == (len(video.frames), 48, 64, 3)


def test_a_video_is_read_from_its_bytes_and_from_an_open_file(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4")
    expected = open_video(path, 4).array()
    for source in (path.read_bytes(), io.BytesIO(path.read_bytes())):
        assert np.array_equal(open_video(source, 4).array(), expected)
    assert open_video(path.read_bytes(), 4, name="yours").name == "yours"
    assert np.array_equal(vtprune.open_video(str(path), 4).array(), expected)


def test_a_changing_rate_gives_each_frame_its_own_time(tmp_path: Path) -> None:
    path, ticks = tmp_path / "clip.mkv", [0, 100, 200, 1000, 1900, 2000]
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for index, tick in enumerate(ticks):
            frame = av.VideoFrame.from_ndarray(picture_of(index, 6, (64, 48)), format="rgb24")
            frame.pts, frame.time_base = tick, Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    video = open_video(path)
    assert video.seconds == pytest.approx([tick / 1000 for tick in ticks])
    assert [index / video.fps for index in video.indices] == pytest.approx(video.seconds, abs=0.05 / video.fps)


@pytest.mark.parametrize("container", ["mp4", "avi", "frames"])
def test_frames_may_be_taken_between_two_times(tmp_path: Path, container: str) -> None:
    path = tmp_path / f"clip.{container}"
    write_frames(path, 40) if container == "frames" else write_clip(path, 40, 10)
    fps = 10 if container == "frames" else None
    video = open_video(path, 5, fps=fps, start=1.0, end=2.0)
    assert video.seconds == pytest.approx([1.0, 1.2, 1.5, 1.8, 2.0])
    assert (video.total, video.indices) == (11, [10, 12, 15, 18, 20])
    whole = open_video(path, 40, fps=fps)
    for frame, index in zip(video.frames, video.indices, strict=True):
        assert np.array_equal(np.asarray(frame), np.asarray(whole.frames[int(index)]))
    assert open_video(path, 99, fps=fps, start=3.5).total == 5
    refused(path, "no frame between 4 and 5 seconds; its last one is at 3.9", fps=fps, start=4, end=5)


def test_a_turned_video_stands_upright(tmp_path: Path) -> None:
    path = turn(write_clip(tmp_path / "clip.mp4", 10, size=(96, 64)), 64)
    first, *_, last = open_video(path).frames
    assert first.size == last.size == (64, 96)
    # The upper edge has become the right one, and the left one the upper one.
    assert square_at(first) == pytest.approx((49, 5), abs=1)
    assert square_at(last) == pytest.approx((49, 90), abs=1)


def test_a_folder_of_frames_goes_by_the_numbers_in_its_names(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "frames", 12)
    (folder / "notes.txt").write_text("no frame")
    video = open_video(folder)
    columns = [square_at(frame)[0] for frame in video.frames]
    assert columns == sorted(columns)
    assert video.seconds == tuple(index / 2 for index in range(12))
    fewer = open_video(folder, 4, fps=10)
    assert fewer.seconds == pytest.approx((0, 0.4, 0.7, 1.1))
    assert (fewer.indices, fewer.total, fewer.fps) == ([0, 4, 7, 11], 12, 10)


def test_a_folder_is_read_without_the_extra_and_a_file_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name == "av":
            raise ImportError("No module named 'av'")
        return original(name, *arguments)

    path, folder = write_clip(tmp_path / "clip.mp4"), write_frames(tmp_path / "frames")
    monkeypatch.setattr(builtins, "__import__", without)
    assert len(open_video(folder).frames) == 6
    with pytest.raises(VideoError, match=r"pip install 'vtprune\[video\]'"):
        open_video(path)


def refused(source: Any, *words: str, **options: Any) -> None:
    with pytest.raises(VideoError) as caught:
        open_video(source, **options)
    assert len(str(caught.value).splitlines()) == 1
    for word in (*words, *([Path(source).name] if isinstance(source, Path) else [])):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("container", "share"),
    # The last part of an AVI is an index that it can do without.
    [
        *((container, share) for container in ("mp4", "mov", "mkv", "webm", "flv") for share in (0.6, 0.9)),
        ("avi", 0.6),
    ],
)
def test_a_file_that_is_cut_short_is_refused(tmp_path: Path, container: str, share: float) -> None:
    path = write_clip(tmp_path / f"clip.{container}", 240, codec=CONTAINERS[container])
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refused(path, "cut short")


def test_an_mp4_whose_index_stands_in_front_is_missed_by_its_last_byte(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", 240)
    front = tmp_path / "front.mp4"
    with av.open(str(path)) as read, av.open(str(front), "w", options={"movflags": "faststart"}) as written:
        stream: Any = written.add_stream_from_template(read.streams.video[0])
        for packet in read.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                written.mux(packet)
    assert open_video(front).total == 240
    content = front.read_bytes()
    for length in (len(content) - 1, len(content) // 2):
        front.write_bytes(content[:length])
        refused(front, "cut short")


def test_what_is_no_video_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    refused(path, "no file")
    for content in (b"no video at all" * 20, b"", picture(tmp_path)):
        path.write_bytes(content)
        refused(path, "cannot read")
    refused(b"no video", "cannot read the video")
    path.write_bytes(sound(tmp_path))
    refused(path, "no video stream")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no picture in the folder")
    folder = write_frames(tmp_path / "frames")
    Image.new("RGB", (10, 10)).save(folder / "frame9.png")
    refused(folder, "frame9.png has 10x10 and not 64x48")
    (folder / "frame9.png").write_bytes(b"no picture")
    refused(folder, "frame9.png", "format is not known")


def picture(folder: Path) -> bytes:
    Image.new("RGB", (64, 48)).save(folder / "picture.png")
    return (folder / "picture.png").read_bytes()


def sound(folder: Path) -> bytes:
    path = folder / "sound.m4a"
    with av.open(str(path), "w", format="mp4") as file:
        stream: Any = file.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path.read_bytes()


def test_a_playlist_opens_no_other_file(tmp_path: Path) -> None:
    other = write_clip(tmp_path / "other.ts")
    path = tmp_path / "clip.mp4"
    path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{other}\n#EXT-X-ENDLIST\n")
    refused(path, "no video that can be decoded")
    path.write_text(f"ffconcat version 1.0\nfile {other.name}\n")
    refused(path, "no video that can be decoded")
    refused("http://127.0.0.1:9/clip.mp4", "no file http://127.0.0.1:9/clip.mp4")


def test_more_pixels_than_are_taken_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, folder = write_clip(tmp_path / "clip.mp4"), write_frames(tmp_path / "frames")
    refused(path, "64 x 48 pixels", "at the most 3,071 a frame", most_pixels=3071)
    refused(folder, "64 x 48 pixels", "at the most 3,071", most_pixels=3071)
    monkeypatch.setattr(videos, "MOST_TOGETHER", 10 * 64 * 48)
    assert len(open_video(path, 10).frames) == 10
    refused(path, "take 10 frames or fewer", frames=11)


def test_options_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    path, folder = write_clip(tmp_path / "clip.mp4"), write_frames(tmp_path / "frames")
    refused(path, "1 frame or more, got 0", frames=0)
    refused(folder, "a number above 0, got 0", fps=0)
    refused(folder, "a number above 0, got nan", fps=float("nan"))
    refused(path, "fps is for a folder of frames", fps=5)


def test_names_say_what_is_a_video(tmp_path: Path) -> None:
    path, folder = write_clip(tmp_path / "clip.MP4"), write_frames(tmp_path / "frames")
    assert is_video(path)
    assert is_video(folder)
    assert not is_video(folder / "frame1.png")
    assert isinstance(read_media(folder / "frame1.png", "image"), Image.Image)
    assert len(read_media(path, "video", 3).frames) == 3  # type: ignore[union-attr]
    with pytest.raises(InputError, match=r"data: no file .*nothing\.mkv"):
        read_media(tmp_path / "nothing.mkv", "data")
    with pytest.raises(InputError, match=r"image: .* is no folder of frames"):
        read_media(folder / "frame1.png", "image", fps=3)
