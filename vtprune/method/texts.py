"""The one grammar for methods, their options and lists of them, wherever a text stands for a pruner.

    methods   a comma-separated list of entries                  grid,fastv:keep=0.5,layers=(2,5),my-folder
    entry     one stage, or several joined by +                  visionzip:keep=192+vflowopt:keep=96
    stage     a method with options, or a folder                 fastv:keep=0.5,layers=(2,5)
    options   name=value, separated by commas or colons          variant=released:stages=2
    value     64  0.25  1e-3  25%  True  None  word  'quoted text'  (2,5)  [2,5]

Commas, colons and pluses inside brackets and quotes belong to the value. What follows a comma is a further option of
the stage before it where it begins with a name and =, and the next entry of the list otherwise. A colon begins an
option only where a name and = follow, so values may hold colons (clip=hf-hub:a/b); a plus begins a stage only where no
digit follows (1e+3). Lists become tuples. A text that names a folder as a whole is that folder; inside a list, a
folder or a value that holds a comma, a plus, a bracket or a quote is written in quotes.
"""

from __future__ import annotations

import ast
import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtprune.errors import InputError
from vtprune.method.pruner import Pruner, checked_keep
from vtprune.method.registry import available

OPENING, CLOSING, QUOTES = "([", ")]", "'\""
# What a quote that opens a text stands behind; anywhere else it is an apostrophe.
BEFORE_QUOTE = "=,+([:"
OPTION = re.compile(r"\s*[A-Za-z_]\w*\s*=")
INTEGER = re.compile(r"[+-]?[0-9]+")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
# Texts that need no quotes: they read back as themselves, and hold nothing that separates.
PLAIN = re.compile(r"[A-Za-z_./~][\w./~-]*(:[\w./~-]+)*")
WORDS = {"True": True, "true": True, "False": False, "false": False, "None": None, "null": None}
HOW = "options follow the method as name:option=value,option=value"


@dataclass(frozen=True)
class Stage:
    """A method and the options that a text gives it, or a folder with vtprune_config.json."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()
    folder: bool = False

    @property
    def text(self) -> str:
        """What `parse_entry` reads back."""
        if self.folder:
            return self.name if is_folder(self.name) else folder_text(self.name)
        options = ",".join(f"{name}={show_value(value)}" for name, value in self.options)
        return f"{self.name}:{options}" if options else self.name


def split_commas(text: str) -> list[str]:
    """The parts of a text between the commas that stand outside brackets and quotes; empty ones are left out."""
    return [part.strip() for _, part in _parts(text, _is_comma) if part.strip()]


def split_entries(text: str) -> list[str]:
    """The entries of a list of methods, each with its options; raises InputError for a text that is none."""
    if is_folder(text):
        return [text.strip()]
    entries: list[str] = []
    for part in split_commas(text):
        if OPTION.match(part) and entries:
            entries[-1] += f",{part}"
        else:
            entries.append(part)
    return entries


def parse_entry(text: str) -> list[Stage]:
    """The stages of one method, or of several that are joined by +; raises InputError for what cannot be read."""
    if is_folder(text):
        return [Stage(os.path.expanduser(text.strip()), folder=True)]
    entries = split_entries(text)
    if len(entries) != 1:
        raise InputError(
            f"cannot read {text!r} as one method: it reads as {len(entries)}"
            + (f" ({'; '.join(entries)}); stages of one method are joined by +" if entries else "")
        )
    return [_stage(part, text) for _, part in _parts(entries[0], _is_plus)]


def parse_method(text: str) -> tuple[str, tuple[tuple[str, Any], ...]]:
    """A method's name and its options; raises InputError for a folder and for several stages."""
    stages = parse_entry(text)
    if len(stages) > 1:
        raise InputError(f"{text!r} is a list of {len(stages)} methods; one is wanted here")
    if stages[0].folder:
        raise InputError(f"{text!r} is a folder; a method is wanted here")
    return stages[0].name, stages[0].options


def parse_options(text: str) -> tuple[tuple[str, Any], ...]:
    """`name=value`, or several separated by commas; raises InputError for anything else and for a name given twice."""
    found: dict[str, Any] = {}
    for _, part in _parts(text, _is_option):
        if not OPTION.match(part):
            raise InputError(f"cannot read {text!r}: give name=value, not {part!r}")
        name, _, value = part.partition("=")
        name = name.strip()
        if name in found:
            raise InputError(f"cannot read {text!r}: {name} is given twice")
        if not value.strip():
            raise InputError(f"cannot read {text!r}: {name} has no value (an empty text is '')")
        found[name] = _option(name, value)
    return tuple(found.items())


def parse_value(text: str) -> Any:
    """A number, a share (25% is 0.25), True, False, None, a tuple, or the text itself; see the module's docstring."""
    text = text.strip()
    if text[:1] in QUOTES and text[:1]:
        try:
            found = ast.literal_eval(text)
        except (ValueError, SyntaxError) as error:
            raise InputError(f"cannot read {text}: the quote is not closed where it ends") from error
        return found
    if text[:1] in OPENING and text[:1]:
        if text[-1:] != CLOSING[OPENING.index(text[0])]:
            raise InputError(f"cannot read {text!r}: the bracket is not closed where it ends")
        return tuple(parse_value(part) for part in split_commas(text[1:-1]))
    if text in WORDS:
        return WORDS[text]
    if INTEGER.fullmatch(text):
        return int(text)
    if NUMBER.fullmatch(text):
        return float(text)
    if text.endswith("%") and NUMBER.fullmatch(text[:-1].strip()):
        return float(text[:-1]) / 100
    return text


def parse_keep(text: str) -> int | float:
    """`64` is a count of tokens, `0.25` and `25%` are fractions; "1" is one token, "1.0" is everything."""
    text = text.strip()
    try:
        keep: int | float
        if text.endswith("%"):
            keep = float(text[:-1]) / 100
        else:
            keep = int(text) if text.lstrip("+-").isdecimal() else float(text)
        checked_keep(keep)
    except ValueError as error:
        raise InputError(
            f"keep: cannot take {text!r}; give a count of vision tokens per image (64), a fraction in (0, 1] "
            "(0.25) or a percentage (25%)"
        ) from error
    return keep


def is_folder(text: str) -> bool:
    """Whether a text as a whole names a folder: a path, or a folder that is there and no method's name."""
    text = text.strip()
    name = re.split(r"[:,+]", text, maxsplit=1)[0].strip()
    if name in available() or OPTION.match(text):
        return False
    try:
        there = Path(text).expanduser().is_dir()
    except (OSError, RuntimeError, ValueError):
        there = False
    # A path is one even where nothing is there; with separators in it, it may be a list.
    return bool(text) and (there or (os.sep in text and not re.search(r"[,+:'\"()\[\]]", text)))


def folder_text(folder: str | os.PathLike[str]) -> str:
    """The text that stands for a folder, whatever it is called."""
    return repr(os.fspath(folder))


def show(pruners: Pruner | Sequence[Pruner]) -> str:
    """The text that stands for these pruners: names, and every option that differs from the method's default.

    Raises InputError for an option that no text can hold.
    """
    several = [pruners] if isinstance(pruners, Pruner) else pruners
    return "+".join(Stage(one.name, tuple(_changed(one))).text for one in several)


def show_value(value: Any) -> str:
    """The text that `parse_value` reads back as this value; raises InputError where there is none."""
    if isinstance(value, tuple | list):
        inner = ",".join(show_value(one) for one in value)
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, str):
        return value if PLAIN.fullmatch(value) and parse_value(value) == value else repr(value)
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    raise InputError(f"no text stands for {type(value).__name__} {value!r}")


def show_keep(keep: int | float | None) -> str:
    """The shortest text that `parse_keep` reads back; a dash for the method's own setting."""
    if keep is None:
        return "-"
    return f"{100 * keep:.4g}%" if isinstance(keep, float) else str(keep)


def _changed(pruner: Pruner) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(pruner):
        if not field.init:
            continue
        value = getattr(pruner, field.name)
        default = field.default
        if type(value) is not type(default) or value != default:
            yield field.name, value


def _stage(part: str, text: str) -> Stage:
    """One stage out of an entry."""
    head, *options = (piece for _, piece in _parts(part, _is_option))
    head = head.strip()
    if not head:
        raise InputError(f"cannot read {text!r}: a method is missing in it")
    if head[:1] in QUOTES and head[:1]:
        name, folder = os.path.expanduser(str(parse_value(head))), True
    else:
        folder = is_folder(head)
        name = os.path.expanduser(head) if folder else head
    if folder:
        if options:
            raise InputError(f"{name}: a folder says all of its options; give no others, got {', '.join(options)}")
        return Stage(name, folder=True)
    if not re.fullmatch(r"[\w.-]+", head) or OPTION.match(head):
        raise InputError(f"cannot read {text!r}: {HOW}, got {head!r}")
    return Stage(name, parse_options(",".join(options)) if options else ())


def _option(name: str, text: str) -> Any:
    value = parse_value(text)
    if name != "keep" or value is None:
        return value
    return parse_keep(value if isinstance(value, str) else text)


def _is_comma(text: str, at: int) -> bool:
    return text[at] == ","


def _is_plus(text: str, at: int) -> bool:
    return text[at] == "+" and not re.match(r"\s*[0-9.]*[0-9]", text[at + 1 :])


def _is_option(text: str, at: int) -> bool:
    return text[at] == "," or (text[at] == ":" and OPTION.match(text, at + 1) is not None)


def _parts(text: str, separates: Callable[[str, int], bool]) -> Iterable[tuple[int, str]]:
    """The parts of a text, each with its place, between separators outside brackets and quotes.

    Raises InputError for a bracket or a quote that is not closed.
    """
    found, start, open_brackets, quote = [], 0, [], ""
    for at, sign in enumerate(text):
        if quote:
            quote = "" if sign == quote and not _escaped(text, at) else quote
        elif sign in QUOTES and (not text[:at].strip() or text[:at].rstrip()[-1] in BEFORE_QUOTE):
            quote = sign
        elif sign in OPENING:
            open_brackets.append(CLOSING[OPENING.index(sign)])
        elif sign in CLOSING:
            if not open_brackets or open_brackets.pop() != sign:
                raise InputError(f"cannot read {text!r}: {sign!r} closes no bracket; quotes hold it as text")
        elif not open_brackets and separates(text, at):
            found.append((start, text[start:at]))
            start = at + 1
    if quote or open_brackets:
        raise InputError(f"cannot read {text!r}: {quote or open_brackets[-1]} is missing at its end")
    return [*found, (start, text[start:])]


def _escaped(text: str, at: int) -> bool:
    """Whether an odd number of backslashes stands before a place."""
    before = text[:at]
    return (len(before) - len(before.rstrip("\\"))) % 2 == 1
