"""What an lmms-eval task, or `--gen_kwargs`, asks of a generation: carried out as it says, or refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vtprune.errors import InputError

# Of these, whatever is given is handed to `generate`; what it may be, in words and as a test.
PASSED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "do_sample": ("True or False", lambda value: isinstance(value, bool)),
    "temperature": ("a number of at least 0", lambda value: _number(value) and value >= 0),
    "top_p": ("a number in [0, 1]", lambda value: _number(value) and 0 <= value <= 1),
    "top_k": ("a whole number of at least 0", lambda value: _whole(value, 0)),
    "num_beams": ("a whole number of at least 1", lambda value: _whole(value, 1)),
    "length_penalty": ("a number", lambda value: _number(value)),
    "repetition_penalty": ("a number above 0", lambda value: _number(value) and value > 0),
    "no_repeat_ngram_size": ("a whole number of at least 0", lambda value: _whole(value, 0)),
    "min_new_tokens": ("a whole number of at least 0", lambda value: _whole(value, 0)),
    "max_new_tokens": ("a whole number of at least 1", lambda value: _whole(value, 1)),
}
# Pictures go to the model's processor as they are, which is what this value asks for.
ASPECT, AS_IT_IS = "image_aspect_ratio", "original"
KNOWN = (*PASSED, "until", ASPECT)


@dataclass(frozen=True)
class Generation:
    """How to answer: stop texts, and the arguments of `generate` beside the inputs."""

    stops: tuple[str, ...] = ()
    arguments: dict[str, Any] = field(default_factory=dict)


def read_generation(given: dict[str, Any], max_new_tokens: int) -> Generation:
    """The generation that these options ask for; max_new_tokens: where they set none.

    Answers are greedy unless do_sample or, where that is left open, a temperature above 0 asks for samples. Raises
    InputError, naming it, for an option that is unknown, of no use beside the others, or of a value that cannot be.
    """
    options = {name: value for name, value in given.items() if value is not None}
    unknown = sorted(set(options) - set(KNOWN))
    if unknown:
        raise InputError(f"gen_kwargs: vtprune does not take {', '.join(unknown)}; it takes {', '.join(KNOWN)}")
    for name, value in options.items():
        if name in PASSED and not PASSED[name][1](value):
            raise InputError(f"gen_kwargs: {name} is {PASSED[name][0]}, got {value!r}")
    if options.get(ASPECT, AS_IT_IS) != AS_IT_IS:
        raise InputError(
            f"gen_kwargs: {ASPECT}={options[ASPECT]!r} is not carried out: pictures go to the processor as they are "
            f"({ASPECT}={AS_IT_IS})"
        )
    arguments = {name: value for name, value in options.items() if name in PASSED}
    return Generation(_stops(options.get("until")), {"max_new_tokens": max_new_tokens, **_decoding(arguments)})


def _decoding(options: dict[str, Any]) -> dict[str, Any]:
    """Sampling, beams, or neither."""
    temperature = options.get("temperature")
    sample = options.get("do_sample", bool(temperature))
    if sample and temperature == 0:
        raise InputError("gen_kwargs: do_sample=True and temperature=0 exclude each other; leave one of them out")
    if not sample:
        idle = [
            f"{name}={options[name]!r}"
            for name, silent in (("temperature", (0,)), ("top_p", (0, 1)), ("top_k", (0, 1)))
            if name in options and options[name] not in silent
        ]
        if idle:
            raise InputError(
                f"gen_kwargs: {', '.join(idle)} would do nothing, since the answers are greedy (do_sample="
                f"{options.get('do_sample')}); give do_sample=True to sample, or temperature=0, top_p=1, top_k=0"
            )
    if options.get("num_beams", 1) == 1 and options.get("length_penalty", 1) != 1:
        raise InputError("gen_kwargs: length_penalty is for beams; give num_beams as well")
    if options.get("min_new_tokens", 0) > options.get("max_new_tokens", math.inf):
        raise InputError("gen_kwargs: min_new_tokens is above max_new_tokens")
    # A checkpoint's own generation config may sample: what is not asked for is switched off.
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"num_beams": 1, **options, **({"do_sample": True} if sample else greedy)}


def _stops(until: Any) -> tuple[str, ...]:
    texts = [until] if isinstance(until, str) else [] if until is None else until
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"gen_kwargs: until is a text or a list of texts, got {until!r}")
    return tuple(text for text in texts if text)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
