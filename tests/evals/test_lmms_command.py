"""`vtprune lmms-eval` is lmms-eval's command: it finds what is bundled, and says by its status whether it worked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.checkpoint import png, write_task
from tests.evals.choices import NAME, write_choices
from vtprune.cli.app import app


def run(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vtprune.cli", "lmms-eval", *arguments],
        env={**os.environ, "LMMS_EVAL_DATASETS_CACHE": str(tmp_path / "cache")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_bundled_tasks_are_found_beside_those_of_a_folder(tmp_path: Path) -> None:
    write_task(tmp_path, "vtprune_pictures", [png(40, 30)])
    tasks = "vtprune_shapes,vtprune_pictures"
    done = run(
        tmp_path, "eval", "--tasks", tasks, "--include_path", str(tmp_path), "--limit", "2", "--model_args",
        "method=grid,keep=0.25", "--output_path", "eval",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (results,) = (tmp_path / "eval").rglob("*_results.json")
    assert set(json.loads(results.read_text())["results"]) == {"vtprune_shapes", "vtprune_pictures"}


def test_a_run_that_failed_ends_with_its_reason_and_a_status(tmp_path: Path) -> None:
    done = run(tmp_path, "--tasks", "vtprune_shapes", "--limit", "1", "--model_args=method=gird")
    assert done.returncode == 1
    assert "vtprune: the evaluation failed: unknown pruner 'gird'; did you mean 'grid'" in done.stderr


@pytest.mark.slow
def test_a_task_that_asks_for_likelihoods_says_what_it_needs(tmp_path: Path) -> None:
    write_choices(tmp_path, 1)
    done = run(tmp_path, "--tasks", NAME, "--include_path", str(tmp_path))
    assert done.returncode == 2
    assert "under --force_simple alone" in done.stderr


@pytest.mark.parametrize("arguments", [[], ["--limit", "3"]])
def test_a_run_without_a_task_is_refused(arguments: list[str]) -> None:
    done = CliRunner().invoke(app, ["lmms-eval", *arguments])
    assert done.exit_code == 2
    assert "--tasks" in done.stderr
