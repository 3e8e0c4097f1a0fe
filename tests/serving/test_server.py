"""`vtprune serve` under many clients: every answer is the one that the request gets alone, whatever others send."""

from __future__ import annotations

import base64
import json
import os
import random
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.serving.cases import LLAVA, write_pictures
from tests.serving.test_served import PYTHON, pytestmark  # noqa: F401

CLIENTS, REQUESTS, DISTINCT = 16, 300, 24
MOST = 72
START_SECONDS = 1200
METHODS = [
    None,
    {"method": "grid", "keep": 20},
    {"method": "pool", "keep": 36},
    {"method": "fopru", "keep": 0.5},
    {"method": "holov", "keep": 30},
    {"method": "cdpruner", "keep": 24},
    {"method": "divprune", "keep": 12},
    {"method": "visionzip", "keep": 28},
    {"method": "vispruner", "keep": 16},
]


class Server:
    """A running server: what it is asked, and what it answers."""

    def __init__(self, port: int) -> None:
        self.port = port

    def ask(self, body: dict[str, Any]) -> tuple[int, Any]:
        """The status and the answer to a request."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/chat/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"{}")

    def says(self, body: dict[str, Any]) -> tuple[str, int]:
        """The text of an answer, and how many tokens its prompt had."""
        status, found = self.ask(body)
        assert status == 200, found
        return found["choices"][0]["message"]["content"], found["usage"]["prompt_tokens"]

    def leave(self, body: dict[str, Any]) -> None:
        """Sends a request and hangs up."""
        text = json.dumps(body).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(text)}\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            connection.sendall(head.encode() + text)


def body_of(question: str, picture: bytes, method: dict[str, Any] | None) -> dict[str, Any]:
    """A chat request with a picture, and with a method of its own."""
    url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    found: dict[str, Any] = {"messages": [{"role": "user", "content": content}], "max_tokens": 8, "temperature": 0}
    return found if method is None else {**found, "mm_processor_kwargs": {"vtprune": method}}


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    command = [
        PYTHON, "-m", "vtprune.cli", "serve", str(LLAVA), "--method", "divprune", "--keep", "36", "--most", str(MOST),
        "--trust-request-mm-kwargs", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32",
        "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "8", "--block-size", "32",
    ]  # fmt: skip
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env={**os.environ, **quiet, "HF_HUB_OFFLINE": "1"},
            start_new_session=True,
        )
    try:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                time.sleep(2)
        yield Server(port)
        assert process.poll() is None, log.read_text()[-3000:]
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def bodies(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Different requests: pictures, questions, methods and keeps."""
    rows = write_pictures(tmp_path_factory.mktemp("pictures"), 8)
    return [
        body_of(rows[n % 8]["question"], Path(rows[n % 8]["picture"]).read_bytes(), METHODS[n % len(METHODS)])
        for n in range(DISTINCT)
    ]


def test_every_answer_among_many_is_the_one_alone(server: Server, bodies: list[dict[str, Any]]) -> None:
    alone = [server.says(body) for body in bodies]
    assert (alone[0][0].strip(), alone[0][1]) == ("h", 47)
    order = [number % DISTINCT for number in range(REQUESTS)]
    random.Random(0).shuffle(order)
    broken = {**bodies[0], "messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,bm90IGEgcGljdHVyZQ=="}},
        {"type": "text", "text": "what?"},
    ]}]}  # fmt: skip

    def ask(turn: int) -> tuple[str, int]:
        if turn % 30 == 7:
            server.leave(bodies[turn % DISTINCT])
        if turn % 30 == 17:
            assert server.ask(broken)[0] == 400
        return server.says(bodies[order[turn]])

    start = time.monotonic()
    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(ask, range(REQUESTS)))
    print(f"{REQUESTS} requests of {CLIENTS} clients in {time.monotonic() - start:.0f} s")
    assert answers == [alone[number] for number in order]


@pytest.mark.parametrize(
    ("method", "why"),
    [
        ({"method": "fastv"}, "fastv cannot be served: it acts inside the decoder"),
        (
            {"method": "none"},
            f"none keeps 144 tokens of an image of 144, and the server was started for at most {MOST}",
        ),
        ({"method": "grid", "keep": -1}, "keep takes a count"),
        ({"method": "divprune", "steps": 3}, "no option steps"),
        ("divprune", "a request says"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(
    server: Server, bodies: list[dict[str, Any]], method: Any, why: str
) -> None:
    status, found = server.ask({**bodies[0], "mm_processor_kwargs": {"vtprune": method}})
    assert status == 400, found
    assert why in json.dumps(found)


def test_a_prompt_that_is_too_long_harms_no_other(server: Server, bodies: list[dict[str, Any]]) -> None:
    long = json.loads(json.dumps(bodies[0]))
    long["messages"][0]["content"][1]["text"] = "what is written? " * 400
    assert server.ask(long)[0] == 400
    assert server.says(bodies[0])[1] == 47
