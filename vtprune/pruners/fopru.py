"""FoPru: focal pruning by the attention among patches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vtprune.errors import VTPruneError
from vtprune.method.answers import KEPT_WHOLE, Selection
from vtprune.method.checks import check_scores
from vtprune.method.choosing import top
from vtprune.method.facts import Work
from vtprune.method.pruner import Grid3, Tunable
from vtprune.method.registry import register
from vtprune.method.stages import BeforeDecoder, Read
from vtprune.method.views import VisionStream
from vtprune.pruners.parts.checks import check_choice, check_whole_grid

STRATEGIES = ("rank", "row")


def focal_significance(received: Tensor, given: Tensor) -> Tensor:
    """Of attention received and given, each (N,), the one with the larger variance (ties: received)."""
    return torch.where(given.var(correction=0) > received.var(correction=0), given, received)


def top_rows(significance: Tensor, width: int, budget: int) -> Tensor:
    """All tokens of the best rows of a raster grid, ascending: as many whole rows as fit `budget`.

    significance: (rows * width,), a row's score being the sum over its tokens. Raises VTPruneError if not
    even one row fits.
    """
    count = budget // width
    if count < 1:
        raise VTPruneError(
            f"fopru: strategy 'row' keeps whole rows of {width} tokens, so a budget of {budget} is too low: "
            f"the smallest that works is {width} tokens"
        )
    rows = top(significance.reshape(-1, width).sum(dim=1), count)
    return (rows[:, None] * width + torch.arange(width, device=rows.device)).flatten()


@register(
    "fopru",
    paper="FoPru: Focal Pruning for Efficient Large Vision-Language Models",
    arxiv="2411.14164",
    licence="Apache-2.0 (third-party implementation; the authors released none)",
    needs="attention among patches, of the encoder layer that feeds the decoder",
    serves="signals",
)
@dataclass(frozen=True)
class FoPru(BeforeDecoder):
    """FoPru: Focal Pruning for Efficient Large Vision-Language Models (arXiv 2411.14164).

    strategy: "rank" keeps the most significant tokens, "row" whole rows of the grid, as many as fit the
    budget; softmax: False scores by the scaled logits instead of the attention. `default_keep` 0.25.

    A token's significance is the mean attention that it receives from the other patches, or gives to them
    (over heads), whichever varies more over the image; CLS takes part in the softmax, but its row and column
    are left out. Kept tokens stay in raster order.

    No official code exists. The only public implementation, HydraInfer's "focal" policy (Apache-2.0), takes
    the logits before the softmax; the paper speaks of attention scores, so softmaxed rows are the default
    here. Departures from it: the row strategy takes any grid, not only square ones, and the budget of either
    strategy is per image.

    Encoders without CLS (SigLIP, Qwen): nothing to replace, the same means over patches; with merged patches
    (Qwen) both means are averaged over the patches of a token first. Without a CLS column attention given is
    the same for all, so attention received decides.
    """

    strategy: str = "rank"
    softmax: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.name, "strategy", self.strategy, STRATEGIES)
        check_choice(self.name, "softmax", self.softmax, (True, False))

    @property
    def input_reads(self) -> frozenset[Read]:
        """The attention of the features' layer; for strategy="row" every token of the grid, too."""
        return frozenset({Read.ENCODER, Read.WHOLE_GRID} if self.strategy == "row" else {Read.ENCODER})

    def search_space(self, tokens: float) -> dict[str, Tunable]:
        """The strategy, and whether scores are taken after the softmax."""
        return {"strategy": Tunable(choices=STRATEGIES), "softmax": Tunable(choices=(True, False))}

    def input_budget(self, tokens: int) -> int | None:
        """None for strategy="row": an image none of whose rows fits the budget is kept whole."""
        whole = isinstance(self.keep, float) and self.keep == 1
        return None if self.strategy == "row" and not whole else self.budget(tokens)

    def _entering(self, grid: Grid3) -> int:
        """The budget; for strategy="row" as many whole rows as fit it, or all where none does."""
        tokens = math.prod(grid)
        budget = self.budget(tokens)
        if self.strategy == "rank" or budget < grid[-1]:
            return budget if self.strategy == "rank" else tokens
        return budget - budget % grid[-1]

    def significance(self, stream: VisionStream) -> Tensor:
        """The score of each token: (N,) fp32; raises ScoreError for NaN."""
        assert stream.signals is not None
        means = stream.signals.received_and_given(softmax=self.softmax)
        received, given = (check_scores(mean, self.name) for mean in means)
        return focal_significance(received, given)

    def select(self, stream: VisionStream) -> Selection:
        """Keeps the `stream.budget` most significant tokens, or the rows that fit it."""
        if self.strategy == "rank":
            return Selection.best(self.significance(stream), stream.budget)
        check_whole_grid("fopru with strategy 'row'", stream)
        width, budget = stream.grid[-1], stream.budget
        if budget < width:
            everything = torch.arange(stream.indices.numel(), device=stream.features.device)
            return Selection(
                everything, note=f"{KEPT_WHOLE}no row of {width} tokens fits a budget of {budget}", sound=True
            )
        return Selection(top_rows(self.significance(stream), width, budget), sound=True)

    def flops(self, work: Work) -> int:
        """The logits of one layer's full map."""
        return 2 * work.encoder_pairs * work.encoder_width
