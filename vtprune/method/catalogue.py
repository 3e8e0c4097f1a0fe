"""What ships with vtprune, read from its source: `vtprune list` answers without the seconds that torch takes."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ENTRY_POINT_GROUP = "vtprune.pruners"
METHODS, FAMILIES = "vtprune.pruners", "vtprune.adapters"


# Where a method acts, by the stage classes that it derives from.
STAGES = {
    "InEncoder": "encoder",
    "BeforeDecoder": "before decoder",
    "BetweenLayers": "decoder",
    "InLayers": "decoder, routed",
    "InAttention": "decoder, attention and MLP",
    "InCache": "cache",
    "Growing": "generation",
}


# What a server can be asked for, beside the features that enter the decoder: `register(serves=...)` names the most
# that a method reads of it.
SERVES = ("features", "signals", "states", "picture", "text")
# Why a class cannot be served that has one of these names among its bases, and does not say that it can.
UNSERVED = {
    "Growing": "answers several times",
    "InCache": "cuts the cache",
    "BetweenLayers": "acts inside the decoder",
    "InLayers": "acts inside the decoder",
    "InAttention": "acts inside the decoder",
    "InEncoder": "acts inside the encoder",
}
UNTOLD = "does not say what it reads (serves=...)"


def stages_of(bases: Iterable[str]) -> str:
    """Where a class acts that has these names among its bases, in words."""
    names = set(bases)
    return ", ".join(text for stage, text in STAGES.items() if stage in names) or "none"


def unserved_of(bases: Iterable[str], serves: str, unserved: str) -> str:
    """Why a class with these names among its bases cannot be served, "" where it can; serves, unserved: what its
    registration says of it."""
    names = set(bases)
    found = unserved or next((why for stage, why in UNSERVED.items() if stage in names), UNTOLD)
    return "" if serves else found


@dataclass(frozen=True)
class PrunerInfo:
    """What `available()` says of a method.

    stage: where it acts, by the stages that its class derives from; needs: what it reads;
    licence: of the reference code; variants: the values that `variant` takes; serves: "features", "signals", "states"
    (of the encoder), "picture" or "text", the most that it asks of a server (see vtprune/docs/serving.md), "" for a
    method that cannot be served; unserved: why.
    """

    name: str
    stage: str = "none"
    paper: str = ""
    arxiv: str = ""
    licence: str = ""
    needs: str = "vision tokens"
    variants: tuple[str, ...] = ("paper",)
    serves: str = ""
    unserved: str = ""


def methods() -> dict[str, PrunerInfo]:
    """Every known method, as `vtprune.available()` says.

    The registry is asked where it is loaded, or needed as another package brings methods; else the source is read.
    """
    if "vtprune.method.registry" in sys.modules or entry_points(group=ENTRY_POINT_GROUP):
        from vtprune.method.registry import available

        return available()
    return own_methods()


def own_methods() -> dict[str, PrunerInfo]:
    """The methods that ship with vtprune, read from the source."""
    classes = list(_classes(METHODS))
    parents = {node.name: [base.id for base in node.bases if isinstance(base, ast.Name)] for node in classes}
    return {info.name: info for node in classes for info in _registered(node, list(_ancestors(node.name, parents)))}


def families() -> list[tuple[str, tuple[str, ...], str]]:
    """(name, model classes, notes) of every adapter, as `vtprune.adapters.adapters()` says."""
    found = [_constants(node) for node in _classes(FAMILIES)]
    return [(own["name"], own["models"], own["notes"]) for own in found if {"name", "models", "notes"} <= own.keys()]


def _classes(package: str) -> Iterator[ast.ClassDef]:
    """The classes that a package's modules define, in the order of the modules' names."""
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    for path in sorted(Path(spec.origin).parent.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        yield from (node for node in tree.body if isinstance(node, ast.ClassDef))


def _ancestors(name: str, parents: dict[str, list[str]]) -> Iterator[str]:
    """The names of all bases of a class, as far as their classes are known."""
    for parent in parents.get(name, ()):
        yield parent
        yield from _ancestors(parent, parents)


def _registered(node: ast.ClassDef, bases: list[str]) -> Iterator[PrunerInfo]:
    """What the `@register(...)` of a class says; its arguments are literals in vtprune's own methods."""
    for call in node.decorator_list:
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "register":
            given = {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg is not None}
            given["unserved"] = unserved_of(bases, given.get("serves", ""), given.get("unserved", ""))
            yield PrunerInfo(ast.literal_eval(call.args[0]), stages_of(bases), **given)


def _constants(node: ast.ClassDef) -> dict[str, Any]:
    """Values of the names that a class body sets to strings and tuples of strings."""
    found = {}
    for line in node.body:
        if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
            found[line.targets[0].id] = line.value
    return {name: ast.literal_eval(value) for name, value in found.items() if name in ("name", "models", "notes")}
