"""Names to pruners: what ships with vtprune, and third-party methods (timm's registry is the model)."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, TypeVar

from vtprune.catalogue import ENTRY_POINT_GROUP, METHODS, PrunerInfo
from vtprune.errors import UnknownPrunerError, VTPruneError
from vtprune.pruner import Pruner

_pruners: dict[str, type[Pruner]] = {}
_plugins_loaded = False

P = TypeVar("P", bound=type[Pruner])


def register(
    name: str,
    *,
    stage: str = "before decoder",
    paper: str = "",
    arxiv: str = "",
    licence: str = "",
    needs: str = "vision tokens",
    variants: tuple[str, ...] = ("paper",),
) -> Callable[[P], P]:
    """Class decorator that makes a Pruner known by `name`; raises VTPruneError if the name is taken."""

    def decorate(cls: P) -> P:
        if not (isinstance(cls, type) and issubclass(cls, Pruner)):
            raise VTPruneError(f"register({name!r}) decorates a subclass of vtprune.Pruner, got {cls!r}")
        if not cls.__module__.startswith(f"{__package__}."):
            _load_own()
        taken = _pruners.get(name)
        if taken is not None and taken.__qualname__ != cls.__qualname__:
            raise VTPruneError(f"the pruner name {name!r} is taken by {taken.__module__}.{taken.__qualname__}")
        cls.info = PrunerInfo(name, stage, paper, arxiv, licence, needs, variants)
        _pruners[name] = cls
        return cls

    return decorate


def _load_own() -> None:
    """Imports the methods that ship with vtprune, which registers them: before all others, whoever asks first."""
    for package in METHODS:
        import_module(package)


def _load() -> None:
    """Makes every method known: vtprune's own, and those of other packages (once)."""
    global _plugins_loaded
    _load_own()
    if _plugins_loaded:
        return
    _plugins_loaded = True
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        entry.load()


def available() -> dict[str, PrunerInfo]:
    """Every known method, in the order of registration: {name: PrunerInfo}."""
    _load()
    return {name: cls.info for name, cls in _pruners.items()}


def pruner_class(name: str) -> type[Pruner]:
    """The class registered as `name`; raises UnknownPrunerError with the nearest names."""
    _load()
    if name in _pruners:
        return _pruners[name]
    near = difflib.get_close_matches(name, _pruners, n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise UnknownPrunerError(f"unknown pruner {name!r}; {hint}known: {', '.join(_pruners)}")


def create(name: str, **options: Any) -> Pruner:
    """A pruner by name; raises VTPruneError for an option that the method does not have."""
    cls = pruner_class(name)
    fields = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(options) - fields)
    if unknown:
        raise VTPruneError(f"{name} has no option {', '.join(unknown)}; it takes {', '.join(sorted(fields))}")
    return cls(**options)
