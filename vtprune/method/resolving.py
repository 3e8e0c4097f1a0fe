"""What stands for pruners, everywhere that takes some: a text, a Pruner, a list of them, a config, a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vtprune.errors import VTPruneError
from vtprune.method import config
from vtprune.method.config import WEIGHTS_NAME
from vtprune.method.pruner import Pruner
from vtprune.method.registry import create, read_options
from vtprune.method.texts import Stage, parse_entry


def resolve(pruner: Any, **options: Any) -> list[Pruner]:
    """The pruners that a text, Pruner, list, config dict or folder stands for, in stage order.

    options: of the one method that a text names. Raises VTPruneError (or a subclass) for what stands for none, for an
    unknown method or option, and for an option that is given twice.
    """
    if isinstance(pruner, str):
        stages = parse_entry(pruner)
        if options and (len(stages) > 1 or stages[0].folder):
            what = "a folder, which says all of its options" if len(stages) == 1 else "a list of methods"
            raise VTPruneError(
                f"{pruner!r} is {what}; options ({', '.join(sorted(options))}) go with one method's name"
            )
        return [one for stage in stages for one in _of_stage(stage, options, alone=len(stages) == 1)]
    if options:
        raise VTPruneError(
            f"options ({', '.join(sorted(options))}) go with a method's name; set them on the Pruner itself, as in "
            "vtprune.FoPru(keep=0.5)"
        )
    given = config.load_config(pruner) if isinstance(pruner, Path) else pruner
    if isinstance(given, dict):
        given = config.from_dict(given)
    found = list(given) if isinstance(given, list | tuple) else [given]
    for one in found:
        if isinstance(one, type) and issubclass(one, Pruner):
            raise VTPruneError(f"{one.__name__} is the method's class; write {one.__name__}()")
    if not found or not all(isinstance(one, Pruner) for one in found):
        raise VTPruneError(
            "a pruner is a name, a vtprune.Pruner, a list of Pruners, a config dict or a folder with "
            f"vtprune_config.json, got {pruner!r}"
        )
    return found


def folder_of(pruner: Any) -> Path | None:
    """The folder that a text or a path names, None for anything else."""
    if isinstance(pruner, Path):
        return pruner
    stages = parse_entry(pruner) if isinstance(pruner, str) else []
    return Path(stages[0].name) if len(stages) == 1 and stages[0].folder else None


def _of_stage(stage: Stage, options: dict[str, Any], *, alone: bool) -> list[Pruner]:
    if stage.folder:
        if not alone and (Path(stage.name) / WEIGHTS_NAME).is_file():
            raise VTPruneError(
                f"{stage.name} holds weights, which are of that folder alone; it takes no part in a list"
            )
        found = config.load_config(stage.name)
        return found if isinstance(found, list) else [found]
    twice = sorted(options.keys() & dict(stage.options).keys())
    if twice:
        raise VTPruneError(f"{stage.name}: {', '.join(twice)} is given twice, in the text and beside it")
    # What comes from Python may be of any type that the method takes; the text's part is held to the field's.
    return [create(stage.name, **read_options(stage.name, dict(stage.options)), **options)]
