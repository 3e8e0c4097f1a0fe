"""Which questions a run asks: the bundled task (or a sample of it), lmms-eval's own, or a folder's."""

from __future__ import annotations

import difflib
import glob
import hashlib
import io
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from vtprune.assets import SHAPES_EVAL, SHAPES_MORE
from vtprune.console.output import log_level
from vtprune.errors import InputError, explain
from vtprune.evals.lmms.plugin import TASK_FOLDER
from vtprune.files import write_text, write_with

# Tasks that fetch their pictures from the hub by themselves; of a file they are in a column, as those of others.
FETCHING = ("gqa",)
# Kinds of task that are answered by likelihoods.
LIKELIHOODS = ("loglikelihood", "multiple_choice")
BUNDLED_TASK = "vtprune_shapes"
# The questions of every bundled task.
BUNDLED_TASKS = {BUNDLED_TASK: SHAPES_EVAL, **{f"vtprune_{part}": path for part, path in SHAPES_MORE.items()}}


@dataclass(frozen=True)
class Suite:
    """Tasks that were found: their names, lmms-eval's index of them, and its `limit` (None: all).

    simple: whether they ask how likely given answers are, which lmms-eval asks models of its older kind alone.
    """

    tasks: tuple[str, ...]
    manager: Any
    limit: int | None
    simple: bool = False


def silence_loggers() -> None:
    """Sends only errors of lmms-eval to stderr, where the command is verbose warnings too: it logs them to stdout,
    among the results."""
    import lmms_eval.models  # noqa: F401  (it installs its own handler when imported)
    from loguru import logger

    logger.remove()
    logger.add(sys.stderr, level=log_level(), format="lmms-eval: {message}")
    logging.getLogger("datasets").setLevel(log_level())


def stratified(categories: Sequence[str], limit: int, seed: int) -> list[int]:
    """`limit` places (ascending) with the same number of each category to within one."""
    names = list(dict.fromkeys(categories))
    order = np.random.default_rng(seed).permutation(len(categories))
    queues = {name: [int(i) for i in order if categories[i] == name] for name in names}
    chosen: list[int] = []
    while len(chosen) < min(limit, len(categories)):
        for name in names:
            if queues[name] and len(chosen) < limit:
                chosen.append(queues[name].pop())
    return sorted(chosen)


def write_local(folder: Path, task: str, data: Path, manager: Any) -> None:
    """A task file of a known task's name in `folder` whose questions come from a parquet file of the same columns."""
    from lmms_eval.utils import load_yaml_config

    path = manager.task_index[task]["yaml_path"]
    split = load_yaml_config(path, mode="simple").get("test_split") or "test"
    source = {"data_files": {str(split): glob.escape(str(data.resolve()))}}
    own = {
        "include": str(path),
        "task": task,
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": source,
        **({"process_docs": None} if task in FETCHING else {}),
    }
    write_text(folder / f"{task}.yaml", yaml.safe_dump(own, sort_keys=False))


def write_sample(folder: Path, task: str, limit: int, seed: int) -> None:
    """A stratified sample of a bundled set in `folder`, and a task file of the bundled name for it."""
    import pyarrow.parquet as pq

    table = pq.read_table(BUNDLED_TASKS[task])
    rows = stratified(table.column("category").to_pylist(), limit, seed)
    write_with(folder / f"{task}.parquet", lambda part: pq.write_table(table.take(rows), part))
    write_text(
        folder / f"{task}.yaml",
        f"include: {TASK_FOLDER / task}.yaml\ntask: {task}\n"
        f"dataset_path: parquet\ndataset_kwargs:\n  data_files:\n    test: {folder / task}.parquet\n",
    )


def members(names: Sequence[str], manager: Any) -> Iterator[str]:
    """The tasks of these names, those of groups in their place."""
    from lmms_eval.utils import load_yaml_config

    for name in names:
        found = manager.task_index.get(name, {})
        if found.get("type") != "group":
            yield name
            continue
        own = load_yaml_config(found["yaml_path"], mode="simple").get("task", [])
        # What a group changes of a task is written in its place.
        yield from members([one if isinstance(one, str) else str(one.get("task", "")) for one in own], manager)


def data_fingerprint(tasks: Sequence[str], data: Path | None = None) -> str:
    """Identifies the bundled questions and those of parquet files; other tasks are known by their names."""
    found = [BUNDLED_TASKS[task] for task in tasks if task in BUNDLED_TASKS and BUNDLED_TASKS[task].is_file()]
    if data is not None:
        own = [data / f"{task}.parquet" for task in tasks if task not in BUNDLED_TASKS]
        # What has no file may be a group, whose tasks' files may be any of them.
        found += own if all(path.is_file() for path in own) else sorted(data.glob("*.parquet"))
    if not found:
        return ""
    return hashlib.sha256(b"".join(path.read_bytes() for path in found)).hexdigest()[:16]


def _find(names: Sequence[str], folders: list[str]) -> tuple[Any, list[str]]:
    """An index that holds all the names, lmms-eval's own tasks only where the folders do not have them."""
    from lmms_eval.tasks import TaskManager

    manager = TaskManager("ERROR", include_path=folders, include_defaults=False)
    if any(name not in manager.all_tasks for name in names):
        manager = TaskManager("ERROR", include_path=folders, model_name="vtprune")
        _add(manager, folders)
    return manager, [name for name in names if name not in manager.all_tasks]


def _add(manager: Any, folders: list[str]) -> None:
    """Puts the tasks of some folders in the place of those with the same names: lmms-eval itself takes its own."""
    from lmms_eval.tasks import TaskManager

    manager.task_index.update(TaskManager("ERROR", include_path=folders, include_defaults=False).task_index)


def _check_data(names: Sequence[str], manager: Any, metrics: Mapping[str, str]) -> bool:
    """Loads the data of every task, before a model is, and returns whether they ask for likelihoods; raises InputError
    that names what cannot be had, and why, a metric that its task does not have, and tasks that ask for other things
    than the rest."""
    kinds: dict[bool, str] = {}
    for name in names:
        try:
            # datasets' own progress bars go to stderr, whatever is said to it once it has been imported.
            with redirect_stderr(io.StringIO()):
                task = manager.load_task_or_group([name], "chat").get(name)
        except Exception as error:
            source = _data_set(name, manager)
            raise InputError(
                f"tasks: cannot load the data of {name}{f' ({source})' if source else ''}: {explain(error)}"
            ) from error
        if name in metrics:
            _check_metric(name, task, metrics[name])
        for one in _single_tasks(task):
            kinds.setdefault(one.OUTPUT_TYPE in LIKELIHOODS, name)
    if len(kinds) > 1:
        raise InputError(
            f"tasks: {kinds[True]} asks how likely given answers are, and {kinds[False]} for answers; run them apart"
        )
    return True in kinds


def _single_tasks(found: Any) -> Iterator[Any]:
    """A task, or all those of a group and its groups."""
    if isinstance(found, Mapping):
        for part in found.values():
            yield from _single_tasks(part)
    elif hasattr(found, "OUTPUT_TYPE"):
        yield found


def _data_set(name: str, manager: Any) -> str:
    """The data set that a task's file names, "" where it names none."""
    from lmms_eval.utils import load_yaml_config

    try:
        found = load_yaml_config(manager.task_index[name]["yaml_path"], mode="simple")
        return str(found.get("dataset_path") or "")
    except (KeyError, TypeError, OSError, ValueError, AttributeError):
        return ""


def _check_metric(name: str, task: Any, metric: str) -> None:
    """Raises InputError for a metric that a task does not have."""
    # A group has the metrics of its tasks, and some that its own functions make.
    known = list(task.aggregation()) if hasattr(task, "aggregation") else []
    if known and metric not in known:
        raise InputError(f"metric: {name} has no {metric!r}, it has {', '.join(known)}")


@contextmanager
def open_suite(
    tasks: Sequence[str],
    limit: int | None,
    seed: int,
    include_path: Path | None = None,
    *,
    data: Path | None = None,
    prompts: str | None = None,
    metrics: Mapping[str, str] | None = None,
) -> Iterator[Suite]:
    """The tasks, ready to run, and files that are gone afterwards.

    data: a folder with TASK.parquet for tasks whose data sets cannot be reached; prompts: the model whose prompts
    tasks take, where they have them; metrics: of tasks, to be checked. Raises InputError for an unknown task or
    metric, and for a task whose data cannot be loaded.

    The bundled tasks take `limit` as a stratified sample drawn with `seed`, others as their first samples.
    """
    names = tuple(dict.fromkeys(tasks))
    bundled = [name for name in names if name in BUNDLED_TASKS]
    for name in bundled:
        if not BUNDLED_TASKS[name].is_file():
            raise InputError(f"tasks: the data of {name} are missing: no file {BUNDLED_TASKS[name]}")
    if include_path is not None and not include_path.is_dir():
        raise InputError(f"include-path: {include_path} is not a folder")
    with tempfile.TemporaryDirectory(prefix="vtprune-bench-") as name:
        folder = Path(name)
        os.environ.setdefault("LMMS_EVAL_DATASETS_CACHE", str(folder / "cache"))
        if bundled and limit is not None:
            for task in bundled:
                write_sample(folder, task, limit, seed)
            folders = [name]
        else:
            folders = [str(TASK_FOLDER)]
        folders += [str(include_path)] if include_path else []
        manager, unknown = _find(names, folders)
        if data is not None and not unknown:
            singles = tuple(members(names, manager))
            local = [task for task in singles if (data / f"{task}.parquet").is_file()]
            if not local:
                raise InputError(f"data: there is none of {', '.join(f'{one}.parquet' for one in singles)} in {data}")
            (folder / "local").mkdir()
            for task in local:
                write_local(folder / "local", task, data / f"{task}.parquet", manager)
            _add(manager, [str(folder / "local")])
        if unknown:
            near = difflib.get_close_matches(unknown[0], manager.all_tasks, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise InputError(f"tasks: lmms-eval knows no task {', '.join(map(repr, unknown))}{hint}")
        manager.model_name = prompts
        yield Suite(names, manager, limit, simple=_check_data(names, manager, metrics or {}))
