"""What a sweep runs: methods, how much each keeps, and the lists that `vtprune bench` takes by default."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from vtprune.config import load_config, to_dict
from vtprune.errors import VTPruneError
from vtprune.pruner import Pruner, check_keep
from vtprune.pruners.staged import Staged
from vtprune.registry import available, create, pruner_class
from vtprune.weights import WEIGHTS_NAME
from vtprune.wrap import resolve

from .failures import InputError

BASELINES = ("random", "grid", "pool")
# Options whose False leaves a method as it is but for merging, and where a run of everything compares the two.
MERGE_OPTIONS = ("merge", "recycle")
ABLATION_KEEP = 0.11
# For methods whose first decoder layers hold all tokens: of 4 layers that is a quarter already.
STAGED_ABLATION_KEEP = 0.5
DEFAULT_KEEPS: tuple[int | float, ...] = (0.25, 0.11)
ALL_KEEPS: tuple[int | float, ...] = (0.5, 0.25, 0.11, 0.05)
UNPRUNED = "none"


def parse_keep(text: str) -> int | float:
    """`64` is a count of tokens, `0.25` and `25%` are fractions; "1" is one token, "1.0" is everything."""
    text = text.strip()
    try:
        keep: int | float
        if text.endswith("%"):
            keep = float(text[:-1]) / 100
        else:
            keep = int(text) if text.lstrip("+-").isdecimal() else float(text)
        check_keep(keep)
    except ValueError as error:
        raise InputError(
            f"keep: cannot take {text!r}; give a count of vision tokens per image (64), a fraction in (0, 1] "
            "(0.25) or a percentage (25%)"
        ) from error
    return keep


def parse_flops(text: str) -> float:
    """`40%` and `0.4` are the same share of the unpruned model's FLOPs."""
    text = text.strip()
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        raise InputError(
            f"flops: cannot take {text!r}; give a share of the unpruned FLOPs below all of it (40% or 0.4)"
        )
    return share


def parse_value(text: str) -> Any:
    """A method's option as given on a command line: JSON where it is JSON, else the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def show_keep(keep: int | float | None) -> str:
    """The shortest text that `parse_keep` reads back; a dash for the method's own setting."""
    if keep is None:
        return "-"
    return f"{100 * keep:.4g}%" if isinstance(keep, float) else str(keep)


@dataclass(frozen=True)
class Setting:
    """One row of a sweep: a method, how much it keeps and its other options, or what a folder's config says.

    config: the content of a vtprune_config.json as JSON; method and keep then only tell what is in it, and
    title is the folder's name. folder: where trained weights are read from, and the model itself if it lies there
    too; stamp: identifies what lies there.
    """

    method: str
    keep: int | float | None = None
    options: tuple[tuple[str, Any], ...] = ()
    config: str = ""
    title: str = ""
    folder: str = ""
    stamp: str = ""

    @property
    def label(self) -> str:
        """The method with its options, as the command line takes it; a folder's name."""
        return self.title or ":".join([self.method, *(f"{name}={value}" for name, value in self.options)])

    def key(self) -> str:
        """Identifies the setting inside one run, a folder by what its config says; 1 and 1.0 differ."""
        text = self.config + self.stamp or json.dumps([self.method, self.keep, self.options], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def pruners(self) -> list[Pruner]:
        """The pruners in stage order; raises VTPruneError for an unknown method or option."""
        if self.config:
            return resolve(json.loads(self.config))
        return [create(self.method, keep=self.keep, **dict(self.options))]

    @property
    def method_source(self) -> str | list[Pruner]:
        """What `vtprune.wrap` takes: the folder with the weights, or the pruners."""
        return self.folder or self.pruners()

    @property
    def own_model(self) -> str:
        """The folder with the model that the weights were trained with, "" where any model will do."""
        return self.folder if self.folder and (Path(self.folder) / "config.json").is_file() else ""

    def pruner(self) -> Pruner:
        """The pruner itself, the last of several; raises VTPruneError for an unknown method or option."""
        return self.pruners()[-1]


def is_folder(text: str) -> bool:
    """Whether an entry of `--methods` names a folder: a path, or a folder that is there and no method's name."""
    return text.partition(":")[0] not in available() and (os.sep in text or Path(text).is_dir())


def folder_setting(folder: str) -> Setting:
    """The setting that a folder's vtprune_config.json holds; raises VTPruneError."""
    found = load_config(folder)
    pruners = found if isinstance(found, list) else [found]
    content = json.dumps(to_dict(found), sort_keys=True)
    methods = "+".join(pruner.name for pruner in pruners)
    path = Path(folder).resolve()
    trained = str(path) if (path / WEIGHTS_NAME).is_file() else ""
    if not trained and any(pruner.brings_weights() for pruner in pruners):
        raise InputError(f"{folder}: {methods} needs the weights that `vtprune train` writes, {WEIGHTS_NAME}")
    return Setting(methods, pruners[-1].keep, config=content, title=path.name, folder=trained, stamp=_stamp(path))


def _stamp(folder: Path) -> str:
    """Changes with the weights in a folder, "" where there are none."""
    found = [path for path in sorted(folder.glob("*.safetensors")) if path.is_file()]
    if not (folder / WEIGHTS_NAME).is_file():
        return ""
    sizes = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in found]
    return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()


def parse_method(text: str) -> tuple[str, tuple[tuple[str, Any], ...]]:
    """`flowcut` or `flowcut:variant=released`: a name and its options."""
    # A value may hold a colon itself (clip=hf-hub:...): an option begins where a name and "=" follow one.
    name, *parts = re.split(r":(?=[^:=/]*(?:=|$|:))", text.strip())
    options = []
    for part in parts:
        key, found, value = part.partition("=")
        if not found or not key:
            raise InputError(f"cannot read {text!r}: options follow the method as name:option=value")
        options.append((key, parse_value(value)))
    return name, tuple(options)


def all_methods() -> list[str]:
    """Every method that is known, third-party ones included, but for those that have to be trained."""
    return [name for name in available() if name != UNPRUNED and not pruner_class(name).brings_weights()]


def ablations() -> list[str]:
    """Every method that merges, with its merging off, as `--methods` takes it."""
    found = []
    for name in all_methods():
        method = pruner_class(name)
        options = {field.name for field in fields(method)}
        keep = STAGED_ABLATION_KEEP if issubclass(method, Staged) else ABLATION_KEEP
        found += [f"{name}:{option}=False:keep={keep}" for option in MERGE_OPTIONS if option in options]
    return found


def build_settings(methods: Sequence[str], keeps: Iterable[int | float]) -> list[Setting]:
    """The unpruned model, then every method at every keep, or at the one among its options, and every folder at its
    own; raises InputError for what does not exist."""
    keeps = list(keeps)
    settings = [Setting(UNPRUNED)]
    try:
        for text in methods:
            if is_folder(text):
                settings.append(folder_setting(text))
                continue
            name, options = parse_method(text)
            own = [parse_keep(str(value)) for option, value in options if option == "keep"]
            others = tuple(option for option in options if option[0] != "keep")
            if name != UNPRUNED:
                settings += [Setting(name, keep, others) for keep in own or keeps]
        for setting in settings:
            setting.pruners()
    except (VTPruneError, TypeError) as error:
        raise InputError(str(error)) from error
    # Two folders may have one name; what they hold tells them apart.
    unique = {setting.key(): setting for setting in settings}
    titles = Counter(setting.label for setting in unique.values() if setting.config)
    return [
        replace(setting, title=f"{setting.title}-{key[:4]}")
        if setting.config and titles[setting.label] > 1
        else setting
        for key, setting in unique.items()
    ]
