"""One page that is served for a module of tests, and clients for programs."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vtprune.assets import TINY_LLAVA
from vtprune.evals.demo.models import Models, load_models
from vtprune.evals.demo.server import Options, served


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@pytest.fixture(scope="session")
def models() -> Models:
    return load_models([str(TINY_LLAVA)])


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with served(Options(port=free_port(), queue=64)) as found:
        yield found.rstrip("/")


@pytest.fixture(scope="module")
def client(address: str) -> Any:
    from gradio_client import Client

    return Client(address, verbose=False)


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """A page of a desktop's size; an error in its scripts fails the test."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    page.wait_for_selector("#picture img")
    yield page
    page.close()
    assert not errors


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Where screenshots go."""
    return Path(os.environ.get("VTPRUNE_PICTURES", tmp_path))
