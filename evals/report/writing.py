"""A report's content as HTML and as Markdown; whatever comes from a file is escaped."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from vtprune.evals.report.content import Report, Section, Table
from vtprune.provenance import __version__

PACKAGE = "vtprune.evals.report"
# Okabe and Ito's blue and orange: told apart with any colour vision, on white and on black.
GAIN, LOSS = "0 114 178", "230 120 0"
SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|&~$])")


def render_html(report: Report) -> str:
    """One page that asks for nothing: its styles and pictures are in it, and no script is."""
    pages = Environment(
        loader=PackageLoader(PACKAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    css = (files(PACKAGE) / "templates" / "report.css").read_text(encoding="utf-8")
    page = pages.get_template("report.html")
    return page.render(
        report=report, css=Markup(css), svg=Markup, colour=lambda heat: GAIN if heat > 0 else LOSS, version=__version__
    )


def render_markdown(report: Report) -> str:
    """The same without the pictures."""
    return "\n\n".join(["# vtprune report", *_parts(report)]) + "\n"


def _parts(report: Report) -> Iterator[str]:
    if report.broken:
        yield "Not in this report, because it could not be read:"
        yield _list(report.broken)
    for section in report.sections:
        yield from _section(section)
    yield from (_plain(line) for line in report.notes)
    yield f"Written by vtprune {__version__}."


def _section(section: Section) -> Iterator[str]:
    yield f"## {_plain(section.title)}"
    yield _plain(section.subtitle)
    yield from (_plain(line) for line in section.lead)
    for table in section.tables:
        yield f"### {_plain(table.title)}"
        yield _table(table)
        if table.note:
            yield _plain(table.note)
    if section.notes:
        yield "### Notes"
        yield _list(section.notes)
    yield "### Where it comes from"
    yield "\n".join(f"- {name}: {_plain(text)}" for name, text in section.facts)
    if section.commands:
        yield "To measure it again:"
        yield "\n\n".join(_code(command) for command in section.commands)


def _plain(text: str) -> str:
    """Text that Markdown takes as it stands, on one line."""
    return SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _list(lines: object) -> str:
    return "\n".join(f"- {_plain(str(line))}" for line in lines)  # type: ignore[attr-defined]


def _code(command: str) -> str:
    """Indented, so that no fence inside can end it."""
    return "\n".join(f"    {line}" for line in command.splitlines())


def _table(table: Table) -> str:
    lines = [
        "| " + " | ".join(_plain(column) for column in table.columns) + " |",
        "|" + "|".join("---" if place < table.texts else "---:" for place in range(len(table.columns))) + "|",
    ]
    lines += ["| " + " | ".join(_plain(cell.text) for cell in row) + " |" for row in table.rows]
    return "\n".join(lines)
