"""`vtprune report`: from folders to report.html and report.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from vtprune.console.output import notice
from vtprune.errors import InputError
from vtprune.evals.report.content import Report, make_report
from vtprune.evals.report.reading import read_all
from vtprune.evals.report.writing import render_html, render_markdown
from vtprune.files import held, write_text

PAGE, MARKDOWN = "report.html", "report.md"


def run_report(places: Sequence[Path], output: Path, console: Console) -> Report:
    """Writes both files, names on the console what could not be read, and returns the content.

    Raises RunError where nothing could be read, before anything is written, InputError without scipy, and WriteError.
    """
    _require_scipy()
    found = read_all(places)
    report = make_report(found)
    with held(output):
        write_text(output / PAGE, render_html(report))
        write_text(output / MARKDOWN, render_markdown(report))
    for line in report.broken:
        console.print(f"left out: {line}", highlight=False, markup=False, soft_wrap=True)
    runs, groups = sum(len(group.runs) for group in found.groups), len(found.groups)
    notice(
        console,
        f"{runs} {'run' if runs == 1 else 'runs'} in {groups} {'part' if groups == 1 else 'parts'}; "
        f"wrote {output / PAGE}, {output / MARKDOWN}",
    )
    return report


def _require_scipy() -> None:
    try:
        import scipy.stats  # noqa: F401
    except ImportError as error:
        raise InputError(f"scipy cannot be imported ({error}); pip install 'vtprune[eval]'") from error
