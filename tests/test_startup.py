"""What importing vtprune and starting its commands loads: by module, so that no machine's speed decides."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_group

import vtprune
from vtprune.adapters import adapters
from vtprune.cli.app import app
from vtprune.method import catalogue, registry

ROOT = Path(vtprune.__file__).parent.parent
COMMANDS = sorted(get_group(app).commands)
# What takes a noticeable part of a second or more to import.
HEAVY = {"torch", "transformers", "torchvision", "accelerate", "peft", "lmms_eval", "matplotlib", "PIL", "datasets",
         "pandas", "scipy", "optuna"}  # fmt: skip
# torch and transformers (which imports PIL) are needed to prune; the others to train, to measure and to draw.
NEEDED = {"torch", "transformers", "PIL"}


def run(code: str, **options: object) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that runs `code`."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **options)  # type: ignore[call-overload]


def loaded(code: str) -> set[str]:
    """The modules that a fresh interpreter holds once it has run `code`."""
    done = run(f"{code}\nimport sys\nprint('loaded:', *sys.modules)")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("loaded:")[2].split())


def test_commands_that_only_say_something_load_nothing_heavy() -> None:
    lines = [["--version"], ["--help"], ["list"], *([command, "--help"] for command in COMMANDS)]
    modules = loaded(f"from vtprune.cli.app import app\nfor words in {lines}:\n    app(words, standalone_mode=False)")
    assert not modules & (HEAVY | {"torch._dynamo"})


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not loaded("import vtprune; dir(vtprune)") & HEAVY


def test_the_whole_interface_loads_torch_and_transformers_alone() -> None:
    modules = loaded("from vtprune import *\nimport vtprune.adapters")
    assert {"torch", "vtprune.wrap", "vtprune.pruners.fastv", "vtprune.pruners.pmod"} <= modules
    assert not modules & (HEAVY - NEEDED | {"torch._dynamo"})


def test_the_catalogue_read_from_the_source_is_the_registry() -> None:
    known = vtprune.available()
    own = catalogue.own_methods()
    assert own == {name: known[name] for name in known if name in own}
    assert list(own) == [name for name in known if registry.pruner_class(name).__module__.startswith("vtprune.")]
    assert catalogue.families() == adapters()


def test_the_catalogue_has_what_other_packages_bring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "vtprune.method.registry")
    assert catalogue.methods() == catalogue.own_methods()
    monkeypatch.undo()
    assert catalogue.methods() == vtprune.available()


def test_public_names_are_those_that_type_checkers_see() -> None:
    tree = ast.parse(Path(vtprune.__file__).read_text())
    (typed,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imports = [node for node in typed.body if isinstance(node, ast.ImportFrom)]
    homes = {alias.name: node.module for node in imports for alias in node.names}
    assert homes == vtprune._homes
    assert sorted(homes) == sorted(vtprune.__all__)
    assert set(homes) <= set(dir(vtprune))
    assert all(getattr(vtprune, name) is not None for name in homes)
    assert not hasattr(vtprune, "no_such_name")


def test_a_function_is_not_hidden_by_the_module_of_its_name() -> None:
    code = (
        "import vtprune.report, vtprune.wrap, vtprune.adapters\nfrom vtprune.wrap import resolve\n"
        "from vtprune import report\nprint(callable(vtprune.wrap), callable(report), report is vtprune.report)"
    )
    assert run(code).stdout == "True True True\n"


def test_modules_are_found_by_their_names_without_an_import_of_their_own() -> None:
    done = run("import vtprune\nprint(vtprune.errors.VTPruneError.__name__, vtprune.adapters.base.__name__)")
    assert done.stdout == "VTPruneError vtprune.adapters.base\n", done.stderr


def test_methods_are_registered_whatever_is_imported_first() -> None:
    mine = "vtprune.register('fastv')(type('Mine', (vtprune.Pruner,), {}))"
    for line in (
        "from vtprune.pruners import PMoD",
        f"try:\n    {mine}\nexcept vtprune.VTPruneError as error:\n    assert 'vtprune.pruners.fastv' in str(error)",
    ):
        done = run(f"import vtprune\n{line}\nfrom vtprune.method.registry import available\nprint(*available())")
        assert done.stdout.split() == list(catalogue.own_methods()), done.stderr


def test_a_checkout_that_was_not_installed_says_so(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "vtprune", tmp_path / "vtprune", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import vtprune"],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )
    assert done.stderr.splitlines()[-1].startswith("ImportError: vtprune is not installed: run `pip install -e .`")
