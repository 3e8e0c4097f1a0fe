"""Working through a grid's cells, beside whoever else does."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vtprune.evals.bench.results import Results
from vtprune.evals.settings import DOWNSCALE, UNPRUNED, Setting

# Seconds between two looks at cells that others hold.
POLL = 1.0
# What torchrun and accelerate launch tell their processes.
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def rank() -> int:
    """Which of a launcher's processes this is (torchrun, accelerate launch); 0 without one."""
    return _number("RANK", 0) if _number("WORLD_SIZE", 1) > 1 else 0


def _number(name: str, otherwise: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else otherwise


def beside() -> dict[str, int]:
    """How many processes of the launcher share this machine, where there are several: they disturb each other's
    times."""
    processes = _number("LOCAL_WORLD_SIZE", 1)
    return {"processes": processes} if processes > 1 else {}


@contextmanager
def alone() -> Iterator[None]:
    """Hides a launcher from lmms-eval, which would share the questions of a task among its processes: here these
    share the cells."""
    hidden = {name: os.environ.pop(name) for name in LAUNCHER if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


@dataclass(frozen=True)
class Listener:
    """Who hears of a grid: that a cell is begun, what came of one (None: another run made it), and what it waits
    for."""

    begun: Callable[[Setting], None]
    ended: Callable[[Setting, dict[str, Any] | None], None]
    say: Callable[[str], None]


def work_through(
    settings: Sequence[Setting], results: Results, run: Callable[[Setting], dict[str, Any] | None], told: Listener
) -> None:
    """Runs every setting that is not in `results` and that no other process has taken; leaves out one of which `run`
    makes nothing.

    A launcher's first process, and a run that is alone, ends when all of them are there: it waits for what others
    hold, and takes over what they leave unfinished. The launcher's other processes end when nothing is left to take.
    """
    for setting in settings:
        if setting.key() in results.settings:
            results.cell(setting).tidy()
    left = [setting for setting in settings if setting.key() not in results.settings]
    waiting = False
    while left:
        taken, nothing = _pass(left, results, run, told)
        for setting in left:
            if setting.key() in results.settings and setting not in taken:
                told.ended(setting, None)
        left = [setting for setting in left if setting.key() not in results.settings and setting not in nothing]
        if taken or not left:
            continue
        if rank():
            return
        if not waiting:
            waiting = True
            told.say(f"waiting for what other runs into {results.folder} are making: {len(left)} of the settings")
        time.sleep(POLL)
        results.join()


def _pass(
    left: Sequence[Setting], results: Results, run: Callable[[Setting], dict[str, Any] | None], told: Listener
) -> tuple[list[Setting], list[Setting]]:
    """Runs those that can be taken now; answers those, and of which of them nothing came."""
    taken, nothing = [], []
    for setting in left:
        # What smaller pictures save is told beside the pictures as they were.
        if setting.method == DOWNSCALE and Setting(UNPRUNED).key() not in results.settings:
            continue
        with results.cell(setting).claimed() as mine:
            if not mine:
                continue
            results.join()
            if setting.key() in results.settings:
                continue
            told.begun(setting)
            taken.append(setting)
            record = run(setting)
            if record is None:
                nothing.append(setting)
            else:
                told.ended(setting, record)
    return taken, nothing
