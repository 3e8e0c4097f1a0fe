"""Packages whose public names are imported when they are first used, so that importing the package costs nothing."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class _LazyPackage(ModuleType):
    """A package that finds its public names (`_homes`: name to module), and its modules, on first use and keeps them
    from then on."""

    _homes: dict[str, str]

    def __getattr__(self, name: str) -> Any:
        if name not in self.__dict__.get("_homes", {}):
            return self._module(name)
        value = getattr(importlib.import_module(self._homes[name]), name)
        self.__dict__[name] = value
        return value

    def _module(self, name: str) -> ModuleType:
        whole = f"{self.__name__}.{name}"
        if name.startswith("_") or find_spec(whole) is None:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return importlib.import_module(whole)

    def __setattr__(self, name: str, value: Any) -> None:
        # Importing a submodule sets it on its package. `vtprune.wrap` and `vtprune.report` are functions whatever was
        # imported before, so a module does not take the place of a public name.
        if name in self._homes and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._homes})


def export(package: str) -> None:
    """Makes the imported `package` find its public names in the modules that define them, when they are first used:
    those that its `if TYPE_CHECKING:` imports, so that they are what type checkers see."""
    module = sys.modules[package]
    loader: Any = module.__loader__
    homes = dict(_names(loader.get_source(package)))
    module.__dict__["_homes"] = homes
    module.__dict__["__all__"] = sorted(homes)
    module.__class__ = _LazyPackage


def _names(source: str) -> Iterator[tuple[str, str]]:
    """Name and module of every import under `if TYPE_CHECKING:`."""
    for block in ast.parse(source).body:
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING":
            for line in block.body:
                if isinstance(line, ast.ImportFrom) and line.module is not None:
                    yield from ((name.name, line.module) for name in line.names)
