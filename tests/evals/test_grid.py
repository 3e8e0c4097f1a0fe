"""Runs that share a results folder: each cell is made once, and nothing that a run leaves behind is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint import random_checkpoint
from tests.evals.test_bench import numbers, read
from vtprune.errors import RunError
from vtprune.evals.bench import grid
from vtprune.evals.bench.grid import Listener, work_through
from vtprune.evals.bench.results import Results
from vtprune.evals.settings import DOWNSCALE, UNPRUNED, Setting

CONFIG = {"model": "m", "code": "c"}
SETTINGS = [Setting(UNPRUNED), *(Setting("grid", keep) for keep in range(1, 8))]
QUESTIONS = [{"doc_id": 0}]
HOLD = """
import sys, time
from pathlib import Path
from vtprune.files import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def record(setting: Setting) -> dict[str, Any]:
    score = {"name": "t", "task": "t", "metric": "accuracy", "value": 0.5, "stderr": None}
    return {
        "method": setting.method,
        "label": setting.label,
        "keep": setting.keep,
        "scores": [score],
        "tokens": {"before": 4.0, "kept": 1.0},
        "flops": {"share": 0.5, "scoring_share": 0.0},
        "kv": {"share": 0.5, "end_share": 0.5},
        "prefill": {"ms": 1.0, "ratio": 1.0, "over_scoreless_ms": None},
    }


class Run:
    """A run that writes down what it made, and what it was told."""

    def __init__(self, folder: Path, seconds: float = 0.0) -> None:
        self.results, self.seconds = Results(folder, CONFIG, resume=True), seconds
        self.made: list[Setting] = []
        self.by_others: list[Setting] = []
        self.said: list[str] = []

    def make(self, setting: Setting) -> dict[str, Any]:
        time.sleep(self.seconds)
        self.made.append(setting)
        self.results.set(setting.key(), record(setting), QUESTIONS)
        return record(setting)

    def work(self, settings: list[Setting] = SETTINGS) -> None:
        def ended(setting: Setting, found: dict[str, Any] | None) -> None:
            self.by_others += [setting] if found is None else []

        work_through(settings, self.results, self.make, Listener(lambda setting: None, ended, self.said.append))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "POLL", 0.05)
    monkeypatch.delenv("RANK", raising=False)


def in_file(folder: Path) -> list[str]:
    data: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return list(data["settings"])


def test_runs_that_share_a_folder_make_each_cell_once_and_each_ends_with_all_of_them(tmp_path: Path) -> None:
    runs = [Run(tmp_path, seconds=0.02) for _ in range(3)]
    threads = [threading.Thread(target=run.work) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    keys = sorted(setting.key() for setting in SETTINGS)
    assert Counter(setting.key() for run in runs for setting in run.made) == Counter(keys)
    assert sorted(in_file(tmp_path)) == keys
    for run in runs:
        assert sorted(run.results.settings) == keys
        assert sorted(setting.key() for setting in [*run.made, *run.by_others]) == keys


def test_grids_of_other_methods_add_to_the_same_file(tmp_path: Path) -> None:
    first, second = Run(tmp_path), Run(tmp_path)
    first.work(SETTINGS[:3])
    second.work([SETTINGS[0], SETTINGS[5]])
    assert in_file(tmp_path) == [setting.key() for setting in [*SETTINGS[:3], SETTINGS[5]]]
    assert second.made == [SETTINGS[5]]
    first.results.save()
    assert len(in_file(tmp_path)) == 4


def test_what_a_killed_run_held_is_taken_over(tmp_path: Path) -> None:
    run = Run(tmp_path)
    cell = run.results.cell(SETTINGS[2]).folder
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(cell)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline().strip() == "held"
    working = threading.Thread(target=run.work)
    working.start()
    while len(run.made) < len(SETTINGS) - 1 or not run.said:
        time.sleep(0.01)
    assert SETTINGS[2] not in run.made
    assert run.said == [f"waiting for what other runs into {tmp_path} are making: 1 of the settings"]
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    working.join(timeout=60)
    assert run.made[-1] == SETTINGS[2]
    assert sorted(in_file(tmp_path)) == sorted(setting.key() for setting in SETTINGS)


def test_what_a_run_that_was_killed_behind_its_record_left_is_removed(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.make(SETTINGS[0])
    cell = run.results.cell(SETTINGS[0])
    cell.folder.mkdir(parents=True)
    cell.answers.write_text("{}")
    run.work()
    assert run.made == SETTINGS
    assert not cell.answers.exists()


def test_a_launchers_other_processes_end_when_nothing_is_left_to_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    run = Run(tmp_path)
    with run.results.cell(SETTINGS[0]).claimed() as mine:
        assert mine
        run.work()
    assert run.made == SETTINGS[1:]


def test_a_run_whose_results_were_begun_afresh_by_another_one_brings_nothing_back(tmp_path: Path) -> None:
    Run(tmp_path).make(SETTINGS[0])
    old = Run(tmp_path)
    afresh = Results(tmp_path, CONFIG, resume=False)
    assert afresh.moved is not None
    with pytest.raises(RunError, match="another one has begun it afresh"):
        old.make(SETTINGS[1])
    with pytest.raises(RunError, match="another one has begun it afresh"):
        old.results.save()
    afresh.join()
    assert in_file(tmp_path) == []
    other = Run(tmp_path)
    other.make(SETTINGS[2])
    afresh.set(SETTINGS[3].key(), record(SETTINGS[3]), QUESTIONS)
    assert in_file(tmp_path) == [SETTINGS[2].key(), SETTINGS[3].key()]


def test_results_of_other_code_are_never_written_over(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.make(SETTINGS[0])
    newer = Results(tmp_path, {**CONFIG, "code": "newer"}, resume=True)
    newer.set(SETTINGS[1].key(), record(SETTINGS[1]), QUESTIONS)
    with pytest.raises(RunError, match="another one has begun it afresh"):
        run.make(SETTINGS[2])
    assert in_file(tmp_path) == [SETTINGS[1].key()]


def test_results_say_every_command_that_added_to_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in range(2):
        monkeypatch.setattr(sys, "argv", ["bench", str(place)])
        Run(tmp_path).make(SETTINGS[place])
    assert json.loads((tmp_path / "results.json").read_text())["commands"] == ["bench 0", "bench 1"]


@pytest.mark.parametrize(("told", "expected"), [({}, 0), ({"RANK": "1"}, 0), ({"RANK": "x", "WORLD_SIZE": "2"}, 0)])
def test_only_a_launcher_makes_another_process_than_the_first(
    told: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert grid.rank() == expected


def test_smaller_pictures_wait_for_the_pictures_as_they_were(tmp_path: Path) -> None:
    run = Run(tmp_path)
    smaller, plain = Setting(DOWNSCALE, 0.5), Setting(UNPRUNED)
    run.work([smaller, plain])
    assert run.made == [plain, smaller]
    assert in_file(tmp_path) == [plain.key(), smaller.key()]


def test_a_setting_that_was_asked_other_questions_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.make(SETTINGS[0])
    with pytest.raises(RunError, match="other questions than the ones before it"):
        run.results.set(SETTINGS[1].key(), record(SETTINGS[1]), [{"doc_id": 5}])


WORDS = ["--methods", "grid,random,fopru,flowcut", "--keep", "50%,25%,11%", "--limit", "8", "--batch-size", "4"]


def command(output: Path, *launcher: str) -> list[str]:
    checkpoint = str(random_checkpoint())
    return [*launcher, "vtprune.cli", "bench", "--model", checkpoint, "--output", str(output), *WORDS]


def environment(tmp_path: Path) -> dict[str, str]:
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    return {**os.environ, **offline, "LMMS_EVAL_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_a_grid_that_is_killed_twice_and_then_run_by_two_processes_is_the_grid_of_one(tmp_path: Path) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    python = (sys.executable, "-m")
    subprocess.run(command(alone, *python), env=environment(tmp_path), check=True, capture_output=True)
    for cells in (2, 6):
        process = subprocess.Popen(command(shared, *python), env=environment(tmp_path), stdout=subprocess.DEVNULL)
        while len(list(shared.glob("cells/*/metrics.json"))) < cells:
            time.sleep(0.05)
            assert process.poll() is None
        process.kill()
        process.wait()
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m")
    found = subprocess.run(command(shared, *launcher), env=environment(tmp_path), capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert list(read(shared)["settings"]) == list(read(alone)["settings"])
    assert len(read(shared)["settings"]) == 13
    assert numbers(read(shared)) == numbers(read(alone))
    assert read(shared)["questions"] == read(alone)["questions"]
    assert not list(shared.rglob("answers.jsonl"))
    assert found.stdout.count("running ") == 1
    assert "2 processes shared the machine" in (shared / "table.md").read_text()
