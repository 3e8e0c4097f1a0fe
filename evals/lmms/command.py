"""lmms-eval's own command, with vtprune's model and tasks known to it, and a status that says whether it worked."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from vtprune.console.output import is_quiet, is_verbose
from vtprune.errors import InputError, RunError, VTPruneError, first_line
from vtprune.evals.lmms.plugin import TASK_FOLDER

# What needs no task, since it says something and stops, or names its tasks in a file.
WITHOUT_TASKS = ("--config", "--help", "-h")
# How lmms-eval refuses, to a chat model, a task that asks for likelihoods.
GENERATES_ONLY = "Currently messages is used for generation only"


def run_lmms_eval(arguments: Sequence[str]) -> None:
    """Runs `lmms-eval eval` with these arguments.

    The model is vtprune unless they name another one; the bundled tasks are found beside those of `--include_path`.
    Raises InputError where no task is named, and RunError where an evaluation failed (lmms-eval itself prints the
    error, and ends as if nothing had happened).
    """
    words = list(arguments[1:] if arguments[:1] == ["eval"] else arguments)
    if not _given(words, "--tasks", *WITHOUT_TASKS):
        raise InputError("lmms-eval: --tasks names what to ask, as --tasks vtprune_shapes; --tasks list shows all")
    if not _given(words, "--model", "--config"):
        words = ["--model", "vtprune", *words]
    if (is_quiet() or is_verbose()) and not _given(words, "--verbosity"):
        words += ["--verbosity", "ERROR" if is_quiet() else "DEBUG"]
    from lmms_eval import __main__ as command

    failed: list[Exception] = []
    single = command.cli_evaluate_single

    def noted(args: Any) -> Any:
        given = args.include_path
        args.include_path = [str(TASK_FOLDER), *([given] if isinstance(given, str) else given or [])]
        try:
            return single(args)
        except Exception as error:
            failed.append(error)
            raise

    before, sys.argv = sys.argv, ["lmms-eval", *words]
    command.cli_evaluate_single = noted
    try:
        command.cli_evaluate(argparse.Namespace())
    finally:
        sys.argv, command.cli_evaluate_single = before, single
    if failed:
        if GENERATES_ONLY in str(failed[0]):
            raise InputError(
                "the evaluation failed: a task asks how likely given answers are, and lmms-eval hands such tasks to a "
                "model under --force_simple alone"
            )
        kind = "" if isinstance(failed[0], VTPruneError) else f"{type(failed[0]).__name__}: "
        raise RunError(f"the evaluation failed: {kind}{first_line(failed[0])}")


def _given(words: Sequence[str], *names: str) -> bool:
    return any(word.partition("=")[0] in names for word in words)
