"""Methods that have to know something on the host before they can go on: what all images of a batch need to know is
read back at once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Sequence
from typing import Any, ParamSpec, TypeVar

import numpy.typing as npt
import torch
from torch import Tensor

P = ParamSpec("P")
S = TypeVar("S")
T = TypeVar("T")
Array = npt.NDArray[Any]
# Yields tensors, is sent what they hold, and returns its answer.
Asking = Generator[Tensor, Array, T]
# The most that is copied to go in one transfer with others.
MOST_BYTES = 2**26
_BY_STEPS = "_vtprune_by_steps"


def asking(function: Callable[P, Asking[T]]) -> Callable[P, T]:
    """Lets a function (of a method, say `select`) wait for values: it yields a tensor and is sent its values.

    Called like any other it answers like any other. `started` runs it step by step, so that the same function goes on
    for every image of a batch before the device is waited for. A step must not end inside a block that changes how
    torch computes (`no_grad`).
    """

    @functools.wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> T:
        return together([function(*args, **kwargs)])[0]

    # Both, as whoever wraps it copies what is set on it.
    setattr(alone, _BY_STEPS, (alone, function))
    return alone


def started(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Asking[T]:
    """A call of a function that may be one that asks, to be run by `together`, or by `yield from`."""
    whole, by_steps = getattr(function, _BY_STEPS, (None, None))
    if by_steps is None or getattr(function, "__func__", function) is not whole:
        return function(*args, **kwargs)
    owner = getattr(function, "__self__", None)
    own = args if owner is None else (owner, *args)
    return (yield from by_steps(*own, **kwargs))


def together(calls: Sequence[Asking[T]]) -> list[T]:
    """The answers of calls that go on side by side: what all of them ask for is read back as one tensor."""
    answers: dict[int, T] = {}
    told: dict[int, Any] = dict.fromkeys(range(len(calls)))
    while told:
        questions: dict[int, Tensor] = {}
        for index, values in told.items():
            try:
                questions[index] = calls[index].send(values)
            except StopIteration as end:
                answers[index] = end.value
        if not questions:
            break
        told = dict(zip(questions, read_back(list(questions.values())), strict=True))
    return [answers[index] for index in range(len(calls))]


def answers_of(calls: Sequence[tuple[Callable[[S], T], S]]) -> list[T]:
    """The answers of functions that may ask, each with what it is called on, `together`."""
    if len(calls) == 1:
        function, given = calls[0]
        return [function(given)]
    return together([started(function, given) for function, given in calls])


def read_back(tensors: Sequence[Tensor]) -> list[Array]:
    """The values of tensors (bool, int or fp32, any shapes) on the host, in as few transfers as `MOST_BYTES` lets."""
    found: list[Array] = []
    waiting: list[Tensor] = []
    for tensor in tensors:
        if waiting and sum(one.nbytes for one in (*waiting, tensor)) > MOST_BYTES:
            found += _in_one(waiting)
            waiting = []
        waiting.append(tensor.detach())
    return found + _in_one(waiting)


def _in_one(tensors: list[Tensor]) -> list[Array]:
    if len(tensors) < 2:
        return [tensor.cpu().numpy() for tensor in tensors]
    device = tensors[0].device
    parts = [tensor.to(device).contiguous().reshape(-1).view(torch.uint8) for tensor in tensors]
    values, found, first = torch.cat(parts).cpu().numpy(), [], 0
    for tensor, part in zip(tensors, parts, strict=True):
        own = values[first : first + part.numel()].view(torch.empty(0, dtype=tensor.dtype, device="cpu").numpy().dtype)
        # A copy starts where numbers of its size may start.
        found.append(own.copy().reshape(tensor.shape))
        first += part.numel()
    return found
