"""FastV: after a few decoder layers the tokens that the last prompt token looks at stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtprune.method import schedules
from vtprune.method.facts import Work
from vtprune.method.registry import register
from vtprune.method.stages import Query
from vtprune.method.views import DecoderLayer
from vtprune.pruners.parts.checks import check_share
from vtprune.pruners.parts.prompt_attention import last_attention
from vtprune.pruners.parts.staged import Staged


@register(
    "fastv",
    paper="An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large Vision-Language "
    "Models",
    arxiv="2403.06764",
    licence="none stated",
    needs="the last prompt token's attention in one decoder layer",
)
@dataclass(frozen=True)
class FastV(Staged):
    """FastV: An Image is Worth 1/2 Tokens After Layer 2 (ECCV 2024, arXiv 2403.06764).

    Before decoder layer K (`layers`, by default 2 of 32 as a fraction of the depth) the tokens stay that the last
    prompt token gives the most attention to in layer K - 1: softmax over the whole prompt, mean over heads. `ratio` is
    the paper's R, the share that is dropped there, 0.5 by default; `keep` instead counts the mean over decoder layers
    and contradicts a `ratio`. Another `schedule` than "constant" drops at more layers, by the same score.

    Kept tokens keep their positions, as in the released code, whose selection this is; caches of the layers before K
    hold all tokens. Reference: pkunlp-icler/FastV, no licence file. Departures from it: the layer whose attention is
    read is not run a second time (the code caches its keys twice), the image may stand anywhere in the prompt, and a
    later turn's image is ranked by attention within that turn.
    """

    ratio: float | None = None

    published_layers: ClassVar[tuple[int, ...]] = (2,)
    query = Query.LAST

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.name, "ratio", self.ratio, self.keep)

    def own_ratios(self, layers: tuple[int, ...]) -> schedules.Ratios:
        """All before K, 1 - R from K on."""
        return self.dropped_once(layers, 0.5 if self.ratio is None else 1 - self.ratio)

    def scores(self, layer: DecoderLayer) -> Tensor:
        """The attention of the last prompt token: (N,)."""
        return last_attention(layer)

    def flops(self, work: Work) -> int:
        """One row of attention a layer."""
        return sum(2 * tokens * work.attention_width for tokens in work.decoder_tokens)
