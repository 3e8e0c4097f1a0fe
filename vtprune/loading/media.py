"""A picture or a video: what a question may be about, told apart by the name of its file."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from vtprune.errors import InputError, VideoError
from vtprune.loading.pictures import read_image
from vtprune.loading.videos import FRAMES, Video, is_video, open_video

Media = Image.Image | Video


def read_media(path: Path, option: str, frames: int = FRAMES, *, fps: float | None = None) -> Media:
    """The upright picture in a file, or up to so many frames of the video in a file or in a folder of frames.

    fps: frames a second of a folder of frames (None: 2). Raises InputError, under the option's name, for what cannot
    be read, and for fps where there is no such folder.
    """
    if is_video(path):
        try:
            return open_video(path, frames, fps=fps)
        except VideoError as error:
            raise InputError(f"{option}: {error}") from error
    if fps is not None:
        raise InputError(f"{option}: {path} is no folder of frames, whose frames a second could be given")
    return read_image(path, option)


def size_text(media: Media) -> str:
    """Width and height in pixels, of a video its number of frames, too."""
    size = f"{media.width}x{media.height}"
    return f"{len(media.frames)} frames of {size}" if isinstance(media, Video) else size
