"""The one door for pictures: whatever a file holds comes out as the upright RGB picture that a viewer shows."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from vtprune.errors import InputError, PictureError

# What the names of files end in that are taken for pictures where a folder is searched.
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
Source = str | os.PathLike[str] | bytes | BinaryIO | Image.Image
# Greyscale modes of more than eight bits, and what their numbers may run up to: the first of these that holds all of
# them is white. Sixteen bits say their range themselves; what a file of more bits or of floats means, it does not say.
SIXTEEN, DEEP = ("I;16", "I;16B", "I;16L", "I;16N"), ("I", "F")
CEILINGS = {"I": (255.0, 65535.0), "F": (1.0, 255.0, 65535.0)}
# What PIL turns into RGB, or into RGBA where it has an alpha channel, as it should.
PLAIN, ALPHA = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"), ("LA", "PA", "RGBA", "La", "RGBa")
TRANSPARENCY = "transparency"

_lock = threading.Lock()
_strict, _lenient = 0, False


@contextmanager
def whole_images() -> Iterator[None]:
    """A picture that is cut short raises OSError inside; lmms-eval has PIL pad such pictures with grey.

    The switch is one for the whole process: the first thread that comes in turns it, the last one out turns it back.
    """
    global _strict, _lenient
    with _lock:
        if not _strict:
            _lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        _strict += 1
    try:
        yield
    finally:
        with _lock:
            _strict -= 1
            if not _strict:
                ImageFile.LOAD_TRUNCATED_IMAGES = _lenient


def open_picture(
    source: Source,
    name: str | None = None,
    *,
    most_pixels: int | None = None,
    formats: tuple[str, ...] | None = None,
) -> Image.Image:
    """The upright RGB picture in a file, in its bytes, or in a PIL image, which is left as it is.

    EXIF orientation is applied, transparency is composited on white, and of an animation the first frame is taken.
    Sixteen bits of grey are scaled from 0..65535 to 0..255. Of 32-bit integers the range is the first of 0..255,
    0..65535 that holds all of them, of floats the first of 0..1, 0..255, 0..65535; where none does, black is the
    smallest value and white the largest. name: what a message calls it (None: its path). most_pixels: what a file may
    unfold to, which its header says before anything is decoded (None: what PIL takes). formats: those that a file may
    be in, as PIL names them (None: all that PIL knows; some hold pictures larger than their header says).

    Raises PictureError, naming the file, for one that is not there, is no picture, is cut short, is too large, or
    holds what cannot be shown (values that are not finite, colour spaces without a rule).
    """
    if name is None:
        name = os.fspath(source) if isinstance(source, str | os.PathLike) else "the picture"
    try:
        with whole_images():
            if isinstance(source, Image.Image):
                source.load()
                return _upright_rgb(source)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats) as image:
                if most_pixels is not None and image.width * image.height > most_pixels:
                    size = f"{image.width:,} x {image.height:,}"
                    raise ValueError(f"it has {size} pixels, and at the most {most_pixels:,} are taken")
                image.load()
                return _upright_rgb(image)
    except FileNotFoundError as error:
        raise PictureError(f"no file {name}") from error
    except UnidentifiedImageError as error:
        # PIL's own message names the file, or an object in memory, once more.
        raise PictureError(f"cannot read {name}: cannot identify image file: its format is not known") from error
    # PIL's decoders raise whatever their parsing runs into: struct.error, IndexError, zlib.error and more.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PictureError(f"cannot read {name}: {reason}") from error


def read_image(path: str | os.PathLike[str], option: str = "image") -> Image.Image:
    """The upright RGB picture in a file; raises InputError, under the option's name, if it is none or cut short."""
    try:
        return open_picture(path)
    except PictureError as error:
        raise InputError(f"{option}: {error}") from error


def exif_of(path: str | os.PathLike[str]) -> dict[int, Any]:
    """The EXIF tags of the picture in a file, {} where it has none; raises PictureError for what is no picture."""
    try:
        with Image.open(path) as image:
            return dict(image.getexif())
    except Exception as error:
        raise PictureError(f"cannot read {os.fspath(path)}: {error}") from error


def open_pictures_in(value: Any, name: str | None = None) -> Any:
    """A value with every PIL image in it, however deep in lists and mappings, put through the door."""
    if isinstance(value, Image.Image):
        return open_picture(value, name)
    if isinstance(value, dict):
        return {key: open_pictures_in(one, name) for key, one in value.items()}
    return [open_pictures_in(one, name) for one in value] if isinstance(value, list) else value


def _upright_rgb(image: Image.Image) -> Image.Image:
    image = _upright(image)
    if image.mode in SIXTEEN or image.mode in DEEP:
        return _deep_grey(image)
    if image.mode in ALPHA or TRANSPARENCY in image.info:
        return _on_white(image)
    if image.mode not in PLAIN:
        raise ValueError(f"pictures of the colour space {image.mode} have no rule here; convert it to RGB")
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says; EXIF data that cannot be read say nothing."""
    try:
        turned = ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:
        return image
    return turned


def _on_white(image: Image.Image) -> Image.Image:
    mark = image.info.get(TRANSPARENCY)
    if isinstance(mark, tuple) and max(mark) > 255:
        # Of a PNG with 16 bits a channel PIL keeps the high bytes, but names the transparent colour by both.
        image = image.copy()
        image.info[TRANSPARENCY] = tuple(value >> 8 for value in mark)
    if image.mode not in ("RGBA", "LA"):
        straight = {"La": "LA"}.get(image.mode, "RGBA")
        image = image.convert(straight)
    colours = image.convert("RGBA")
    white = Image.new("RGBA", colours.size, "white")
    return Image.alpha_composite(white, colours).convert("RGB")


def _deep_grey(image: Image.Image) -> Image.Image:
    """(H, W) values of more than eight bits as grey RGB; the one value that a PNG calls transparent becomes white."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are not finite numbers")
    low, high = 0.0, 65535.0
    if image.mode in DEEP:
        smallest, largest = float(values.min()), float(values.max())
        fitting = [ceiling for ceiling in CEILINGS[image.mode] if smallest >= 0 and largest <= ceiling]
        low, high = (0.0, fitting[0]) if fitting else (smallest, largest)
    grey = 255 * (values - low) / max(high - low, np.finfo(np.float64).tiny)
    mark = image.info.get(TRANSPARENCY)
    if isinstance(mark, int):
        grey[values == mark] = 255
    shades = grey.clip(0, 255).round().astype(np.uint8)
    return Image.fromarray(np.repeat(shades[:, :, None], 3, axis=2))
