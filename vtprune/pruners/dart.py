"""DART: after a few decoder layers the tokens stay that are least like a few pivots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtprune.method import schedules
from vtprune.method.answers import Selection
from vtprune.method.checks import check_scores
from vtprune.method.choosing import top
from vtprune.method.facts import Work
from vtprune.method.pruner import Tunable
from vtprune.method.registry import register
from vtprune.method.stages import Query, Read
from vtprune.method.views import DecoderLayer
from vtprune.pruners.parts.checks import check_count, check_share
from vtprune.pruners.parts.cosines import unit_vectors
from vtprune.pruners.parts.staged import Dropping

# The released scripts' "0.778": 128 of 576 tokens are left.
PUBLISHED_RATIO = 7 / 9


def key_norms(key: Tensor) -> Tensor:
    """(n,) the L1 norms of the keys (H, n, d) of n tokens, over all heads together."""
    return key.abs().sum(dim=(0, 2))


def choose_pivots(norms: Tensor, places: Tensor, count: int) -> Tensor:
    """(count,) ascending: of the rising `places` (P,) those with the highest `norms` (P,), ties to the first; all of
    them where there are fewer."""
    return places.index_select(0, top(norms, count))


def even_takes(count: int, pivots: int) -> list[int]:
    """How many of `count` tokens each of the pivots takes: equally many, the first ones one more where it does not
    divide."""
    share, rest = divmod(count, pivots)
    return [share + (place < rest) for place in range(pivots)]


def least_alike(cosines: Tensor, taken: Tensor, takes: Sequence[int]) -> Tensor:
    """(N,) bool: which tokens are taken in the end, of N of which some are `taken` (N,) already.

    cosines: (P, N) of each pivot with each token. One pivot after the other takes as many as `takes` (P,) says of
    those that are left, the ones with the lowest cosine to it, ties to the lowest index.
    """
    for row, count in zip(cosines, takes, strict=True):
        if count:
            order = row.masked_fill(taken, float("inf")).sort(stable=True).indices
            taken = taken.index_fill(0, order[:count], True)
    return taken


@register(
    "dart",
    paper="Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More",
    arxiv="2502.11494",
    licence="Apache-2.0",
    needs="keys and hidden states of one decoder layer, and the decoder's last norm",
    variants=("paper", "released"),
)
@dataclass(frozen=True)
class DART(Dropping):
    """DART: Duplication-Aware Reduction of Tokens (EMNLP 2025, arXiv 2502.11494).

    Before decoder layer K (`layers`, by default 2 of 32 as a fraction of the depth) pivots are chosen by the L1 norm
    of their keys in layer K - 1, all heads together, after the rotary embedding: the `pivots` vision tokens and the
    `text_pivots` text tokens after the image with the highest one (4 and 4). Pivots of the image stay; then one pivot
    after the other adds the tokens, of those not yet added, that are least like it: with the lowest cosine of hidden
    states after layer K - 1 that went through the norm behind the decoder's last layer. `ratio` is the share that is
    dropped there, 7/9 by default (128 of 576 stay); `keep` instead counts the mean over decoder layers and contradicts
    a `ratio`. Another `schedule` than "constant" drops at more layers, each time by pivots of its own.

    The number that stays is exactly the budget's, the image's pivots among them: what is left beside these is shared
    equally, the first pivots add one more where it does not divide, and a budget below `pivots` keeps that many
    pivots. The released code keeps 4 + 8 T, where T is an eighth of its target rounded down (4 more than a target that
    8 divides; on LLaVA-1.5 the target is 128 whatever the ratio): variant="released" makes these counts of those of
    the schedule.

    Reference: ZichenWen1/DART (Apache-2.0), not copied. Departures of both variants: pivots add in the order of the
    sequence (the code: in the order of a Python set of their places, which is that of a hash; the tokens that stay
    differ in a few); text pivots are text alone, where the code takes whatever follows the image, and where less text
    follows there are fewer; every image of a prompt is pruned. The paper's threshold of duplication is in neither.
    Kept tokens keep their positions, as in the released code.
    """

    ratio: float | None = None
    pivots: int = 4
    text_pivots: int = 4
    variant: str = "paper"

    published_layers: ClassVar[tuple[int, ...]] = (2,)
    # Nothing here is a score whose entropy could decide.
    schedule_names: ClassVar[tuple[str, ...]] = tuple(schedules.SCHEDULES)
    query = Query.LAST
    layer_reads = frozenset({Read.HIDDEN})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.name, "ratio", self.ratio, self.keep)
        check_count(self.name, "pivots", self.pivots)
        check_count(self.name, "text_pivots", self.text_pivots, least=0)

    def search_space(self, tokens: float) -> dict[str, Tunable]:
        """How the budget is spread over the layers, and how many pivots there are."""
        pivots = {"pivots": Tunable(1, 16, whole=True), "text_pivots": Tunable(0, 16, whole=True)}
        return {**super().search_space(tokens), **pivots}

    def own_ratios(self, layers: tuple[int, ...]) -> schedules.Ratios:
        """All before K, 1 - ratio from K on."""
        return self.dropped_once(layers, 1 - (PUBLISHED_RATIO if self.ratio is None else self.ratio))

    def counts(self, tokens: int, entered: int) -> tuple[int, ...]:
        """As by the schedule; as released with what the code's rounding adds to each count below all."""
        found = super().counts(tokens, entered)
        if self.variant == "paper":
            return found
        return tuple(min(entered, self.released_count(count)) if count < entered else entered for count in found)

    def released_count(self, target: int) -> int:
        """The tokens that the released code keeps for a target."""
        every = self.pivots + self.text_pivots
        return self.pivots + every * (target // every)

    def prune_decoder(self, layer: DecoderLayer) -> Selection | None:
        """Keeps pivots and what is least like them; raises ScoreError for NaN."""
        count = layer.budget
        if count >= layer.vision.numel():
            return None
        assert layer.hidden is not None
        assert layer.final_norm is not None
        device = layer.key.device
        vision, after = layer.vision.to(device), layer.text[len(layer.text) - layer.text_after :].to(device)
        norms = check_scores(key_norms(layer.key.index_select(1, torch.cat([vision, after]))), self.name)
        own = choose_pivots(norms[: len(vision)], vision, min(self.pivots, count))
        words = choose_pivots(norms[len(vision) :], after, self.text_pivots)
        pivots = torch.cat([own, words]).sort().values
        takes = even_takes(count - len(own), len(pivots))
        shown = torch.cat([pivots, vision]).to(layer.hidden.device)
        states = layer.final_norm(layer.hidden.detach().index_select(0, shown))
        unit = unit_vectors(states, self.name)
        cosines = unit[: len(pivots)] @ unit[len(pivots) :].T
        taken = least_alike(cosines, (vision[:, None] == own).any(dim=1), takes)
        return Selection((~taken).view(torch.uint8).sort(stable=True).indices[:count], sound=True)

    def flops(self, work: Work) -> int:
        """The cosines with the pivots, at each layer before which tokens drop."""
        words = min(self.text_pivots, work.text_after)
        return sum(
            2 * (min(self.pivots, tokens) + words) * tokens * work.decoder_width for tokens in work.image_tokens
        )
