"""What a visitor may choose of a method, built from its fields, and what was chosen, read back safely."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import textwrap
import types
import typing
from dataclasses import dataclass
from enum import Enum
from typing import Any

from vtprune.assets import calibration_of
from vtprune.errors import InputError, VTPruneError
from vtprune.evals.demo.models import Loaded
from vtprune.evals.settings import Setting, all_methods, for_videos_alone, grows
from vtprune.loading.prompts import takes_videos
from vtprune.method.catalogue import methods
from vtprune.method.facts import ModelFacts
from vtprune.method.pruner import Pruner, Tunable
from vtprune.method.registry import available, create, pruner_class, read_options
from vtprune.method.texts import parse_options, show_value

# What every method has, and the page asks for by itself or, as a visitor shows one thing at a time, not at all.
COMMON = ("model", "keep", "keep_video", "_for_videos")
# Tokens of an image for which ranges are told.
TOKENS = 576.0
STEPS = 100
AUTOMATIC = "automatic"
# What a whole text of options may have at the most.
LONGEST = 500
# Characters of a help, and the helps of fields that mean the same in every method that has them.
HELP = 160
USUAL = {
    "variant": "The method as its paper says, or as its authors' code does it",
    "layers": "Decoder layers at which tokens drop, as 2, 5; empty: the method's own",
    "schedule": "How many tokens are left layer by layer",
    "ratio": "The share that drops at each of the layers, instead of keep; empty: what keep asks for",
    "factor": "The share that stays at each of the layers, instead of keep; empty: what keep asks for",
    "merge": "Whether what leaves flows into what is most like it",
    "recycle": "Whether the best of what drops flows together into new tokens",
    "text": "Whether text leaves the cache, too",
    "pooling": "Whether scores are smoothed along the sequence or on the image's grid",
    "version": "1: the published method, 2: its successor, SparseVLM+",
}


class Kind(Enum):
    """How an option is chosen."""

    SLIDER = "slider"
    NUMBER = "number"
    SWITCH = "switch"
    CHOICE = "choice"
    LAYERS = "layers"


@dataclass(frozen=True)
class Option:
    """One field of a method. value: what it stands at, None where the method finds it itself; low, high, step: of a
    slider; choices: of a choice, the first of them AUTOMATIC where the method may find it itself; help: one line."""

    name: str
    kind: Kind
    value: Any
    help: str
    low: float = 0.0
    high: float = 1.0
    step: float = 0.01
    choices: tuple[Any, ...] = ()


def choosable() -> list[str]:
    """Methods that work without having been trained, and on pictures."""
    return all_methods()


def choosable_on(loaded: Loaded) -> list[str]:
    """The same but for those that were not calibrated on a model, and where it takes videos those that compare
    frames."""
    found = [name for name in choosable() if not grows(name) or calibration_of(loaded.source) is not None]
    if not takes_videos(loaded.processor):
        return found
    return [*found, *(name for name in available() if for_videos_alone(name))]


def as_trained(loaded: Loaded) -> str:
    """What the page calls the method that a model was trained with, "" where there is none."""
    return f"{loaded.trained.method}, as trained" if loaded.trained is not None else ""


def options_of(method: str, facts: ModelFacts) -> list[Option]:
    """The options of a method on a model, in the order of its fields; those that name files are left out."""
    kind = pruner_class(method)
    bare: Pruner = kind()
    space = bare.search_space(TOKENS)
    try:
        bound: Pruner = bare.bind(facts)
    except VTPruneError:
        bound = bare
    hints = typing.get_type_hints(kind)
    found = []
    for field in dataclasses.fields(kind):
        if field.name in COMMON:
            continue
        types_ = _types(hints[field.name])
        choices = _choices(kind, field.name, space.get(field.name))
        help_ = _help(kind, field.name)
        default, own = field.default, getattr(bound, field.name)
        tunable = space.get(field.name)
        if choices or (types_ & {bool} and type(None) in types_):
            given = choices or (True, False)
            automatic = (AUTOMATIC,) if default is None and None not in given else ()
            value = AUTOMATIC if automatic else default
            found.append(Option(field.name, Kind.CHOICE, value, help_, choices=(*automatic, *given)))
        elif bool in types_:
            found.append(Option(field.name, Kind.SWITCH, default, help_))
        elif (
            tunable is not None
            and types_ & {int, float}
            and ((start := tunable.start if own is None else own) is not None)
        ):
            found.append(_slider(field.name, tunable, start, help_))
        elif types_ & {int, float}:
            # What takes several numbers instead, one a layer, takes one here.
            found.append(Option(field.name, Kind.NUMBER, default, help_))
        elif tuple in types_:
            found.append(Option(field.name, Kind.LAYERS, None, help_))
    return found


def _types(hint: Any) -> set[Any]:
    """The plain types of a hint."""
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return {typing.get_origin(part) or part for part in parts}


def _choices(kind: type[Pruner], name: str, tunable: Tunable | None) -> tuple[Any, ...]:
    """The values that a field may have, where they can be counted."""
    if name == "variant":
        return kind.info.variants if len(kind.info.variants) > 1 else ()
    if name == "schedule":
        return tuple(getattr(kind, "schedule_names", ()))
    return () if tunable is None or set(tunable.choices) <= {True, False} else tunable.choices


def _slider(name: str, tunable: Tunable, value: float, help_: str) -> Option:
    # Rounded outwards, so that the range holds what the method has found.
    low, high = math.floor(1000 * tunable.low) / 1000, math.ceil(1000 * tunable.high) / 1000
    step = 1.0 if tunable.whole else round((high - low) / STEPS, 4)
    return Option(name, Kind.SLIDER, round(min(max(value, low), high), 3), help_, low=low, high=high, step=step)


def _help(kind: type[Pruner], name: str) -> str:
    """What a method's docstring says of a field (`name: ...`), what it means in every method, or the sentence of the
    docstring that has the `name` in it; at the most HELP characters."""
    doc = " ".join((inspect.getdoc(kind) or "").split())
    fields = "|".join(field.name for field in dataclasses.fields(kind) if field.name != name)
    told = re.search(rf"(?:^|[.;] |, ){name}(?:, \w+)*: (.+?)(?=\.(?:\s|$)|; (?:{fields}): )", doc)
    if told is None and name not in USUAL:
        told = re.search(rf"((?:[^.`]|`[^`]*`|\.(?=\S))*`{name}`(?:[^.`]|`[^`]*`|\.(?=\S))*)\.(?:\s|$)", doc)
    text = told[1].strip().replace("`", "") if told else USUAL.get(name, f"{name} of {kind.__name__}")
    return textwrap.shorten(text[:1].upper() + text[1:] + ".", HELP, placeholder=" …")


def changed(method: str, facts: ModelFacts, text: str, name: str, value: Any) -> str:
    """The text of all options, as `vtprune` takes it ("alpha=2.0,crops=8"), once one of them was moved to a value; one
    that stands where the method has it is left out. What cannot be read is written down as it is, and told of when it
    is asked with."""
    option = next(one for one in options_of(method, facts) if one.name == name)
    try:
        held = dict(parse_options(text))
    except VTPruneError:
        held = {}
    held.pop(name, None)
    value = _read(option, value)
    if value not in (None, AUTOMATIC, ()) and value != option.value:
        if isinstance(value, float) and value.is_integer() and _whole(method, option):
            value = int(value)
        held[name] = value
    return ",".join(f"{one}={show_value(own)}" for one, own in held.items())


def _read(option: Option, value: Any) -> Any:
    """What a control holds, as a value of its option; a text that is none stays a text."""
    if option.kind is Kind.LAYERS:
        parts = [part for part in re.split(r"[\s,()]+", str(value or "")) if part]
        return tuple(int(part) for part in parts) if all(part.isdigit() for part in parts) else str(value)
    if option.kind is Kind.NUMBER and isinstance(value, str):
        try:
            return float(value) if value.strip() else None
        except ValueError:
            return value
    return value


def _whole(method: str, option: Option) -> bool:
    """Whether an option is a whole number."""
    types_ = _types(typing.get_type_hints(pruner_class(method))[option.name])
    return int in types_ and float not in types_


def chosen(loaded: Loaded, method: str, keep: float, options: str | None = "") -> Setting:
    """What a visitor chose, keep in percent of an image's tokens; raises InputError with what would be right.

    Nothing that is chosen names a file: a method is one of `choosable_on`, or what came with the model.
    """
    if method and method == as_trained(loaded):
        assert loaded.trained is not None
        return loaded.trained
    if method not in choosable_on(loaded):
        known = [*choosable_on(loaded), *([as_trained(loaded)] if loaded.trained else [])]
        raise InputError(f"method: choose one of {', '.join(known)}")
    if isinstance(keep, bool) or not isinstance(keep, int | float) or not 0 < keep <= 100:
        raise InputError(f"keep: a share of the image's tokens above 0% and up to 100%, got {keep!r}")
    options = options or ""
    if len(options) > LONGEST:
        raise InputError(f"options: at the most {LONGEST} characters")
    given = read_options(method, dict(parse_options(options))) if options.strip() else {}
    allowed = {option.name: option for option in options_of(method, loaded.facts)}
    for name, value in given.items():
        if name not in allowed:
            raise InputError(
                f"options: {name!r} is not chosen here; {method} has {', '.join(sorted(allowed)) or 'no options'}"
            )
        option = allowed[name]
        if option.kind is Kind.SLIDER and isinstance(value, int | float) and not option.low <= value <= option.high:
            raise InputError(f"options: {name} is chosen from {option.low:g} to {option.high:g} here, got {value!r}")
    setting = Setting(method, None if grows(method) else keep / 100, tuple(given.items()))
    try:
        create(method, keep=setting.keep, **given)
    except TypeError as error:
        raise InputError(f"options: {error}") from error
    return setting


def about(method: str) -> str:
    """The paper, and where the method acts."""
    info = methods()[method]
    found = " It finds out how much to keep, whatever is chosen below, so that as many answers as agreement says stay "
    paper = f"{info.paper} ([arXiv {info.arxiv}](https://arxiv.org/abs/{info.arxiv}))" if info.arxiv else info.paper
    return f"{paper or 'A baseline'}. Acts: {info.stage}.{found + 'as they are.' if grows(method) else ''}"
