"""Two processes share the questions of an evaluation, and find together what one finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint import random_checkpoint
from tests.evals.choices import NAME, write_choices
from vtprune.evals.lmms.table import ROWS

TASKS = ("vtprune_shapes", NAME)
# Two processes do not share three documents equally: one of them is padded.
LIMIT = 3


def run(folder: Path, name: str, *launcher: str, model_args: str = "method=fastv,keep=0.25") -> Any:
    arguments = {
        "--include_path": folder,
        "--tasks": ",".join(TASKS),
        "--limit": LIMIT,
        "--output_path": folder / name,
        "--model_args": f"pretrained={random_checkpoint()},{model_args}",
    }
    words = [str(word) for pair in arguments.items() for word in pair]
    return subprocess.run(
        [sys.executable, *launcher, "-m", "vtprune.cli", "lmms-eval", "--force_simple", "--log_samples", *words],
        env={
            **os.environ,
            "LMMS_EVAL_DATASETS_CACHE": str(folder / "cache"),
            "HF_DATASETS_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The numbers of each task, and each of its samples by its place."""
    (results,) = folder.rglob("*_results.json")
    numbers, samples = {}, {}
    for task in TASKS:
        found = json.loads(results.read_text())["results"][task]
        names = ("accuracy", "acc", *(name for name in ROWS if not name.endswith(("_ms", "_gib"))))
        numbers[task] = {name: found[f"{name},none"] for name in names if f"{name},none" in found}
        (path,) = folder.rglob(f"*_samples_{task}.jsonl")
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        samples[task] = {line["doc_id"]: line["filtered_resps"] for line in lines}
        assert len(lines) == len(samples[task]) == LIMIT
    return numbers, samples


TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    write_choices(tmp_path, LIMIT)
    found = {}
    for name, launcher in (("one", ()), ("two", TWO)):
        done = run(tmp_path, name, *launcher)
        assert done.returncode == 0, done.stderr
        found[name] = read(tmp_path / name)
    assert "Running on rank 1" in done.stderr + done.stdout
    numbers, samples = found["one"]
    for task in TASKS:
        assert len(numbers[task]) == 7
        assert found["two"][0][task] == pytest.approx(numbers[task])
    assert found["two"][1]["vtprune_shapes"] == samples["vtprune_shapes"]
    for place, choices in samples[NAME].items():
        for mine, theirs in zip(choices, found["two"][1][NAME][place], strict=True):
            assert mine == pytest.approx(theirs)


@pytest.mark.slow
def test_a_process_that_fails_ends_all_of_them(tmp_path: Path) -> None:
    write_choices(tmp_path, LIMIT)
    done = run(tmp_path, "out", *TWO, model_args="method=gird")
    assert done.returncode != 0
    assert "unknown pruner 'gird'" in done.stderr
