"""The `vtprune lmms-eval` command."""

from __future__ import annotations

import typer

from vtprune.console.output import one_line_errors

SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def lmms_eval(context: typer.Context) -> None:
    """Run lmms-eval with vtprune's model and tasks; its own options all work, --help among them.

    As python -m lmms_eval eval, but the bundled tasks are found, --model is vtprune unless another one is named, and
    a run that failed ends with a status that says so.

    Example: vtprune lmms-eval --model_args method=flowcut,keep=0.25 --tasks vtprune_shapes --limit 50
    """
    with one_line_errors(traceback=False):
        from vtprune.evals.lmms.command import run_lmms_eval

        run_lmms_eval(context.args)
