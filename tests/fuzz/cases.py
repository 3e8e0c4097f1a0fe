"""A case of the fuzz: everything that a seed stands for."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import vtprune
from tests.fuzz.architectures import ARCHITECTURES, Architecture, architecture
from tests.fuzz.methods import draw_pruners
from tests.fuzz.prompts import Layout, draw_layout
from vtprune.method.pruner import Pruner


@dataclass(frozen=True)
class Case:
    """compact: whether positions are asked to be renumbered; routers: the scale of the weights that routers are
    given, 0 for those that they start with."""

    seed: int
    shape: Architecture
    layout: Layout
    pruners: tuple[Pruner, ...]
    attention: str
    compact: bool
    routers: float

    def __str__(self) -> str:
        return (
            f"seed {self.seed} (replay: pytest tests/test_fuzz.py --first {self.seed} --cases 1)\n"
            f"  model: {self.shape}\n  prompt: {self.layout}\n  pruners: {list(self.pruners)}\n"
            f"  attention: {self.attention}, compact: {self.compact}, routers: {self.routers}"
        )

    @property
    def names(self) -> str:
        """The methods, joined."""
        return "+".join(pruner.name for pruner in self.pruners)

    @property
    def renumbers(self) -> bool:
        """Whether kept tokens get new positions: by request, or as released code does, but never on three axes."""
        released = any(pruner.renumbers for pruner in self.pruners)
        return not self.shape.is_qwen and (self.compact or released)


def draw(seed: int) -> Case:
    """The same case for the same seed, each time."""
    rng = Random(f"case {seed}")
    shape = architecture(rng.randrange(ARCHITECTURES))
    if shape.side == 1:
        # An image of one token shows less than others do.
        shape = architecture(rng.randrange(ARCHITECTURES))
    pruners = tuple(draw_pruners(rng, shape))
    returns = any(isinstance(pruner, vtprune.LazyLLM) for pruner in pruners)
    layout = draw_layout(rng, shape)
    # In fp64 transformers' own eager attention is NaN where padding comes first: nothing but masked keys, whose fp64
    # minimum is minus infinity in the softmax's fp32.
    eager = rng.random() < 0.35 and layout.side == "right"
    return Case(
        seed=seed,
        shape=shape,
        layout=layout,
        pruners=pruners,
        attention="eager" if eager else "sdpa",
        compact=rng.random() < 0.2 and not shape.is_qwen and not returns,
        routers=rng.choice([0.0, 1.0, 3.0]),
    )
