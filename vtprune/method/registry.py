"""Names to pruners: what ships with vtprune, and third-party methods (timm's registry is the model)."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, TypeVar

from vtprune.errors import UnknownPrunerError, VTPruneError
from vtprune.method.catalogue import ENTRY_POINT_GROUP, METHODS, SERVES, PrunerInfo, stages_of, unserved_of
from vtprune.method.options import check_type, converted, hints_of, lone_item, readable
from vtprune.method.pruner import Pruner

_pruners: dict[str, type[Pruner]] = {}
_plugins_loaded = False

P = TypeVar("P", bound=type[Pruner])


def register(
    name: str,
    *,
    paper: str = "",
    arxiv: str = "",
    licence: str = "",
    needs: str = "vision tokens",
    variants: tuple[str, ...] = ("paper",),
    serves: str = "",
    unserved: str = "",
) -> Callable[[P], P]:
    """Class decorator that makes a Pruner known by `name`; raises VTPruneError if the name is taken.

    serves: "features", "signals", "states", "picture" or "text", the most that a server has to hand it, for a method
    whose `count` is right and which goes by nothing else; unserved: why it cannot be served, where its stages do not
    say it.
    """
    if serves and serves not in SERVES:
        raise VTPruneError(f"register({name!r}): serves is one of {', '.join(map(repr, SERVES))}, got {serves!r}")

    def decorate(cls: P) -> P:
        if not (isinstance(cls, type) and issubclass(cls, Pruner)):
            raise VTPruneError(f"register({name!r}) decorates a subclass of vtprune.Pruner, got {cls!r}")
        if not cls.__module__.startswith(f"{METHODS}."):
            _load_own()
        taken = _pruners.get(name)
        if taken is not None and taken.__qualname__ != cls.__qualname__:
            raise VTPruneError(
                f"the pruner name {name!r} is taken by {taken.__module__}.{taken.__qualname__}; choose another name"
            )
        bases = [base.__name__ for base in cls.__mro__]
        cls.info = PrunerInfo(
            name=name,
            stage=stages_of(bases),
            paper=paper,
            arxiv=arxiv,
            licence=licence,
            needs=needs,
            variants=variants,
            serves=serves,
            unserved=unserved_of(bases, serves, unserved),
        )
        _pruners[name] = cls
        return cls

    return decorate


def _load_own() -> None:
    """Imports the methods that ship with vtprune, which registers them: before all others, whoever asks first."""
    import_module(METHODS)


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
    raise UnknownPrunerError(
        f"unknown pruner {name!r}; {hint}known: {', '.join(_pruners)}. One of your own is known once its "
        f"module is imported, or by an entry point of the group {ENTRY_POINT_GROUP}"
    )


def create(name: str, **options: Any) -> Pruner:
    """A pruner by name, a list among its options as the tuple that it stands for.

    Raises VTPruneError for an option that the method does not have.
    """
    cls = pruner_class(name)
    hints = hints_of(cls)
    _refuse_unknown(cls, options)
    return cls(**{option: converted(value, hints.get(option, Any)) for option, value in options.items()})


def create_checked(name: str, options: dict[str, Any]) -> Pruner:
    """`create`, for options out of a file; raises VTPruneError also for a value of another type."""
    _check_types(pruner_class(name), options)
    return create(name, **options)


def read_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a method as a text gives them, with layers=2 as the (2,) that it stands for; raises VTPruneError
    for an unknown method or option, and for a value of another type."""
    cls = pruner_class(name)
    hints = hints_of(cls)
    found = {option: lone_item(value, hints.get(option, Any)) for option, value in options.items()}
    _check_types(cls, found)
    return found


def option_names() -> frozenset[str]:
    """The names of all options of all known methods."""
    return frozenset(name for method in available() for name in options_of(method))


def options_of(method: str) -> dict[str, tuple[str, object]]:
    """By name the type, in words, and the default of each option of a method; raises UnknownPrunerError."""
    cls = pruner_class(method)
    hints, made = hints_of(cls), cls()
    return {
        field.name: (readable(hints.get(field.name, Any)), getattr(made, field.name))
        for field in dataclasses.fields(cls)
        if field.init
    }


def _check_types(cls: type[Pruner], options: dict[str, Any]) -> None:
    _refuse_unknown(cls, options)
    hints = hints_of(cls)
    for option, value in options.items():
        hint = hints.get(option, Any)
        check_type(cls.info.name, option, converted(value, hint), hint)


def _refuse_unknown(cls: type[Pruner], options: Iterable[str]) -> None:
    fields = sorted(field.name for field in dataclasses.fields(cls) if field.init)
    unknown = sorted(set(options) - set(fields))
    if unknown:
        near = difflib.get_close_matches(unknown[0], fields, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise VTPruneError(f"{cls.info.name} has no option {', '.join(unknown)}; it takes {', '.join(fields)}{hint}")
