"""The floor plan as the code has it, which `python -m tests.house` prints: rooms, their floors, and who imports whom.

A room is a folder of vtprune, or a file beside the folders; the folders of evals are rooms of their own. Every import
counts, also inside a function, for type checkers alone, or by a text that is a module's name.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Set
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Folder in the checkout: the name that it is imported by.
PACKAGES = {"vtprune": "vtprune", "adapters": "vtprune.adapters", "evals": "vtprune.evals", "assets": "vtprune.assets"}
# From the ground up: a room imports rooms of lower floors alone. The front door, `import vtprune`, finds its names on
# first use, and is for those above.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("assets", "errors", "lazy", "provenance", "docs"),
    ("files", "console"),
    ("json_files", "loading", "tensors"),
    ("method", "shapes"),
    ("pruners", "cache"),
    ("encoder",),
    ("decoder",),
    ("cost.sizes",),
    ("adapters", "cost"),
    ("report",),
    ("hooks",),
    ("wrap", "downscaling"),
    ("front door",),
    (
        "training",
        "serving",
        "evals",
        "evals.run_file",
        "evals.paired",
        "evals.settings",
        "evals.samples",
        "evals.untrained",
        "evals.tiny_models",
    ),
    ("evals.lmms", "evals.zero_shot"),
    ("evals.speed",),
    ("evals.ask", "evals.bench"),
    ("evals.arank", "evals.calibrate", "evals.demo", "evals.report", "evals.tune"),
    ("cli",),
)
# What the floors below find by name, as they find what other packages bring, without a word of what is in it.
BY_NAME = {
    ("method", "pruners"): "the registry imports the folder once, so that what is in it registers itself",
    ("method", "adapters"): "the catalogue reads the sources for `vtprune list`",
    ("provenance", "adapters"): "the fingerprint of the code reads the sources",
}
# Files that are rooms of their own inside a folder.
ALONE = {"vtprune.cost.sizes"}
FRONT_DOOR = "front door"


@dataclass(frozen=True)
class Module:
    """A source file: its place in the checkout, its name, and its syntax tree."""

    path: Path
    name: str

    @property
    def place(self) -> str:
        """The path as messages say it."""
        return self.path.relative_to(ROOT).as_posix()

    @cached_property
    def tree(self) -> ast.Module:
        """The parsed source."""
        return ast.parse(self.path.read_text(encoding="utf-8"))

    @property
    def package(self) -> bool:
        """Whether it is a folder's `__init__`."""
        return self.path.name == "__init__.py"

    @property
    def room(self) -> str:
        """The room that it lies in."""
        return room_of(self.name)

    def inside(self, *rooms: str) -> bool:
        """Whether it lies in one of these rooms, evals standing for all of its folders."""
        return any(self.room == room or self.room.startswith(f"{room}.") for room in rooms)

    def walk(self) -> Iterator[ast.AST]:
        """Every node, docstrings left out."""
        told = {id(node) for node in docstrings(self.tree)}
        return (node for node in ast.walk(self.tree) if id(node) not in told)

    @cached_property
    def imports(self) -> dict[str, int]:
        """The modules of vtprune that it imports, and the line of the first time."""
        found: dict[str, int] = {}
        known = set(modules())
        for node in self.walk():
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = self._absolute(node)
                names = [inner if (inner := f"{base}.{alias.name}") in known else base for alias in node.names]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
                names = [node.value]
            else:
                continue
            for name in names:
                if name in known and name != self.name:
                    found.setdefault(name, node.lineno)
        return found

    def _absolute(self, node: ast.ImportFrom) -> str:
        parts = self.name.split(".")
        base = parts[: len(parts) - node.level + self.package] if node.level else []
        return ".".join([*base, *([node.module] if node.module else [])])


def docstrings(tree: ast.Module) -> Iterator[ast.Constant]:
    """The constants that are docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                yield first.value


@cache
def modules() -> dict[str, Module]:
    """Every module of vtprune, by its name."""
    found = {}
    for folder, package in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join([package, *(parts[:-1] if parts[-1] == "__init__" else parts)])
            found[name] = Module(path, name)
    return found


def room_of(module: str) -> str:
    """The room of a module, by its name."""
    if module in ALONE:
        return module.removeprefix("vtprune.")
    parts = module.split(".")[1:]
    return ".".join(parts[: 2 if parts[:1] == ["evals"] else 1]) or FRONT_DOOR


def floor_of(room: str) -> int:
    """The floor of a room, counted from the ground; raises KeyError for a room that is not in FLOORS."""
    return {name: height for height, floor in enumerate(FLOORS) for name in floor}[room]


def arrows() -> dict[tuple[str, str], list[str]]:
    """Which room imports which other one, and the lines that do."""
    found: dict[tuple[str, str], list[str]] = {}
    for module in modules().values():
        for name, line in module.imports.items():
            if room_of(name) != module.room:
                found.setdefault((module.room, room_of(name)), []).append(f"{module.place}:{line} imports {name}")
    return found


def circles(without: Set[tuple[str, str]] = frozenset()) -> list[tuple[str, ...]]:
    """Rooms that import each other, on whatever way round, by other arrows than these: each set of them once."""
    ways: dict[str, set[str]] = {}
    for one, other in arrows().keys() - without:
        ways.setdefault(one, set()).add(other)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        left = list(ways[start])
        while left:
            room = left.pop()
            if room not in seen:
                seen.add(room)
                left += ways.get(room, ())
        return seen

    far = {room: reached(room) for room in ways}
    rings = ({two for two in far[one] if one in far.get(two, ())} for one in far)
    return sorted({tuple(sorted(ring)) for ring in rings if ring})


def show() -> str:
    """The rooms from the top floor down, each with what it imports."""
    lines = []
    ways = arrows()
    for height in range(len(FLOORS) - 1, -1, -1):
        lines.append(f"floor {height}")
        for room in FLOORS[height]:
            below = sorted({other for one, other in ways if one == room}, key=lambda name: (-floor_of(name), name))
            marked = [name + _mark(room, name) for name in below]
            lines.append(f"  {room} -> {', '.join(marked) or '-'}")
    rings = [f"circle: {', '.join(circle)}" for circle in circles(without=set(BY_NAME))]
    return "\n".join([*lines, f"{len(ways)} arrows", *rings])


def _mark(room: str, other: str) -> str:
    if (room, other) in BY_NAME:
        return " (by name)"
    return "" if floor_of(other) < floor_of(room) else " (upwards!)"


if __name__ == "__main__":
    print(show())
