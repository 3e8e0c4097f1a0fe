"""The page as programs, and people with bad intentions, see it."""

from __future__ import annotations

import json
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from tests.clips import write_clip
from tests.evals.demo.conftest import free_port
from vtprune.assets import EXAMPLE_IMAGE, SHAPES_EVAL
from vtprune.errors import InputError
from vtprune.evals.demo.asking import ask
from vtprune.evals.demo.models import Models
from vtprune.evals.demo.options import choosable, chosen
from vtprune.evals.demo.server import Options, served
from vtprune.evals.settings import Setting
from vtprune.loading.pictures import read_image
from vtprune.shapes.dataset import read_eval_rows

QUESTION = "what is written on the yellow square?"
PATHS = ("/etc/passwd", "../../etc/passwd", "file:///etc/passwd", "C:\\Windows\\win.ini")
GIVEN: dict[str, Any] = {"text": QUESTION, "name": "tiny-llava", "how": "fopru", "share": 25, "extra": ""}


def answers(client: Client, picture: Path | str, **changes: Any) -> list[str]:
    """The unpruned and the pruned answer."""
    given = {**GIVEN, **changes}
    found = client.predict(handle_file(str(picture)), *given.values(), api_name="/answer")
    return [one["answer"]["text"].strip() for one in found["answers"]]


def alone(models: Models, picture: Path, text: str, how: str, share: float) -> list[str]:
    """The same by itself, without a server."""
    settings = [Setting("none"), chosen(models["tiny-llava"], how, share)]
    for now in ask(
        models, "tiny-llava", read_image(picture), text, settings=settings, labels=["unpruned", "pruned"], timed=False
    ):
        last = now
    return [one.answer.text.strip() for one in last.finished]


def test_the_health_address_names_the_models(address: str) -> None:
    with urllib.request.urlopen(f"{address}/health") as answer:
        found = json.load(answer)
    assert found == {"status": "ok", "models": ["tiny-llava", "tiny-qwen", "tiny-llava-pmod"], "answering": 0}


def test_a_request_leaves_a_line_that_does_not_tell_the_question(client: Client, caplog: Any) -> None:
    with caplog.at_level(logging.INFO, logger="vtprune.demo"):
        assert answers(client, EXAMPLE_IMAGE) == ["h", "h"]
    lines = [record.getMessage() for record in caplog.records if record.name == "vtprune.demo"]
    assert len(lines) == 1
    assert lines[0].startswith("answer model=tiny-llava method=fopru keep=25% options=-: done in ")
    assert "yellow" not in lines[0]


def ask_at_once(address: str, models: Models, folder: Path, visitors: int, requests: int) -> list[str]:
    """Which of the requests of visitors, each with pictures, a method and a keep of its own, were not answered as one
    alone would be."""
    rows, methods = read_eval_rows(SHAPES_EVAL), choosable()
    cases = []
    for number in range(requests):
        row = rows[(7 * number) % len(rows)]
        path = folder / f"{number}.png"
        path.write_bytes(row.image)
        cases.append((path, row.question, methods[number % len(methods)], 20 + 5 * (number % 14)))
    expected = [alone(models, *case) for case in cases]
    clients = [Client(address, verbose=False) for _ in range(visitors)]
    found: list[Any] = [None] * requests

    def visit(visitor: int) -> None:
        for number in range(visitor, requests, visitors):
            path, text, how, share = cases[number]
            found[number] = answers(clients[visitor], path, text=text, how=how, share=share)

    with ThreadPoolExecutor(visitors) as pool:
        list(pool.map(visit, range(visitors)))
    return [
        f"{case[1:]}: {own} for {right}"
        for case, own, right in zip(cases, found, expected, strict=True)
        if own != right
    ]


def test_visitors_with_different_methods_do_not_mix(address: str, models: Models, tmp_path: Path) -> None:
    assert ask_at_once(address, models, tmp_path, visitors=3, requests=7) == []


@pytest.mark.slow
def test_sixteen_visitors_ask_two_hundred_times(address: str, models: Models, tmp_path: Path) -> None:
    assert ask_at_once(address, models, tmp_path, visitors=16, requests=200) == []


def bomb(path: Path) -> None:
    """400 million pixels in less than 100 kB."""
    Image.new("1", (20_000, 20_000)).save(path)


def large(path: Path) -> None:
    """More pixels than the page takes, and fewer than PIL does."""
    Image.new("1", (8_000, 6_000)).save(path)


def icon(path: Path) -> None:
    """A format that holds pictures of its own, of any size."""
    Image.new("RGB", (64, 64)).save(path, format="ICO")


def text_file(path: Path) -> None:
    path.write_text("this is no picture")


def cut_short(path: Path) -> None:
    path.write_bytes(EXAMPLE_IMAGE.read_bytes()[:500])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (bomb, "400000000 pixels"),
        (large, "8,000 x 6,000 pixels, and at the most 40,000,000 are taken"),
        (icon, "cannot identify image file"),
        (text_file, "cannot identify image file"),
        (cut_short, "cannot read the picture"),
    ],
)
def test_what_is_no_picture_is_refused_in_a_sentence(
    client: Client, tmp_path: Path, make: Callable[[Path], None], reason: str
) -> None:
    path = tmp_path / "picture.png"
    make(path)
    with pytest.raises(AppError, match=reason) as caught:
        answers(client, path)
    assert "/tmp" not in str(caught.value)


def test_animations_and_deep_and_transparent_pictures_are_seen_as_a_viewer_shows_them(
    client: Client, tmp_path: Path
) -> None:
    plain = Image.open(EXAMPLE_IMAGE).convert("RGB")
    turned, animated, deep, clear = (tmp_path / name for name in ("t.jpg", "a.gif", "d.png", "c.png"))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter when it is shown
    plain.transpose(Image.Transpose.ROTATE_90).save(turned, exif=exif, quality=98)
    plain.save(animated, save_all=True, append_images=[Image.new("RGB", plain.size)])
    Image.fromarray(np.asarray(plain.convert("L"), dtype=np.uint16) * 257).save(deep)
    plain.convert("RGBA").save(clear)
    for path in (turned, animated, deep, clear):
        assert answers(client, path, text="what is written on the yellow square?")[0] in ("h", "7"), path
    assert answers(client, turned) == answers(client, clear) == answers(client, EXAMPLE_IMAGE)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"text": ""}, "question: write a question"),
        ({"text": None}, "question: write a question"),
        ({"name": None}, "model: this page has tiny-llava"),
        ({"how": None}, "method: choose one of"),
        ({"how": ["fopru"]}, "method: choose one of"),
        ({"share": None}, "keep: "),
        ({"text": "why " * 25_000}, "question: at the most 2,000 characters"),
        ({"text": "what is <image> here?"}, "reads as the place of a picture"),
        ({"name": "/etc/passwd"}, "model: this page has tiny-llava"),
        ({"share": 0}, "keep: "),
        ({"share": 101}, "keep: "),
        ({"share": "25"}, "keep: "),
        ({"extra": "seed=3"}, "seed"),
        ({"extra": "clip=/etc/passwd", "how": "cdpruner"}, "'clip' is not chosen here"),
        ({"extra": "keep=3"}, "'keep' is not chosen here"),
        ({"extra": "softmax"}, "give name=value"),
        ({"extra": "softmax=True," * 100}, "at the most 500 characters"),
        *(({"how": path}, "method: choose one of") for path in PATHS),
        ({"how": "visionzip:keep=4+fastv"}, "method: choose one of"),
        ({"how": "covipal"}, "method: choose one of"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_cannot_be_asked_is_refused_in_a_sentence(client: Client, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(AppError, match=reason) as caught:
        answers(client, EXAMPLE_IMAGE, **changes)
    assert "Traceback" not in str(caught.value)


def test_a_question_that_looks_like_a_path_is_a_question(client: Client) -> None:
    for path in PATHS:
        assert len(answers(client, EXAMPLE_IMAGE, text=path)) == 2


@pytest.mark.parametrize(
    "place",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=../../../etc/passwd",
        "/gradio_api/file=file:///etc/passwd",
        "/gradio_api/file=pyproject.toml",
        f"/gradio_api/file={SHAPES_EVAL}",
        "/file=/etc/passwd",
        "/static/../../etc/passwd",
    ],
)
def test_no_address_opens_a_file_of_the_server(address: str, place: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{address}{place}")
    assert caught.value.code in (403, 404)


def told(address: str, picture: Any, place: str = "answer", video: Any = None, **changes: Any) -> str:
    """What the server answers to a request that no client would make."""
    payload = {"data": [picture, *{**GIVEN, **changes}.values(), video]}
    request = urllib.request.Request(
        f"{address}/gradio_api/call/{place}", json.dumps(payload).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request) as answer:
            event = json.load(answer)["event_id"]
        with urllib.request.urlopen(f"{address}/gradio_api/call/{place}/{event}", timeout=20) as answer:
            found: str = answer.read().decode()
    except urllib.error.HTTPError as error:
        return f"event: error {error.code}"
    return found


@pytest.mark.parametrize("meta", [{"meta": {"_type": "gradio.FileData"}}, {"meta": {"_type": "x"}}, {}], ids=str)
def test_a_picture_cannot_be_named_that_was_not_uploaded(address: str, tmp_path: Path, meta: dict[str, Any]) -> None:
    secret, pipe = tmp_path / "secret.png", tmp_path / "pipe"
    secret.write_bytes(EXAMPLE_IMAGE.read_bytes())
    os.mkfifo(pipe)
    answers = {told(address, {"path": str(path), **meta}) for path in (secret, pipe, tmp_path, "/etc/passwd", "/none")}
    assert all("event: error" in answer for answer in answers)
    # Whether a file is there cannot be told either.
    assert len(answers) == 1 or "gradio.FileData" in str(meta)


@pytest.mark.parametrize("meta", [{"meta": {"_type": "gradio.FileData"}}, {}], ids=str)
def test_a_video_cannot_be_named_that_was_not_uploaded(address: str, tmp_path: Path, meta: dict[str, Any]) -> None:
    secret, pipe = write_clip(tmp_path / "secret.mp4"), tmp_path / "pipe.mp4"
    os.mkfifo(pipe)
    names = (secret, pipe, tmp_path, "/etc/passwd", "/none")
    answers = {told(address, None, video={"path": str(path), **meta}) for path in names}
    assert all("event: error" in answer for answer in answers)
    assert not any("llava takes images" in answer for answer in answers), "it was opened"


def test_a_line_of_the_log_is_one_line_of_plain_text(client: Client, caplog: Any) -> None:
    with caplog.at_level(logging.INFO, logger="vtprune.demo"), pytest.raises(AppError):
        answers(client, EXAMPLE_IMAGE, how="flowcut\x1b[31m\nred")
    (line,) = [record.getMessage() for record in caplog.records if record.name == "vtprune.demo"]
    assert line.isprintable()


def test_who_comes_when_the_queue_is_full_is_told_so_and_nobody_else_is_lost(tmp_path: Path) -> None:
    with served(Options(models=(), port=free_port(), queue=4, workers=1)) as address:
        client = Client(address, verbose=False)
        jobs = [client.submit(handle_file(str(EXAMPLE_IMAGE)), *GIVEN.values(), api_name="/answer") for _ in range(50)]
        errors = [job.exception(120) for job in jobs]
        found = [job.result() for job, error in zip(jobs, errors, strict=True) if error is None]
    full = [str(error) for error in errors if error is not None]
    assert all("Queue is full" in message for message in full)
    assert full
    assert len(found) >= 4
    assert [[one["answer"]["text"].strip() for one in each["answers"]] for each in found] == [["h", "h"]] * len(found)


def test_a_port_that_is_taken_is_named(address: str) -> None:
    port = int(address.rsplit(":", 1)[1])
    with pytest.raises(InputError, match=f"port: {port} on 127.0.0.1 cannot be had"), served(Options(port=port)):
        pass


def test_the_folder_is_gone_when_the_page_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with served(Options(port=free_port())) as address:
        assert answers(Client(address, verbose=False), EXAMPLE_IMAGE) == ["h", "h"]
        assert [path.name.startswith("vtprune-demo-") for path in tmp_path.iterdir()] == [True]
    assert list(tmp_path.iterdir()) == []
