"""What the pages show, for the tests that hold them to it: blocks of code, commands and links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "vtprune" / "docs"
PAGES = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "ARCHITECTURE.md",
    *sorted(FOLDER.glob("*.md")),
    ROOT / "vtprune" / "cost" / "cost.md",
    ROOT / "vtprune" / "method" / "schedules.md",
    ROOT / "vtprune" / "training" / "training.md",
    ROOT / "assets" / "tiny-llava" / "README.md",
    ROOT / "assets" / "tiny-llava-pmod" / "README.md",
    ROOT / "assets" / "tiny-llava-covipal" / "README.md",
    ROOT / "assets" / "tiny-qwen" / "README.md",
    ROOT / "assets" / "tiny-llava-auto" / "README.md",
    ROOT / "assets" / "tiny-qwen-auto" / "README.md",
)
# A comment before a block says that it is not run, and why, or on which of the bundled models it is.
BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>not run|on): (?P<said>[^\n]+) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"")
COMMANDS = ("vtprune", ".venv/bin/vtprune", "make", "python", ".venv/bin/python")


@dataclass(frozen=True)
class Block:
    """A block of code: its page, the line that it begins in, and what the comment before it says."""

    page: Path
    line: int
    language: str
    code: str
    why_not: str
    model: str

    def compiled(self) -> object:
        """Its code, with the lines that the page has; raises SyntaxError where it is no Python."""
        return compile("\n" * self.line + self.code, str(self.page), "exec", dont_inherit=True)


def name_of(page: Path) -> str:
    """A page as tests are called by it."""
    return page.relative_to(ROOT).as_posix()


@cache
def text_of(page: Path) -> str:
    """What stands in a page."""
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str | None = None) -> list[Block]:
    """The blocks of a page, of one language or of all."""
    text, found = text_of(page), []
    for match in BLOCK.finditer(text):
        said = match["said"] or ""
        why, model = (said, "") if match["mark"] == "not run" else ("", said)
        line = text.count("\n", 0, match.start("code"))
        found.append(Block(page, line, match["language"], match["code"], why_not=why, model=model))
    return [block for block in found if language in (None, block.language)]


def commands(page: Path) -> Iterator[tuple[list[str], bool]]:
    """The commands of a page by their words, and whether each is meant to be pasted: a line of a block is, one that
    is named in a sentence is not."""
    for block in blocks(page):
        if block.language in ("", "bash"):
            for line in block.code.replace("\\\n", " ").splitlines():
                yield from ((words, True) for words in _words(line))
    for match in INLINE.finditer(BLOCK.sub("", text_of(page))):
        yield from ((words, False) for words in _words(match[1].replace("\n", " ")))


def _words(line: str) -> Iterator[list[str]]:
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        return
    if words and words[0] in COMMANDS:
        yield [Path(words[0]).name, *words[1:]]


def links(page: Path) -> list[str]:
    """What a page links to in the checkout."""
    found = [one or other for one, other in LINK.findall(BLOCK.sub("", text_of(page)))]
    return [target for target in found if not target.startswith(("http://", "https://"))]
