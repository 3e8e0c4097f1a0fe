"""The rules of the floor plan, held over the source: each test names all that breaks one."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import house
from tests.house import Module
from vtprune.method import catalogue
from vtprune.method.pruner import Pruner
from vtprune.method.registry import pruner_class

# What may be measured or trained on models of one's own making: not of any family.
OWN_MODELS = ("evals.speed", "evals.tiny_models", "serving")
# Methods whose names are words of every day, in other senses too.
EVERYDAY = {"none", "random", "grid", "pool", "auto"}
HOOKS = re.compile(r"register_(module_)?(full_)?(forward|backward|state_dict|load_state_dict)?_?(pre_|post_)?hook")
POSITIONAL, LINES, FILES = 4, 3, 8
MEMBERS, STAGE_MEMBERS = 12, 8


def rooms() -> set[str]:
    return {module.room for module in house.modules().values()}


def core() -> list[Module]:
    """What every method goes through, and none is named in."""
    outside = ("pruners", "evals", "assets", house.FRONT_DOOR)
    return [module for module in house.modules().values() if not module.inside(*outside)]


def broken(found: Iterator[str] | list[str]) -> str:
    lines = sorted(found)
    return "\n".join([f"{len(lines)} violations:", *lines]) if lines else ""


def named(node: ast.AST) -> str:
    """The last name of what is called or read."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def calls(module: Module) -> Iterator[tuple[ast.Call, str]]:
    for node in module.walk():
        if isinstance(node, ast.Call):
            yield node, f"{module.place}:{node.lineno}"


def test_every_kind_of_import_counts(tmp_path: Path) -> None:
    source = (
        '"""A docstring names vtprune.wrap."""\n'
        "import vtprune.errors\n"
        "from vtprune import files\n"
        "from .answers import Selection\n"
        "if TYPE_CHECKING:\n    from vtprune.cache.layer import PrunedLayer\n"
        "def inside():\n    from vtprune.hooks import taps\n"
        "LATER = 'vtprune.report.report'\n"
    )
    path = tmp_path / "views.py"
    path.write_text(source)
    assert Module(path, "vtprune.method.views").imports == {
        "vtprune.errors": 2,
        "vtprune.files": 3,
        "vtprune.method.answers": 4,
        "vtprune.cache.layer": 6,
        "vtprune.hooks.taps": 8,
        "vtprune.report.report": 9,
    }


def test_every_room_has_its_floor() -> None:
    drawn = [room for floor in house.FLOORS for room in floor]
    assert sorted(drawn) == sorted(rooms())


def test_imports_run_down() -> None:
    upward = [
        line
        for (one, other), lines in house.arrows().items()
        if house.floor_of(other) >= house.floor_of(one) and (one, other) not in house.BY_NAME
        for line in lines
    ]
    assert not broken(upward), broken(upward)


def test_rooms_do_not_import_each_other_in_a_circle() -> None:
    found = [" and ".join(circle) for circle in house.circles(without=set(house.BY_NAME))]
    assert not broken(found), broken(found)


def test_what_is_found_by_name_is() -> None:
    assert set(house.BY_NAME) <= set(house.arrows())


def test_training_and_evals_never_meet() -> None:
    sides = {"training": "evals", "evals": "training"}
    found = [
        line
        for (one, other), lines in house.arrows().items()
        if sides.get(one.partition(".")[0]) == other.partition(".")[0]
        for line in lines
    ]
    assert not broken(found), broken(found)


def test_only_what_lies_above_the_front_door_goes_through_it() -> None:
    found = [
        line
        for (one, other), lines in house.arrows().items()
        if other == house.FRONT_DOOR and not one.startswith(("evals", "cli", "training"))
        for line in lines
    ]
    assert not broken(found), broken(found)


def test_a_method_imports_what_a_method_is_and_its_own_parts() -> None:
    allowed = ("vtprune.method", "vtprune.tensors", "vtprune.errors", "vtprune.files", "vtprune.json_files")
    found = []
    for module in house.modules().values():
        if module.room != "pruners" or module.name == "vtprune.pruners":
            continue
        own = ".".join(module.name.split(".")[:3])
        for name, line in module.imports.items():
            if not _within(name, (*allowed, "vtprune.pruners.parts", own)):
                found.append(f"{module.place}:{line} imports {name}")
    assert not broken(found), broken(found)


def _within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def test_adapters_import_no_method() -> None:
    found = house.arrows().get(("adapters", "pruners"), [])
    assert not broken(found), broken(found)


def test_the_core_names_no_method() -> None:
    names = catalogue.own_methods().keys() - EVERYDAY
    classes = {pruner_class(name).__name__ for name in names}
    found = []
    for module in core():
        for node in module.walk():
            if isinstance(node, ast.Constant):
                word = node.value if isinstance(node.value, str) else ""
            elif isinstance(node, ast.alias):
                word = node.name
            else:
                word = named(node)
            if word in names | classes:
                found.append(f"{module.place}:{getattr(node, 'lineno', 0)} names {word}")
    assert not broken(found), broken(found)


def test_only_adapters_read_a_models_config() -> None:
    # The sizes of the cost model are an adapter's, too; a method never sees the model that it prunes.
    found = []
    for module in house.modules().values():
        if module.inside("adapters", "cost.sizes", "pruners", *OWN_MODELS):
            continue
        for node in module.walk():
            if isinstance(node, ast.Call) and named(node.func) == "get_text_config":
                found.append(f"{module.place}:{node.lineno} calls get_text_config")
            if isinstance(node, ast.Attribute) and _is_config(node.value):
                found.append(f"{module.place}:{node.lineno} reads config.{node.attr}")
            if isinstance(node, ast.Call) and named(node.func) in ("getattr", "hasattr") and _is_config(node.args[0]):
                found.append(f"{module.place}:{node.lineno} reads {ast.unparse(node)}")
    assert not broken(found), broken(found)


def _is_config(node: ast.AST) -> bool:
    """Whether it is what something, other than the object at hand, calls its config: `model.config`."""
    owner = node.value if isinstance(node, ast.Attribute) and node.attr == "config" else None
    return owner is not None and named(owner) in ("model", "core", "shared", "language_model", "inner", "decoder")


def test_only_the_folder_of_hooks_registers_hooks() -> None:
    found = [
        f"{place} calls {named(call.func)}"
        for module in house.modules().values()
        if not module.inside("hooks", *OWN_MODELS)
        for call, place in calls(module)
        if HOOKS.fullmatch(named(call.func))
    ]
    assert not broken(found), broken(found)


def test_only_the_folder_of_caches_names_what_lies_in_one() -> None:
    found = []
    for module in house.modules().values():
        if module.inside("cache", *OWN_MODELS):
            continue
        imported = {
            alias.asname or alias.name
            for node in module.walk()
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vtprune.cache")
            for alias in node.names
        }
        for node in module.walk():
            for key in cache_keys(node):
                if isinstance(key, ast.Constant) or (named(key).isupper() and named(key) not in imported):
                    found.append(f"{module.place}:{node.lineno} names {ast.unparse(key)}")  # type: ignore[attr-defined]
    assert not broken(found), broken(found)


def cache_keys(node: ast.AST) -> list[ast.expr]:
    """The names by which a piece of code reaches into a cache or a layer of one."""
    if isinstance(node, ast.Subscript):
        own = isinstance(node.value, ast.Attribute) and node.value.attr in ("aux", "entries")
        text = isinstance(node.slice, ast.Name) or isinstance(getattr(node.slice, "value", None), str)
        return [node.slice] if own and text else []
    if not isinstance(node, ast.Call) or not node.args:
        return []
    if named(node.func) in ("getattr", "setattr", "hasattr"):
        return [node.args[1]] if named(node.args[0]) == "cache" else []
    on = node.func.value if isinstance(node.func, ast.Attribute) else node.func
    owner = named(on.value if isinstance(on, ast.Subscript) else on)
    reaches = named(node.func) in ("at_end", "values_of") or (
        named(node.func) in ("get", "pop", "extend", "add") and owner in ("aux", "entries", "layer", "layers")
    )
    return [node.args[0]] if reaches else []


def test_no_call_passes_more_than_four_values_by_position() -> None:
    found = [
        f"{place} passes {len(call.args)} to {ast.unparse(call.func)}"
        for module in house.modules().values()
        for call, place in calls(module)
        if len(call.args) > POSITIONAL
    ]
    assert not broken(found), broken(found)


def test_a_folder_says_in_three_lines_what_lives_there() -> None:
    found = []
    for module in house.modules().values():
        said = ast.get_docstring(module.tree) if module.package else "one file"
        if not said or len(said.splitlines()) > LINES:
            found.append(f"{module.place} has {len((said or '').splitlines())} lines")
    assert not broken(found), broken(found)


def test_few_files_lie_beside_the_folders() -> None:
    files = sorted(path.name for path in (house.ROOT / "vtprune").glob("*.py"))
    assert len(files) <= FILES, files


def members(kind: type) -> list[str]:
    """The public members of a class's own that may be overridden, fields and class variables among them."""
    own = {**dict.fromkeys(inspect.get_annotations(kind)), **vars(kind)}
    return [
        name for name, value in own.items() if name[0] != "_" and not getattr(_function(value), "__final__", False)
    ]


def _function(value: object) -> object:
    if isinstance(value, property):
        return value.fget
    return getattr(value, "__func__", value)


def stages() -> list[type]:
    try:
        module = importlib.import_module("vtprune.method.stages")
    except ModuleNotFoundError:
        return []
    own: Callable[[object], bool] = lambda one: inspect.isclass(one) and one.__module__ == module.__name__  # noqa: E731
    return [kind for _, kind in inspect.getmembers(module, own) if issubclass(kind, Pruner)]


@pytest.mark.parametrize(
    ("kind", "most"), [(Pruner, MEMBERS), *((kind, STAGE_MEMBERS) for kind in stages())], ids=lambda one: str(one)
)
def test_a_newcomer_reads_few_members(kind: type, most: int) -> None:
    found = members(kind)
    assert len(found) <= most, f"{kind.__name__} has {len(found)}: {', '.join(found)}"
