"""VisionZip: the tokens that attention dwells on, and a few that the others flow into."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vtprune.errors import VTPruneError
from vtprune.method.answers import EncoderSelection
from vtprune.method.checks import check_scores
from vtprune.method.choosing import top_mask
from vtprune.method.facts import Work
from vtprune.method.pruner import Tunable
from vtprune.method.registry import register
from vtprune.method.stages import InEncoder
from vtprune.method.views import EncoderLayer
from vtprune.pruners.parts.checks import check_choice, is_number
from vtprune.pruners.parts.patches import mean_keys, saliency
from vtprune.tensors.compaction import gather_tokens


@dataclass(frozen=True)
class Zipped:
    """dominant, targets: (B, N) bool, the tokens that go on; into: (B, N) int64, for every other one the column of
    its target (kept tokens: their own), -1 on padding and where an image has no targets; counts, ends, lost: (B,)
    how many go on, how many of these are targets, and how many do not go on; whole: that `into` is nowhere -1."""

    dominant: Tensor
    targets: Tensor
    into: Tensor
    counts: tuple[int, ...]
    ends: tuple[int, ...]
    lost: tuple[int, ...]
    whole: bool = False

    def selection(self, *, merge: bool, cls: Sequence[bool] | None, among: Tensor | None = None) -> EncoderSelection:
        """What goes on: each target plus the mean of what flows into it, or the target as it is without `merge`.

        cls: (B,) bool, the images whose CLS token takes the place of the first token that does not go on (that
        token still flows into its target); among: (B, N) bool, which tokens may be that one, None for all.
        """
        keep = self.dominant | self.targets
        gone = ~keep
        into, weights = self._flow(gone) if merge else (None, None)
        merges = merge and any(end and left for end, left in zip(self.ends, self.lost, strict=True))
        lossless = merge and self.whole
        if cls is None or not any(cls):
            return EncoderSelection(
                keep, into, weights, counts=self.counts, flows=merges, sound=True, lossless=lossless
            )
        place = (gone if among is None else gone & among).int().argmax(dim=1)
        stands = torch.tensor(cls, device=keep.device)
        keep = keep | torch.zeros_like(keep).scatter_(1, place[:, None], stands[:, None])
        kept = tuple(n + (own and left > 0) for n, own, left in zip(self.counts, cls, self.lost, strict=True))
        if into is None:
            into = EncoderSelection.drop(~gone).targets
        return EncoderSelection(
            keep,
            into,
            weights,
            place if all(cls) else place.masked_fill(~stands, -1),
            counts=kept,
            flows=True,
            sound=True,
            lossless=lossless,
        )

    def _flow(self, gone: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N) where each token flows to, and its share there: what is `gone` (B, N) is averaged, then added."""
        at = self.into if self.whole else self.into.clamp(min=0)
        flows = gone if self.whole else gone & (self.into >= 0)
        counts = torch.zeros(gone.shape, device=gone.device).scatter_add_(1, at, flows.float())
        return self.into, torch.where(flows, counts.gather(1, at).clamp(min=1).reciprocal(), 1.0)


def zip_tokens(
    scores: Tensor,
    metric: Tensor,
    valid: Tensor | None,
    *,
    alive: Sequence[int],
    dominant: Sequence[int],
    contextual: Sequence[int],
) -> Zipped:
    """Which tokens go on, and where the others would flow to, in a batch of images.

    scores: (B, N); metric: (B, N, d) unit vectors; valid: (B, N) bool, the `alive` (B,) first ones, None for all;
    dominant, contextual: (B,) how many of each. The targets stand in the rest, in raster order, at 0, step, 2 step ...
    with step = max(1, rest // contextual); every other token of the rest flows into the target with the highest
    cosine. Ties go to the lowest index.
    """
    first = [min(count, n) for count, n in zip(dominant, alive, strict=True)]
    others = [n - count for n, count in zip(alive, first, strict=True)]
    steps = [max(1, left // max(1, count)) for left, count in zip(others, contextual, strict=True)]
    ends_at = [min(count, -(-left // step)) for count, left, step in zip(contextual, others, steps, strict=True)]
    chosen = top_mask(scores, first, valid)
    most, counts = max(ends_at), tuple(map(operator.add, first, ends_at))
    column = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    if most == 0:
        none, nowhere = (0,) * len(others), column.masked_fill(~chosen, -1)
        return Zipped(chosen, torch.zeros_like(chosen), nowhere, counts, ends=none, lost=tuple(others))
    lost = tuple(left - end for left, end in zip(others, ends_at, strict=True))
    if valid is None and min(first) == max(first) and min(ends_at) == most:
        # All images alike: their targets stand in a row of as many columns each.
        order = torch.sort(chosen.view(torch.uint8), dim=1, stable=True).indices
        columns = order[:, : most * steps[0] : steps[0]]
        targets = torch.zeros_like(chosen).scatter_(1, columns, True)
        into = torch.where(chosen | targets, column, columns.gather(1, _cosines(metric, columns).argmax(dim=-1)))
        return Zipped(chosen, targets, into, counts, ends=tuple(ends_at), lost=lost, whole=True)
    valid = torch.ones_like(chosen) if valid is None else valid
    rest = valid & ~chosen
    rank, step = rest.cumsum(dim=1) - 1, _column(steps, valid)
    targets = rest & (rank % step == 0) & (rank // step < _column(contextual, valid))
    columns = torch.sort((~targets).view(torch.uint8), dim=1, stable=True).indices[:, :most]
    there = targets.gather(1, columns)
    cosines = _cosines(metric, columns).masked_fill(~there[:, None], float("-inf"))
    nearest = columns.gather(1, cosines.argmax(dim=-1))
    into = torch.where(rest & ~targets, nearest, column)
    return Zipped(
        chosen, targets, into.masked_fill(~valid | (rest & ~there[:, :1]), -1), counts, ends=tuple(ends_at), lost=lost
    )


def _cosines(metric: Tensor, columns: Tensor) -> Tensor:
    """(B, N, m) of all tokens with those in the `columns` (B, m)."""
    return torch.matmul(metric, gather_tokens(metric, columns).transpose(1, 2))


def _column(numbers: Sequence[int], like: Tensor) -> Tensor:
    """(B, 1) of a number an image."""
    return torch.tensor(numbers, device=like.device)[:, None]


# One contextual token to 5.4 dominant ones.
SHARE = 10 / 64


@register(
    "visionzip",
    paper="VisionZip: Longer is Better but Not Necessary in Vision Language Models",
    arxiv="2412.04467",
    licence="Apache-2.0",
    needs="q and k of the encoder layer that feeds the decoder",
    variants=("paper", "released"),
    serves="states",
)
@dataclass(frozen=True)
class VisionZip(InEncoder):
    """VisionZip: Longer is Better but Not Necessary in Vision Language Models (CVPR 2025, arXiv 2412.04467).

    contextual: how many of the kept tokens are contextual, a share (float in [0, 1)) or a count (int); None is
    the paper's 1 : 5.4 (192 = 162 + 30, 128 = 108 + 20, 64 = 54 + 10). cls: whether the CLS token is one of the
    dominant ones, as in the released code; False keeps one more patch. merge: False leaves contextual tokens as
    they are and drops the rest, to measure what merging buys. `default_keep` is the paper's 64 of 576.

    After the layer that feeds the decoder: dominant tokens are those with the highest CLS attention; of the rest
    every step-th is a contextual one, and gets the mean of the tokens whose head-mean keys are nearest to its own
    (cosine) added: a sum, not a mean, as released.

    Reference: dvlab-research/VisionZip (Apache-2.0), not copied; variant="released" differs only in renumbered
    positions. Departures of both: tokens stay in raster order, a contextual one at its target's place (the code
    appends these); CLS, which has no place in the grid, stands where the first token stood that does not go on
    (the code puts it first); cosines and sums are fp32; lists of images work. A share is rounded down, but at
    least one token is contextual from a budget of three on; a count is cut to leave one dominant token; CLS goes
    on only beside a dominant patch, so a budget of one is a patch.

    Encoders without CLS (SigLIP, Qwen; the authors released none, this follows EffiVLM-Bench): the attention that
    a token receives, mean over heads and queries, stands in for the CLS row; on Qwen scores and keys (with their
    rotary embedding) are means over a merge group, patches flow in their places of the group, and the features'
    own block scores (there the one before it). What rounding leaves of the budget goes to dominant tokens.
    """

    contextual: int | float | None = None
    cls: bool = True
    merge: bool = True
    variant: str = "paper"

    default_keep = 64 / 576
    merges = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.name, "cls", self.cls, (True, False))
        check_choice(self.name, "merge", self.merge, (True, False))
        given = self.contextual
        if given is None:
            return
        if not is_number(given) or given < 0 or (isinstance(given, float) and given >= 1):
            raise VTPruneError(
                f"visionzip: contextual is a count (an int of at least 0) or a share of keep (a float in [0, 1)), "
                f"got {given!r}"
            )
        if isinstance(given, int) and isinstance(self.keep, int) and given >= self.keep:
            raise VTPruneError(
                f"visionzip: contextual={given} leaves nothing of keep={self.keep} for dominant tokens; "
                f"the most that works is {self.keep - 1}"
            )

    @property
    def renumbers(self) -> bool:
        """True for variant="released"."""
        return self.variant == "released"

    def search_space(self, tokens: float) -> dict[str, Tunable]:
        """The share of contextual tokens."""
        return {"contextual": Tunable(0.02, 0.5, start=SHARE)}

    def contextual_count(self, budget: int) -> int:
        """How many of `budget` tokens are contextual."""
        share = SHARE if self.contextual is None else self.contextual
        if isinstance(share, int):
            return min(share, budget - 1)
        return min(max(int(share * budget), int(share > 0 and budget >= 3)), budget - 1)

    def encoder_layers(self) -> tuple[int, ...]:
        """The one that feeds the decoder."""
        return (self.model.encoder_depth - 1,)

    def prune_encoder(self, layer: EncoderLayer) -> EncoderSelection:
        """Dominant and contextual tokens, and what flows into these; raises ScoreError for NaN."""
        scores = check_scores(saliency(layer), self.name)
        contextual = [self.contextual_count(budget) for budget in layer.budgets]
        dominant = [budget - count for budget, count in zip(layer.budgets, contextual, strict=True)]
        stands = [self.cls and bool(layer.prefix) and count >= 2 for count in dominant]
        patches = [count - cls for count, cls in zip(dominant, stands, strict=True)]
        metric = check_scores(mean_keys(layer), self.name)
        valid, unseen = None if layer.full else layer.valid, any(layer.unseen)
        if unseen:
            valid = layer.valid
        found = zip_tokens(scores, metric, valid, alive=layer.alive, dominant=patches, contextual=contextual)
        among = valid if unseen else None
        return found.selection(merge=self.merge, cls=stands if self.cls and layer.prefix else None, among=among)

    def flops(self, work: Work) -> int:
        """The attention row (all rows without CLS), and the similarities to the targets."""
        if not work.encoder_layers:
            return 0
        patches = work.encoder_patches[max(work.encoder_layers)]
        rows = 1 if work.has_cls else patches // work.units
        tokens = (patches - work.units * work.has_cls) // self.model.group
        targets = self.contextual_count(max(1, work.kept // work.units))
        return (
            2 * rows * patches * work.encoder_width + 2 * tokens * targets * work.encoder_width // work.encoder_heads
        )
