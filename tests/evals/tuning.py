"""What the tests of the search share: the command, its file, and an environment of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from vtprune.cli.app import app

SMALL = ("--samples", "3", "--check-samples", "2")
KEEP = ("--keep", "15%")


@pytest.fixture(autouse=True)
def private_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))


def run(*arguments: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])


def tune(output: Path, *arguments: str | Path, method: str = "holov") -> Result:
    return run("tune", method, "--output", output, *SMALL, *arguments)


def read(output: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((output / "search.json").read_text())
    return data


def numbers(output: Path) -> list[dict[str, Any]]:
    """All of the trials but how long they took."""
    return [{name: value for name, value in trial.items() if name != "seconds"} for trial in read(output)["trials"]]


def fails(result: Result, *fragments: str, status: int = 2) -> None:
    assert result.exit_code == status, result.output
    message = result.stderr.strip()
    assert message.startswith("vtprune: ")
    assert len(message.splitlines()) == 1
    for fragment in fragments:
        assert fragment in message
