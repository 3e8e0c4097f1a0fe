"""PyramidDrop: the decoder drops a fixed share of the tokens at the end of each of its stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtprune.method.facts import Work
from vtprune.method.registry import register
from vtprune.method.stages import Query
from vtprune.pruners.parts.checks import check_share
from vtprune.pruners.parts.prompt_attention import next_layer_flops
from vtprune.pruners.parts.staged import Stepped


@register(
    "pyramid_drop",
    paper="PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction",
    arxiv="2410.17247",
    licence="Apache-2.0",
    needs="the last prompt token's query, and all keys, of the decoder layers before which tokens drop",
    variants=("paper", "released"),
)
@dataclass(frozen=True)
class PyramidDrop(Stepped):
    """PyramidDrop: Pyramid Visual Redundancy Reduction (CVPR 2025, arXiv 2410.17247).

    Before each of `layers` (8, 16 and 24 of 32 as fractions of the depth) the share `factor` (lambda, 0.5) of the
    tokens stays: those that the last prompt token attends to most, by the query and the keys that this very layer
    would compute (softmax over the whole prompt, mean over heads). `keep` instead counts the mean over decoder layers
    and sets the factor; where that would fall below 0.5, the stages move towards the first layers, as the papers that
    compare at low budgets do by hand. Explicit `layers` stay.

    Reference: Cooperx521/PyramidDrop. Departures from the released code: kept tokens keep their positions (the code
    renumbers them after every drop: variant="released", where positions are 1-D), every image of a prompt is pruned
    (the code: the first), and only the last token's query is computed (the code: all). When training, the last token
    of the prompt scores, not the tokens before each answer.
    """

    factor: float | None = None
    variant: str = "paper"

    published_layers: ClassVar[tuple[int, ...]] = (8, 16, 24)
    query = Query.NEXT_LAYER

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.name, "factor", self.factor, self.keep)

    @property
    def renumbers(self) -> bool:
        """True for variant="released"."""
        return self.variant == "released"

    @property
    def step(self) -> float:
        """Lambda."""
        return 0.5 if self.factor is None else self.factor

    def flops(self, work: Work) -> int:
        """The last token's query and all keys once for a row's images, and one row of attention for each, a stage."""
        return next_layer_flops(work)
