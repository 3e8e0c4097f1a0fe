"""Makes docstrings readable as pages: what is said of an argument or a field, and what is raised, stands by itself."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import griffe


class Paragraphs(griffe.Extension):
    """Begins a paragraph at each `name: what it is` of an argument or a field, and at what is raised."""

    def on_function_instance(self, *, func: griffe.Function, **others: Any) -> None:
        """A function: by its parameters."""
        _cut(func, (parameter.name for parameter in func.parameters))

    def on_class_members(self, *, cls: griffe.Class, **others: Any) -> None:
        """A class: by its attributes."""
        _cut(cls, (name for name, member in cls.members.items() if member.is_attribute))


def _cut(found: griffe.Object, names: Iterable[str]) -> None:
    name = "|".join(re.escape(one.lstrip("*")) for one in names)
    if found.docstring is None or not name:
        return
    told = re.compile(rf"(?:(?<=[.;])\s+|\n)`?((?:{name})(?:, (?:{name}))*)`?: ")
    text = told.sub(lambda match: f"\n\n`{match[1].replace(', ', '`, `')}`: ", found.docstring.value)
    found.docstring.value = re.sub(r"(?<=\.)\s+(?=Raises )", "\n\n", text)
