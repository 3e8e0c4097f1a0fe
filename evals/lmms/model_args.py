"""`--model_args` of lmms-eval as text: arguments of the model, and a method with its options among them."""

from __future__ import annotations

import difflib
from collections.abc import Container, Iterable, Sequence
from typing import Any

from vtprune.errors import InputError
from vtprune.method.texts import (
    Stage,
    parse_entry,
    parse_options,
    parse_value,
    split_commas,
)

# Arguments of the model that no text stands for.
HANDED_IN = ("model", "processor")
# What `--model_args` may set; everything else is an option of the method.
ARGUMENTS = {
    "pretrained": "a model id, or a folder; the bundled LLaVA where it is left out",
    "method": "as fastv:keep=0.5,layers=(2,5); a folder of `vtprune train`; several, joined by +",
    "config": "a folder with vtprune_config.json, in place of method",
    "positions": "original, or compact",
    "device": "cpu, cuda, cuda:1, or auto",
    "device_map": 'auto, or JSON as {"": "cpu"}; for a model too large for one device, without device',
    "dtype": "auto, float32, bfloat16 or float16",
    "attn_implementation": "sdpa, eager, flash_attention_2, ...",
    "batch_size": "rows that are answered together",
    "max_new_tokens": "tokens of an answer, where a task sets none",
    "frames": "of each video, evenly spread over it",
}
# lmms-eval hands this one in, whatever the model.
REFUSED = ("max_batch_size",)


def parse_model_args(text: str, own: Sequence[str], options: Container[str] = ()) -> dict[str, Any]:
    """Texts by the names of `own` arguments; further options are in the text of `method`, or values by their names
    where there is no method.

    Options that follow `method=` are those of its last stage (method=fastv,keep=0.5,layers=(2,5)); those that stand
    before it are taken for those of the method, too, where it is a single one. Raises InputError for what is no
    name=value, for a name given twice, and for one that is not among the `options` of methods and looks like `own`.
    """
    found: dict[str, Any] = {}
    before: list[str] = []
    for part in split_commas(text):
        name, sign, value = (piece.strip() for piece in part.partition("="))
        if not sign or not name.isidentifier():
            raise InputError(f"model_args: cannot read {part!r}; give name=value, separated by commas")
        if name in HANDED_IN:
            raise InputError(f"model_args: {name} is handed in from Python alone; a model is named as pretrained=")
        if name in found:
            raise InputError(f"model_args: {name} is given twice")
        if name not in own:
            _check_name(name, own, options)
        if name in own:
            found[name] = value if name == "method" or value[:1] not in ("'", '"') else parse_value(value)
        elif "method" in found:
            found["method"] = _with_option(found["method"], part)
        else:
            before.append(part)
    if not before:
        return found
    if "method" not in found:
        return {**found, **dict(parse_options(",".join(before)))}
    if len(parse_entry(found["method"])) > 1:
        raise InputError(
            f"model_args: of several methods, which one does {', '.join(before)} belong to? Write it behind that one, "
            "as method=a:keep=192+b:keep=96"
        )
    for part in before:
        found["method"] = _with_option(found["method"], part)
    return found


def _check_name(name: str, own: Iterable[str], options: Container[str]) -> None:
    """Raises InputError for the name of no method's option that looks like that of an argument."""
    near = difflib.get_close_matches(name, own, n=1, cutoff=0.75)
    if near and name not in options:
        raise InputError(
            f"model_args: there is no {name}; did you mean {near[0]}? Beside the options of a method, which `vtprune "
            f"list --options` shows, there are {', '.join(ARGUMENTS)}"
        )


def _with_option(method: str, option: str) -> str:
    """A method's text with a further option at its end."""
    last = parse_entry(method)[-1]
    return f"{method}{':' if _is_bare(last) else ','}{option}"


def _is_bare(stage: Stage) -> bool:
    return not stage.folder and not stage.options
