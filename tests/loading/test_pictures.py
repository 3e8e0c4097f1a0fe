"""The one door for pictures: what a viewer would show, and nothing else opens or converts them."""

from __future__ import annotations

import ast
import io
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from tests.checkpoint import png
from vtprune.errors import PictureError
from vtprune.loading.pictures import open_picture, open_pictures_in, whole_images

ROOT = Path(__file__).parents[2]


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def pixel(source: bytes | Image.Image, x: int = 0, y: int = 0) -> tuple[int, int, int]:
    found = open_picture(source)
    assert found.mode == "RGB"
    value = found.getpixel((x, y))
    assert isinstance(value, tuple)
    return value[0], value[1], value[2]


def grey(values: list[float], kind: str, mode: str | None = None) -> Image.Image:
    image = Image.fromarray(np.array([values], dtype=kind))
    assert mode is None or image.mode == mode
    return image


def shades(source: bytes | Image.Image, count: int) -> list[int]:
    return [pixel(source, x)[1] for x in range(count)]


def test_sixteen_bits_of_grey_are_scaled_from_their_whole_range() -> None:
    image = grey([0, 257, 32768, 65535], "uint16")
    for source in (saved(image), saved(image, "TIFF"), image):
        assert shades(source, 4) == [0, 1, 128, 255]
    for order in ("I;16", "I;16B", "I;16L"):
        raw = np.array([[0, 32768, 65535]], dtype=">u2" if order == "I;16B" else "<u2").tobytes()
        assert shades(Image.frombytes(order, (3, 1), raw), 3) == [0, 128, 255]


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("int32", [0, 100, 255], [0, 100, 255]),
        ("int32", [0, 25700, 65535], [0, 100, 255]),
        ("int32", [-100, 0, 100], [0, 128, 255]),
        ("int32", [0, 500_000, 1_000_000], [0, 128, 255]),
        ("float32", [0.0, 0.4, 1.0], [0, 102, 255]),
        ("float32", [0.0, 100.4, 255.0], [0, 100, 255]),
        ("float32", [0.0, 25700.0, 65535.0], [0, 100, 255]),
        ("float32", [-1.0, 0.0, 1.0], [0, 128, 255]),
        ("float32", [7e5, 7e5, 7e5], [0, 0, 0]),
    ],
)
def test_integers_and_floats_fill_the_first_range_that_holds_them(
    kind: str, values: list[float], expected: list[int]
) -> None:
    image = grey(values, kind, "I" if kind == "int32" else "F")
    assert shades(image, 3) == expected
    assert shades(saved(image, "TIFF"), 3) == expected


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(PictureError, match="not finite"):
        open_picture(grey([0.0, float("nan")], "float32"))


@pytest.mark.parametrize(("mode", "half"), [("RGBA", (255, 127, 127)), ("LA", (177, 177, 177)), ("RGBa", None)])
def test_alpha_is_composited_on_white(mode: str, half: tuple[int, int, int] | None) -> None:
    image = Image.new("RGBA", (3, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 128))
    image.putpixel((2, 0), (255, 0, 0, 255))
    image = image.convert("L").convert("LA") if mode == "LA" else image.convert(mode)
    if mode == "LA":
        image.putdata([(100, 0), (100, 128), (100, 255)])
    assert pixel(image) == (255, 255, 255)
    if half is not None:
        assert np.abs(np.subtract(pixel(image, 1), half)).max() <= 1
    if mode != "RGBa":
        assert pixel(saved(image)) == (255, 255, 255)


def test_a_colour_that_is_called_transparent_is_white() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 0, 0])
    palette.putdata([0, 1])
    for source in (saved(palette, transparency=0), saved(palette, "GIF", transparency=0)):
        assert [pixel(source), pixel(source, 1)] == [(255, 255, 255), (200, 0, 0)]
    level = grey([7, 9], "uint8")
    assert [pixel(saved(level, transparency=7)), pixel(saved(level), 0)] == [(255, 255, 255), (7, 7, 7)]
    colour = Image.new("RGB", (1, 1), (1, 2, 3))
    assert pixel(saved(colour, transparency=(1, 2, 3))) == (255, 255, 255)
    deep = grey([0, 65535], "uint16")
    assert shades(saved(deep, transparency=0), 2) == [255, 255]
    both = Image.new("RGBA", (1, 1), (9, 9, 9, 0)).convert("PA")
    assert pixel(both) == (255, 255, 255)


def test_orientation_is_applied_and_the_source_is_left_alone() -> None:
    image = Image.new("RGB", (2, 1), (0, 0, 0))
    image.putpixel((1, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter, clockwise
    for kind in ("PNG", "TIFF", "WEBP"):
        found = open_picture(saved(image, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {})))
        assert found.size == (1, 2)
        assert found.getpixel((0, 0)) == (0, 0, 0)
    deep = open_picture(saved(grey([0, 65535], "uint16"), exif=exif))
    assert (deep.size, deep.getpixel((0, 1))) == ((1, 2), (255, 255, 255))
    given = Image.open(io.BytesIO(saved(image, exif=exif)))
    open_picture(given)
    assert given.size == (2, 1)


def test_an_animation_gives_its_first_frame_and_other_modes_their_colours() -> None:
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "PNG"):
        assert pixel(saved(frames[0], kind, save_all=True, append_images=frames[1:])) == (255, 0, 0)
    assert pixel(saved(frames[0], "TIFF", save_all=True, append_images=frames[1:])) == (255, 0, 0)
    assert pixel(saved(Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "TIFF")) == (255, 0, 0)
    assert pixel(saved(Image.new("1", (2, 2), 1))) == (255, 255, 255)
    assert pixel(saved(Image.new("L", (2, 2), 77))) == (77, 77, 77)
    with pytest.raises(PictureError, match="colour space LAB"):
        open_picture(Image.new("LAB", (1, 1)))


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    whole = png(200, 200, "blue")
    for name, data in (("cut.png", whole[: len(whole) // 2]), ("empty.png", b""), ("text.png", b"no picture")):
        (tmp_path / name).write_bytes(data)
    for name in ("cut.png", "empty.png", "text.png", "gone.png", "nul\0.png", "", "half\ud800.png"):
        with pytest.raises(PictureError) as caught:
            open_picture(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1


def test_a_cut_picture_is_refused_in_every_thread_whatever_others_have_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    whole, taken = png(200, 200, "blue"), []

    def read() -> None:
        for _ in range(20):
            try:
                open_picture(whole[: len(whole) // 2])
                taken.append(1)
            except PictureError:
                pass

    threads = [threading.Thread(target=read) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not taken
    assert ImageFile.LOAD_TRUNCATED_IMAGES
    with whole_images(), whole_images():
        assert not ImageFile.LOAD_TRUNCATED_IMAGES
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_pictures_of_a_document_go_through_the_door_before_its_task_converts_them() -> None:
    document = {"image": grey([65535, 32768], "uint16"), "more": [Image.new("RGBA", (1, 1))], "question": "what?"}
    found = open_pictures_in(document)
    assert found["image"].convert("RGB").getpixel((1, 0)) == (128, 128, 128)
    assert found["more"][0].convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    assert found["question"] == "what?"


def test_nothing_else_opens_a_picture_or_makes_one_rgb() -> None:
    found = []
    for folder in ("vtprune", "adapters", "evals", "assets"):
        for path in (ROOT / folder).rglob("*.py"):
            if path == ROOT / "vtprune" / "loading" / "pictures.py":
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    opens = node.func.attr == "open" and ast.unparse(node.func.value).endswith("Image")
                    turns = node.func.attr in ("convert", "exif_transpose")
                    found += [f"{path}:{node.lineno}"] if opens or turns else []
    assert not found
