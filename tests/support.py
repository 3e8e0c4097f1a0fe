"""The support table: which method runs on which family and kind of prompt, written from what the tests saw."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

# What a cell says, by what its tests found; and what a reason is called in the table.
YES, WHOLE = "yes", "whole"
# The table of encoders without a decoder.
ALONE = "a ViT alone"
INTRODUCTION = """# What runs on what

Written by `make test-all` from what its tests found, the rows of one method by `pytest tests/test_support.py -k NAME
--support adapters/support.md`; every cell was run with all the settings of the method that
`tests/matrix.py` lists, on tiny models with random weights, with SDPA and eager attention and with both paddings (a
decoder with linear attention, Qwen3.5's, with padding on the left alone: other padding it would take into its state).

**yes**: what is dropped equals the unpruned model that does without it, prefill and eight steps, to 2e-5; for methods
that no mask describes (`d2o`, `gamma_mod`), a batch equals its rows alone, and a reference of their own holds them
elsewhere; for `auto`, which runs another method (here `grid`, `fastv` and `turbo`) at rising levels, each row of a
batch is answered, and counted, as the level that answered it is by itself. **whole**: the method compares frames of a
video; an image stays whole, and the model is the unpruned one. A number is a reason, below. Where single settings of a
method are refused by name (MustDrop's merges in the tower on videos of pooled frames, layers without attention on
Qwen3.5), the cell is of its other settings.

The last table is of ViTs alone, by whose they are and how they pool: what is dropped equals the tower whose blocks and
pool mask it, to 2e-6, and where tokens merge a batch equals its rows alone.
"""

Cell = tuple[str, str, str]


def table(found: Mapping[Cell, str], kinds: Mapping[str, Sequence[str]]) -> str:
    """The page; found: by method, family and kind of prompt what its tests said, YES, WHOLE or a reason; kinds: the
    columns of each family's table."""
    methods = sorted({method for method, _, _ in found})
    # In the order in which the page tells them.
    texts = [found[method, kind, one] for kind, shown in kinds.items() for method in methods for one in shown]
    reasons = list(dict.fromkeys(text for text in texts if text not in (YES, WHOLE)))
    lines = [INTRODUCTION]
    for kind, shown in kinds.items():
        lines += [f"## {kind}", "", "| method | " + " | ".join(shown) + " |", "|---|" + "---|" * len(shown)]
        for method in methods:
            cells = [found[method, kind, one] for one in shown]
            texts = [cell if cell in (YES, WHOLE) else f"[{reasons.index(cell) + 1}]" for cell in cells]
            lines.append(f"| `{method}` | " + " | ".join(texts) + " |")
        lines.append("")
    lines += [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join(lines).rstrip() + "\n"


def read(page: str) -> dict[Cell, str]:
    """What a page says of each cell."""
    reasons = dict(re.findall(r"^(\d+)\. (.+)$", page, flags=re.MULTILINE))
    found, kind, shown = {}, "", []
    for line in page.splitlines():
        if line.startswith("## "):
            kind = line.removeprefix("## ")
        elif line.startswith("| "):
            first, *texts = [text.strip() for text in line.strip("|").split("|")]
            if first == "method":
                shown = texts
                continue
            for column, text in zip(shown, texts, strict=True):
                found[first.strip("`"), kind, column] = reasons[text.strip("[]")] if text.startswith("[") else text
    return found


def write(path: Path, found: Mapping[Cell, Sequence[str]], kinds: Mapping[str, Sequence[str]]) -> None:
    """Writes the page; methods that were not run keep the rows that they have there. Raises ValueError, naming the
    first of them, where a cell of another method was not run or its runs differ, once the others are written."""
    ran = {method for method, _, _ in found}
    known = read(path.read_text(encoding="utf-8")) if path.exists() else {}
    said = {cell: {text} for cell, text in known.items() if cell[0] not in ran} | {
        cell: set(texts) for cell, texts in found.items()
    }
    cells: dict[Cell, str] = {}
    wrong: list[str] = []
    for method in sorted({method for method, _, _ in said}):
        own = {(method, kind, one): said.get((method, kind, one), set()) for kind in kinds for one in kinds[kind]}
        unlike = [cell for cell, texts in own.items() if len(texts) != 1]
        wrong += [
            f"{method} on {kind}, {one}: {', '.join(sorted(own[method, kind, one])) or 'not run'}"
            for _, kind, one in unlike
        ]
        if not unlike:
            cells |= {cell: texts.pop() for cell, texts in own.items()}
        elif all(cell in known for cell in own):
            cells |= {cell: known[cell] for cell in own}
    if cells:
        path.write_text(table(cells, kinds), encoding="utf-8")
    if wrong:
        raise ValueError(wrong[0])
