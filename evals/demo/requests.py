"""What every request of a visitor goes through: one line in the log, and errors that are a sentence."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import gradio as gr

from vtprune.errors import InputError, VTPruneError
from vtprune.loading.media import Media
from vtprune.loading.pictures import open_picture
from vtprune.loading.videos import FRAMES, is_video, open_video

log = logging.getLogger("vtprune.demo")

# Pixels that a picture may unfold to; bytes of an upload.
MOST_PIXELS, MOST_BYTES = 40_000_000, 20 * 2**20
# What an upload may be: formats whose headers say how large the picture is.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


class Sentence(gr.Error):
    """An error that the page shows as it stands."""

    def __init__(self, text: str) -> None:
        super().__init__(text, duration=None, title="This did not work", print_exception=False)


@contextmanager
def logged(kind: str, what: str) -> Iterator[None]:
    """One line for a request: what was asked for, how it ended and how long it took; never the question or picture.
    A refusal becomes the sentence that says what would be right, what else goes wrong a sentence that says so."""
    start, end = time.perf_counter(), "cancelled"
    try:
        yield
        end = "done"
    except VTPruneError as error:
        end = "refused"
        raise Sentence(str(error)) from error
    except Exception as error:
        end = f"failed ({type(error).__name__})"
        log.exception("%s failed", kind)
        raise Sentence(
            "Something went wrong on the server, which has written down what; try other settings or another picture."
        ) from error
    finally:
        log.info(f"{kind} {what}: {end} in {time.perf_counter() - start:.2f} s")


def media_of(path: str | None, video: str | None) -> Media:
    """The video in an uploaded file, where there is one, up to 16 of its frames; else the upright RGB picture in the
    other file. Raises InputError for neither, VideoError and PictureError for what cannot be read or unfolds to more
    than MOST_PIXELS."""
    if video:
        return open_video(video, FRAMES, name="the video", most_pixels=MOST_PIXELS)
    if not path:
        raise InputError("image: choose a picture first")
    if is_video(path):
        raise InputError("image: this is a video; a model that takes videos has a place of its own for them")
    return open_picture(path, "the picture", most_pixels=MOST_PIXELS, formats=FORMATS)
