"""What a sweep runs: methods, how much each keeps, and the lists that `vtprune bench` takes by default."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from vtprune.assets import TRAINED
from vtprune.errors import InputError, VTPruneError
from vtprune.hooks.weights import untrained
from vtprune.method.config import CONFIG_NAME, WEIGHTS_NAME, load_config, to_dict
from vtprune.method.pruner import Pruner
from vtprune.method.registry import (
    available,
    create,
    pruner_class,
    read_options,
)
from vtprune.method.resolving import resolve
from vtprune.method.stages import BeforeDecoder, Growing, InLayers, Trained
from vtprune.method.texts import Stage, parse_entry
from vtprune.pruners.parts.staged import Dropping

BASELINES = ("random", "grid", "pool")
# Options whose False leaves a method as it is but for merging, and where a run of everything compares the two.
MERGE_OPTIONS = ("merge", "recycle")
ABLATION_KEEP = 0.11
# For methods whose first decoder layers hold all tokens: of 4 layers that is a quarter already.
STAGED_ABLATION_KEEP = 0.5
DEFAULT_KEEPS: tuple[int | float, ...] = (0.25, 0.11)
ALL_KEEPS: tuple[int | float, ...] = (0.5, 0.25, 0.11, 0.05)
UNPRUNED = "none"
# No method: pictures with fewer pixels, so that fewer tokens come of them.
DOWNSCALE = "downscale"


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


@dataclass(frozen=True)
class Setting:
    """One row of a sweep: a method, how much it keeps and its other options, or what a folder's config says.

    config: the content of a vtprune_config.json as JSON, for a folder and for several stages; method and keep then
    only tell what is in it, and title is the folder's name or the stages' text. folder: where trained weights are read
    from, and the model itself if it lies there too; stamp: identifies what lies there.
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
        return self.title or Stage(self.method, self.options).text

    def key(self) -> str:
        """Identifies the setting inside one run, a folder by what its config says; 1 and 1.0 differ."""
        text = self.config + self.stamp or json.dumps([self.method, self.keep, self.options], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def pruners(self) -> list[Pruner]:
        """The pruners in stage order; raises VTPruneError for an unknown method or option."""
        if self.config:
            return resolve(json.loads(self.config))
        if self.method == DOWNSCALE:
            return [create(UNPRUNED)]
        return [create(self.method, keep=self.keep, **dict(self.options))]

    def described(self) -> Any:
        """The pruners, or the only one, as plain JSON."""
        if self.method == DOWNSCALE:
            return {"method": DOWNSCALE, "keep": self.keep, **dict(self.options)}
        found = [pruner.to_dict() for pruner in self.pruners()]
        return found if len(found) > 1 else found[0]

    @property
    def stage(self) -> str:
        """Where the pruners act, in words."""
        if self.method == DOWNSCALE:
            return "before the processor"
        return ", ".join(pruner.info.stage for pruner in self.pruners())

    @property
    def method_source(self) -> str | list[Pruner]:
        """What `vtprune.wrap` takes: the folder with the weights, or the pruners."""
        return self.folder or self.pruners()

    @property
    def finds_keep(self) -> bool:
        """Whether the method finds out itself how much to keep, image by image."""
        return self.method != DOWNSCALE and any(isinstance(one, Growing) for one in self.pruners())

    @property
    def own_model(self) -> str:
        """The folder with the model that the weights were trained with, "" where any model will do."""
        return self.folder if self.folder and (Path(self.folder) / "config.json").is_file() else ""

    @property
    def untrained(self) -> str:
        """What a message says where methods of this setting have to be trained and are not, "" elsewhere."""
        return "" if self.folder else untrained(self.pruners())

    def pruner(self) -> Pruner:
        """The pruner itself, the last of several; raises VTPruneError for an unknown method or option."""
        return self.pruners()[-1]


def folder_setting(folder: str) -> Setting:
    """The setting that a folder's vtprune_config.json holds; raises VTPruneError."""
    found = load_config(folder)
    pruners = found if isinstance(found, list) else [found]
    content = json.dumps(to_dict(found), sort_keys=True)
    methods = "+".join(pruner.name for pruner in pruners)
    path = Path(folder).resolve()
    trained = str(path) if (path / WEIGHTS_NAME).is_file() else ""
    if not trained and any(isinstance(pruner, Trained) for pruner in pruners):
        raise InputError(f"{folder}: {methods} needs the weights that `vtprune train` writes, {WEIGHTS_NAME}")
    return Setting(methods, pruners[-1].keep, config=content, title=path.name, folder=trained, stamp=_stamp(path))


def _stamp(folder: Path) -> str:
    """Changes with the weights in a folder, "" where there are none."""
    found = [path for path in sorted(folder.glob("*.safetensors")) if path.is_file()]
    if not (folder / WEIGHTS_NAME).is_file():
        return ""
    sizes = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in found]
    return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()


def holds_method(folder: str) -> bool:
    """Whether a model's folder holds a method, too."""
    return (Path(folder) / CONFIG_NAME).is_file()


def for_videos_alone(method: str) -> bool:
    """Whether a method compares frames, so that images stay whole."""
    kind = pruner_class(method)
    return issubclass(kind, BeforeDecoder) and kind.videos_only


def all_methods() -> list[str]:
    """Every method that is known, third-party ones included, but for those that have to be trained, that act in
    training alone, and that do nothing to images."""
    known = [name for name in available() if name != UNPRUNED and not issubclass(pruner_class(name), Trained)]
    return [name for name in known if not for_videos_alone(name) and not _for_training(name)]


def measurable(methods: Sequence[str], *, videos: bool = False) -> list[str]:
    """The methods whose one prefill is measured by itself: `methods`, or every one that is known, those that leave
    images whole with `videos` alone; raises InputError for one that runs another method several times."""
    several = [text for text in methods if any(not one.folder and grows(one.name) for one in parse_entry(text))]
    if several:
        raise InputError(f"{several[0]} runs another method, several times if need be: measure that one")
    return list(methods) or [
        name for name in available() if not grows(name) and (videos or not for_videos_alone(name))
    ]


def _for_training(method: str) -> bool:
    kind = pruner_class(method)
    return issubclass(kind, InLayers) and kind.for_training


def trained_folders() -> list[str]:
    """The bundled folders of methods that have to be trained, as `--methods` takes them."""
    return [str(folder) for folder in TRAINED]


def ablations() -> list[str]:
    """Every method that merges, with its merging off, as `--methods` takes it."""
    found = []
    for name in all_methods():
        method = pruner_class(name)
        options = {field.name for field in fields(method)}
        keep = STAGED_ABLATION_KEEP if issubclass(method, Dropping) else ABLATION_KEEP
        found += [f"{name}:{option}=False:keep={keep}" for option in MERGE_OPTIONS if option in options]
    return found


def build_settings(methods: Sequence[str], keeps: Iterable[int | float]) -> list[Setting]:
    """The unpruned model, then every method at every keep, or at the one among its options, and every folder at its
    own; raises InputError for what does not exist.

    Of several stages that are joined by +, `keeps` is for the last one; the others say their own, or have their
    method's.
    """
    keeps = list(keeps)
    settings, folders = [Setting(UNPRUNED)], set[str]()
    try:
        for text in methods:
            stages = parse_entry(text)
            if len(stages) > 1:
                settings += _joined(stages, keeps)
            elif stages[0].folder:
                settings.append(folder_setting(stages[0].name))
                folders.add(settings[-1].key())
            else:
                settings += _single(stages[0], keeps)
        for setting in settings:
            setting.pruners()
    except (VTPruneError, TypeError) as error:
        raise InputError(str(error)) from error
    # Two folders may have one name; what they hold tells them apart.
    unique = {setting.key(): setting for setting in settings}
    titles = Counter(setting.title for key, setting in unique.items() if key in folders)
    return [
        replace(setting, title=f"{setting.title}-{key[:4]}")
        if key in folders and titles[setting.title] > 1
        else setting
        for key, setting in unique.items()
    ]


def takes_keep(method: str) -> bool:
    """Whether an entry of `--methods` leaves open how much is kept; raises InputError for what cannot be read."""
    last = parse_entry(method)[-1]
    return not last.folder and last.name != UNPRUNED and not grows(last.name) and "keep" not in dict(last.options)


def grows(method: str) -> bool:
    """Whether a method finds out how much to keep."""
    return method != DOWNSCALE and issubclass(pruner_class(method), Growing)


def _single(stage: Stage, keeps: Sequence[int | float]) -> list[Setting]:
    """A method at every keep, or at its own; once if it finds out how much to keep."""
    options = read_options(UNPRUNED if stage.name == DOWNSCALE else stage.name, dict(stage.options))
    own = [options.pop("keep")] if "keep" in options else []
    if stage.name == UNPRUNED:
        if own not in ([], [None], [1.0]) or (own == [1] and type(own[0]) is int):
            raise InputError(f"keep: {UNPRUNED} prunes nothing, so keep={own[0]!r} would not be met")
        return []
    if grows(stage.name):
        return [Setting(stage.name, None, tuple(options.items()))]
    return [Setting(stage.name, keep, tuple(options.items())) for keep in own or keeps]


def _joined(stages: Sequence[Stage], keeps: Sequence[int | float]) -> list[Setting]:
    """Several stages in one, at every keep of the last one, or at its own."""
    last = stages[-1]
    title = "+".join(stage.text for stage in stages)
    if last.folder or "keep" in dict(last.options):
        texts = [title]
    else:
        separator = "," if last.options else ":"
        texts = [f"{title}{separator}keep={keep!r}" for keep in keeps]
    found = []
    for text in texts:
        pruners = resolve(text)
        found.append(
            Setting(
                "+".join(pruner.name for pruner in pruners),
                pruners[-1].keep,
                config=json.dumps(to_dict(pruners), sort_keys=True),
                title=title,
            )
        )
    return found
