"""Training goes on from a folder's weights with other options of its method, as CoViPAL's second stage does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from vtprune.cli.app import app
from vtprune.method.config import WEIGHTS_NAME, load_config


def train(*arguments: str) -> str:
    common = ("--train", "routers", "--steps", "1", "--batch-size", "2", "--router-lr", "1e-9")
    done = CliRunner().invoke(app, ["train", *arguments, *common])
    return "" if done.exit_code == 0 else done.output


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "guided"
    assert not train("covipal", "--set", "stage=guide,width=16,heads=2", "--output", str(folder))
    return folder


def test_a_second_stage_starts_from_the_weights_of_the_first(guided: Path, tmp_path: Path) -> None:
    assert not train(str(guided), "--set", "stage=task", "--output", str(tmp_path / "task"))
    first, second = load_config(guided), load_config(tmp_path / "task")
    assert (first.stage, second.stage) == ("guide", "task")
    assert (first.width, second.width) == (16, 16)
    before, after = (load_file(folder / WEIGHTS_NAME) for folder in (guided, tmp_path / "task"))
    # A step at this rate moves nothing that can be seen.
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, atol=1e-6, rtol=0)
    assert load_config(guided) == first


@pytest.mark.parametrize(
    ("options", "reason"), [("width=32", "another shape"), ("stag=task", "did you mean stage"), ("stage=no", "stage")]
)
def test_options_that_the_weights_do_not_fit_are_refused(
    guided: Path, tmp_path: Path, options: str, reason: str
) -> None:
    said = train(str(guided), "--set", options, "--output", str(tmp_path / "task"))
    assert reason in said
    assert reason != "another shape" or str(guided) in said
