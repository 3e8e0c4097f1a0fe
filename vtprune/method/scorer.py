"""A method from a function: scores in, the best tokens of each image out."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from vtprune.errors import VTPruneError
from vtprune.method.answers import Selection
from vtprune.method.checks import check_scores
from vtprune.method.facts import Work
from vtprune.method.options import check_type
from vtprune.method.registry import register
from vtprune.method.stages import BeforeDecoder, Read
from vtprune.method.views import VisionStream

# What a score may be made of, and the fields of the stream that are filled for it.
FIELDS = {Read.ENCODER: "signals", Read.LAST_LAYER: "last_signals", Read.PICTURE: "picture"}
READS = (*FIELDS, Read.WHOLE_GRID)


def scorer(
    name: str, *, reads: Iterable[Read] = (), flops: Callable[[Work], int] | None = None, **info: Any
) -> Callable[[Callable[..., Tensor]], type[BeforeDecoder]]:
    """Decorator that makes a method, known by `name`, of a function `scores(stream) -> (N,)`.

    The function is called once for each image; its tokens with the highest scores enter the decoder, ties to the
    lowest index. Keyword-only arguments of the function, which need a type and a default, become the method's options.
    reads: what of the stream has to be gathered; flops: what scoring one image costs; info: as for `register` (paper,
    arxiv, licence, needs). Answers the method's class: `wrap(model, name, keep=64)` and `wrap(model, answer(keep=64))`
    are the same. Raises VTPruneError for a name that is taken, and for a function of another form.
    """
    if not isinstance(name, str):
        raise VTPruneError(f'scorer takes the method\'s name first: @vtprune.scorer("mine"), got {name!r}')
    reading = _checked_reads(name, reads)

    def decorate(function: Callable[..., Tensor]) -> type[BeforeDecoder]:
        options = _options(name, function)
        members = {
            "select": _selecting(function, [option for option, _, _ in options]),
            "input_reads": reading,
            "__post_init__": _checking(options),
            "__doc__": function.__doc__,
            "__module__": function.__module__,
        }
        if flops is not None:
            members["flops"] = lambda self, work: flops(work)
        fields = [(option, hint, dataclasses.field(default=default)) for option, hint, default in options]
        made = dataclasses.make_dataclass(
            function.__name__, fields, bases=(BeforeDecoder,), namespace=members, frozen=True
        )
        return register(name, **info)(made)

    return decorate


def _checked_reads(name: str, reads: object) -> frozenset[Read]:
    found = list(reads) if isinstance(reads, Iterable) else [reads]
    known = frozenset(one for one in READS if one in found)
    if len(known) != len(set(found)):
        choices = ", ".join(f"vtprune.{one}" for one in READS)
        raise VTPruneError(f"scorer({name!r}): reads is a list of {choices}, got {reads!r}")
    return known


def _checking(options: list[tuple[str, Any, Any]]) -> Callable[[BeforeDecoder], None]:
    def check(self: BeforeDecoder) -> None:
        BeforeDecoder.__post_init__(self)
        for option, hint, _ in options:
            check_type(self.name, option, getattr(self, option), hint)

    return check


def _options(name: str, function: Callable[..., Tensor]) -> list[tuple[str, Any, Any]]:
    """Name, type and default of the function's keyword-only arguments."""
    parameters = list(inspect.signature(function).parameters.values())
    first, others = parameters[:1], parameters[1:]
    if not first or first[0].kind is inspect.Parameter.KEYWORD_ONLY:
        raise VTPruneError(f"scorer({name!r}) decorates a function of one argument, the image's VisionStream")
    for one in others:
        if one.kind is not inspect.Parameter.KEYWORD_ONLY or one.default is inspect.Parameter.empty:
            raise VTPruneError(
                f"scorer({name!r}): {one.name} is to be an option, so it is a keyword-only argument with a default "
                f"(def {function.__name__}(stream, *, {one.name}=...))"
            )
        if hasattr(BeforeDecoder, one.name):
            raise VTPruneError(f"scorer({name!r}): every method has a {one.name} already; name the option otherwise")
    hints = typing.get_type_hints(function)
    for one in others:
        if one.name not in hints:
            raise VTPruneError(f"scorer({name!r}): {one.name} needs a type ({one.name}: float = {one.default!r})")
        check_type(f"scorer({name!r})", one.name, one.default, hints[one.name])
    return [(one.name, hints[one.name], one.default) for one in others]


def _selecting(function: Callable[..., Tensor], options: list[str]) -> Callable[..., Selection]:
    def select(self: BeforeDecoder, stream: VisionStream) -> Selection:
        """Keeps the tokens with the highest scores; raises ScoreError for NaN."""
        try:
            scores = function(stream, **{option: getattr(self, option) for option in options})
        except (AttributeError, TypeError) as error:
            for read, field in FIELDS.items():
                if getattr(stream, field) is None:
                    error.add_note(f"{self.name}: stream.{field} is None without reads=[vtprune.{read}]")
            raise
        tokens = stream.features.shape[0]
        if not isinstance(scores, Tensor) or scores.shape != (tokens,):
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise VTPruneError(f"{self.name}: one score a token is wanted, a tensor of ({tokens},), got {got}")
        return Selection.best(check_scores(scores.detach(), self.name), stream.budget)

    return select
