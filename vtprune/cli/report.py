"""The `vtprune report` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vtprune.cli.options import Traceback
from vtprune.console.output import one_line_errors, open_console


def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            help="Folders that `vtprune bench` or lmms-eval wrote, whatever its --model; folders inside them are "
            "searched, too. With --log_samples, lmms-eval's results have paired errors.",
            metavar="RESULTS...",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder for report.html and report.md.")] = Path("report"),
    traceback: Traceback = False,
) -> None:
    """Make one page of many results: accuracy, cost, wins against dull baselines, and published numbers beside ours.

    report.html is one file that asks for nothing from any network, for a phone as for a desktop; report.md has the
    same tables. For each model and its tasks: accuracy with standard errors and the share of the unpruned score that
    is left, with the error of the paired answers; tokens, FLOPs, KV cache and prefill time; accuracy against FLOPs and
    against the cache, with the Pareto front in colour; what each category loses; each method against random, grid,
    pool and downscale at the same keep, with p-values that are corrected for the number of comparisons; what papers
    print for the same model, method and tokens, and whether it was reproduced; versions, machine, and the commands
    that measure it again.

    Runs that agree in everything that a number depends on are put together; those that differ in model, data, limit,
    seed, dtype or code are shown apart, never averaged. A folder or file that cannot be read is named in the report,
    and the others are shown; where none can be read, the status is 1.

    Example: vtprune report bench lmms-results --output report
    """
    with one_line_errors(traceback):
        from vtprune.evals.report.report import run_report

        run_report(results, output, open_console())
