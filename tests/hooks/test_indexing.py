"""Rows of states are taken by `index_select`: on a CPU an index in brackets takes five times as long for the same."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import vtprune
from tests.matrix import CACHE, PRUNERS
from tests.models import make, prompt, shown_rows
from vtprune.evals.speed.launches import place_in_code
from vtprune.method.pruner import Pruner


class Indexed(TorchDispatchMode):
    """Notes where rows of states are taken, or written, by an index in brackets."""

    def __init__(self) -> None:
        super().__init__()
        self.places = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("index", "index_put", "index_put_") and args[0].ndim > 1:
            given = [index for index in args[1] if isinstance(index, Tensor)]
            if len(given) == 1 and given[0].dtype == torch.int64 and given[0].ndim == 1:
                self.places[place_in_code()] += 1
        return func(*args, **(kwargs or {}))


ON_VIDEOS = [
    vtprune.EVS(keep=0.4), vtprune.DyCoke(), vtprune.VidCom2(keep=0.4), vtprune.HoliTom(keep=0.4),
    vtprune.FastVID(keep=0.4), vtprune.FramePool(), vtprune.FrameSkip(),
]  # fmt: skip


@pytest.mark.parametrize(
    ("pruner", "kind", "shown"),
    [
        *((one, "llava-clip", "an image") for one in [*PRUNERS, *CACHE]),
        *((one, "qwen2.5-vl", "a video") for one in ON_VIDEOS),
    ],
    ids=repr,
)
def test_a_prefill_takes_rows_by_their_places_alone(pruner: Pruner, kind: str, shown: str) -> None:
    inputs = prompt(kind, shown_rows(kind, shown)[:1])
    with torch.no_grad(), vtprune.wrapped(make(kind), pruner) as model:
        model(**inputs, use_cache=True)
        with Indexed() as found:
            model(**inputs, use_cache=True)
    found.places.pop("", None)
    assert not found.places
