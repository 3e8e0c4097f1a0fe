"""Random streams of vision tokens that the tests of methods share."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st

from vtprune.method.pruner import Pruner
from vtprune.method.views import LayerSignals, VisionStream
from vtprune.pruners import (
    CDPruner,
    DivPrune,
    FoPru,
    Grid,
    HoloV,
    Pool,
    Random,
    VFlowOpt,
)

few = settings(max_examples=40, deadline=None)
grids = st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 9))

SELECTING: list[Pruner] = [
    Random(),
    Grid(),
    Pool(),
    FoPru(),
    FoPru(softmax=False),
    FoPru(strategy="row"),
    HoloV(),
    HoloV(crops=3, tau=2.0, alpha=0.5),
    HoloV(variant="released"),
    DivPrune(),
    VFlowOpt(alpha=0.0),
    VFlowOpt(alpha=0.0, recycle=False),
    CDPruner(),
    CDPruner(negate=True, theta=0.5),
]


def stream(
    grid: tuple[int, int, int] = (1, 6, 6), budget: int = 9, *, seed: int = 0, prefix: int = 1, group: int = 1
) -> VisionStream:
    """A stream of random vectors with the signals of a random layer of 2 heads."""
    generator = torch.Generator().manual_seed(seed)
    total = math.prod(grid)
    states = torch.randn(3, 2, prefix + total * group, 4, generator=generator)
    return VisionStream(
        features=torch.randn(total, 5, generator=generator),
        grid=grid,
        indices=torch.arange(total),
        total=total,
        budget=budget,
        signals=LayerSignals(*states.unbind(), scale=0.5, prefix=prefix, group=group),
        pixels=torch.randn(3, 8, 8, generator=generator),
        text=torch.zeros(2, 5),
    )


def with_nan(whole: VisionStream) -> VisionStream:
    """The stream with one NaN in a key."""
    assert whole.signals is not None
    key = whole.signals.key.clone()
    key[0, -1, 0] = float("nan")
    return replace(whole, signals=replace(whole.signals, key=key))


def picture_stream(grid: tuple[int, int, int] = (1, 6, 6), budget: int = 9, **options: int) -> VisionStream:
    """A stream with a picture of 4 x 4 pixels a token."""
    whole = stream(grid, budget, **options)
    picture = torch.rand(grid[0], 3, 4 * grid[1], 4 * grid[2], generator=torch.Generator().manual_seed(5))
    return replace(whole, picture=picture, pixels=picture[0] * 2 - 1)


def video(frames: int = 8, *, budget: int = 20, seed: int = 0, still: bool = False) -> VisionStream:
    """A stream of frames of 2 x 3 tokens, without signals; still: all of them alike."""
    found = replace(stream((frames, 2, 3), budget, seed=seed), kind="video", signals=None)
    features = found.features.unflatten(0, (frames, 6))
    return replace(found, features=features[:1].expand(frames, -1, -1).flatten(0, 1)) if still else found


def kept_by(pruner: Any, shown: VisionStream) -> list[int]:
    """What a method keeps of a stream."""
    selection = pruner.select(shown)
    return list(range(shown.features.shape[0])) if selection is None else selection.kept.tolist()
