"""Packages whose public names are imported when they are first used, so that importing the package costs nothing."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
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


def export(package: str, homes: Mapping[str, Sequence[str]]) -> None:
    """Makes the imported `package` find public names in the modules that define them: {module: names}."""
    module = sys.modules[package]
    module.__dict__["_homes"] = {name: home for home, names in homes.items() for name in names}
    module.__class__ = _LazyPackage
