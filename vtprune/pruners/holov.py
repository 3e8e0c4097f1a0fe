"""HoloV: a quota of tokens for every crop of the image, so that no region is lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vtprune.errors import VTPruneError
from vtprune.method.answers import Selection
from vtprune.method.asking import Asking, asking, started
from vtprune.method.checks import check_scores, listed
from vtprune.method.facts import Work
from vtprune.method.pruner import Tunable
from vtprune.method.registry import register
from vtprune.method.stages import BeforeDecoder, Read
from vtprune.method.views import VisionStream
from vtprune.pruners.parts.cells import Grid3
from vtprune.pruners.parts.checks import check_count, check_factor

EPS = 1e-6
Ints = npt.NDArray[np.int64]


def diversity(features: Tensor) -> Tensor:
    """Variance of each token's cosine similarities to the other tokens of its crop: (..., m, D) to (..., m) fp32.

    As in the released code, the token itself counts as a similarity of 0 and the divisor is m - 1.
    """
    others = features.shape[-2] - 1
    if others < 1:
        return torch.zeros(features.shape[:-1], device=features.device)
    features = features.float()
    unit = features / (features.norm(dim=-1, keepdim=True) + EPS)
    similarity = unit @ unit.mT
    similarity.diagonal(dim1=-2, dim2=-1).zero_()
    mean = similarity.sum(dim=-1, keepdim=True) / others
    return (similarity - mean).square().sum(dim=-1) / others


def holistic_score(features: Tensor, attention: Tensor, alpha: float) -> Tensor:
    """A + alpha * gamma * V of the tokens of crops, V their diversity, gamma = mean|A| / mean|V| of a crop:
    (..., m, D) and (..., m) to (..., m) fp32."""
    variance = diversity(features)
    gamma = attention.abs().mean(dim=-1, keepdim=True) / (variance.abs().mean(dim=-1, keepdim=True) + EPS)
    return attention + alpha * gamma * variance


def capped_quotas(weights: list[float], sizes: list[int], budget: int) -> list[int]:
    """Tokens of each crop: in proportion to the weights, never more than the crop holds, `budget` in all.

    Shares are rounded down and the remainder goes to the heaviest crops, one each. What exceeds a crop is
    handed on in proportion to weight times room, again and again; what rounding leaves of that goes to the
    heaviest crop with room. Crops of weight 0 get only what no other can hold.
    """
    budget = min(budget, sum(sizes))
    heaviest = sorted(range(len(sizes)), key=weights.__getitem__, reverse=True)
    total = sum(weights) or 1.0
    quotas = [int(budget * weight / total) for weight in weights]
    for crop in heaviest[: budget - sum(quotas)]:
        quotas[crop] += 1
    quotas = [min(quota, size) for quota, size in zip(quotas, sizes, strict=True)]
    while left := budget - sum(quotas):
        room = [size - quota for quota, size in zip(quotas, sizes, strict=True)]
        shares = [weight * free for weight, free in zip(weights, room, strict=True)]
        shares = shares if sum(shares) > 0 else [float(free) for free in room]
        added = [min(free, int(left * share / sum(shares))) for free, share in zip(room, shares, strict=True)]
        if not any(added):
            first = next(crop for crop in heaviest if room[crop])
            added[first] = min(left, room[first])
        quotas = [quota + more for quota, more in zip(quotas, added, strict=True)]
    return quotas


def crops_of(grid: Grid3, side: int) -> Ints:
    """The crop of each place of a (t, h, w) grid: (t * h * w,); side x side crops a frame, fewer where the frame is
    smaller; the first ones are larger where the sizes do not divide."""
    frames, height, width = grid

    def part(length: int) -> Ints:
        sizes = [len(chunk) for chunk in np.array_split(np.arange(length), min(side, length))]
        return np.repeat(np.arange(len(sizes)), sizes)

    frame = np.arange(frames)[:, None, None] * side
    return ((frame + part(height)[:, None]) * side + part(width)).reshape(-1)


CROPS = 4
RELEASED_ALPHA = 0.09


@dataclass(frozen=True)
class StripSelection:
    """What the released code computes: crop scores, weights and quotas, each (P,), and positions (K,), -1
    where quotas exceeded their crops."""

    scores: Tensor
    weights: Tensor
    quotas: Tensor
    positions: Tensor


@asking
def select_crops(
    features: Tensor, attention: Tensor, crops: Ints, budget: int, alpha: float = 1.0, tau: float = 1.0
) -> Asking[Tensor]:
    """The `budget` tokens that go on: (budget,) int64, ascending.

    features: (N, D); attention: (N,); crops: (N,) the crop of each token, on the host. A crop's weight is its mean
    holistic score to the power `tau`; inside its quota the best scores stay. Raises ScoreError for NaN.
    """
    members = [(crops == crop).nonzero()[0] for crop in np.unique(crops)]
    # Crops of one size are taken together.
    groups: dict[int, list[int]] = {}
    for crop, tokens in enumerate(members):
        groups.setdefault(len(tokens), []).append(crop)
    places, scores = {}, {}
    for size, own in groups.items():
        places[size] = torch.from_numpy(np.stack([members[crop] for crop in own])).to(features.device)
        scores[size] = holistic_score(features[places[size]], attention[places[size]], alpha)
    means = torch.cat([score.mean(dim=-1) for score in scores.values()]) ** tau
    known = yield means
    found = listed(known, "holov")
    order = [crop for own in groups.values() for crop in own]
    weights = [weight for _, weight in sorted(zip(order, found, strict=True))]
    quotas = capped_quotas(weights, [len(tokens) for tokens in members], budget)
    kept = []
    for size, own in groups.items():
        ranked = torch.sort(scores[size], dim=-1, descending=True, stable=True).indices
        chosen = np.concatenate([np.arange(quotas[crop]) + row * size for row, crop in enumerate(own)])
        best = places[size].gather(1, ranked).flatten()
        kept.append(best[torch.from_numpy(chosen).to(best.device)])
    return torch.cat(kept).sort().values


def select_strips(
    features: Tensor, attention: Tensor, strips: int, budget: int, alpha: float = RELEASED_ALPHA
) -> StripSelection:
    """The released selection: runs of the raster list as crops, attention alone inside, in its order.

    features: (N, D); attention: (N,). Raises ScoreError for NaN.
    """
    attention = check_scores(attention, "holov")
    runs = torch.arange(attention.numel(), device=attention.device).tensor_split(min(strips, attention.numel()))
    scores = torch.stack(
        [
            holistic_score(features[run], 1000 * attention[run], alpha).mean()
            if run.numel() > 1
            else attention[run].mean()
            for run in runs
        ]
    )
    weights = check_scores(scores / (scores.sum() + EPS), "holov")
    quotas = (weights * budget).floor().long()
    short = max(0, min(budget - int(quotas.sum()), len(runs)))
    quotas[weights.topk(short).indices] += 1
    positions = torch.full((budget,), -1, device=attention.device)
    kept = [
        run if quota >= run.numel() else run[attention[run].argsort(descending=True, stable=True)[:quota]]
        for run, quota in zip(runs, quotas.tolist(), strict=True)
    ]
    found = torch.cat(kept)
    positions[: found.numel()] = found
    return StripSelection(scores, weights, quotas, positions)


@register(
    "holov",
    paper='Don\'t Just Chase "Highlighted Tokens" in MLLMs: Revisiting Visual Holistic Context Retention',
    arxiv="2510.02912",
    licence="Apache-2.0 (badge in its README; no licence file)",
    needs="decoder-width features; CLS attention, or attention received, of the layer that feeds the decoder",
    variants=("paper", "released"),
    serves="signals",
)
@dataclass(frozen=True)
class HoloV(BeforeDecoder):
    """HoloV: Revisiting Visual Holistic Context Retention (NeurIPS 2025, arXiv 2510.02912).

    crops: crops a side of the image, 4 by default; for variant="released" the number of strips, by default
    1024 / 576 * N / budget, which is the authors' 16 at 64 of 576. alpha: weight of diversity, 1 (released:
    0.09). tau: sharpness of the crops' weights. `default_keep` is the authors' 64 of 576.

    The default is the method section: 2-D crops, each with a quota in proportion to its mean holistic score,
    capped at its size and redistributed; tokens by that score inside; raster order. What rounding leaves over
    goes to the heaviest crops one by one, as in the released code (the paper gives it to the heaviest, which
    would leave most crops empty at budgets near the number of crops). gamma is taken per crop,
    as the released code does, so diversity decides inside a crop but hardly between crops. The paper's
    visual context refetching is not part of this (the authors' code has none either).

    variant="released" is the authors' code (obananas/HoloV): 1-D strips, attention alone inside, renumbered
    positions. Departures from it: tokens stay in raster order (the code feeds them by falling attention
    inside a strip); where a quota exceeds its strip fewer tokens stay (the code appends zero vectors);
    attention on Qwen is in raster order (in the code it is in window order).

    Encoders without CLS (SigLIP, Qwen): the mean attention that a token's patches receive stands in for the
    CLS row. Frames of a video are cropped one by one.
    """

    crops: int | None = None
    alpha: float | None = None
    tau: float = 1.0
    variant: str = "paper"

    default_keep = 64 / 576
    input_reads = frozenset({Read.ENCODER, Read.GRID})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crops is not None:
            check_count(self.name, "crops", self.crops)
        if self.alpha is not None:
            check_factor(self.name, "alpha", self.alpha)
        check_factor(self.name, "tau", self.tau)
        if self.variant == "released" and self.tau != 1:
            raise VTPruneError(f"holov: variant='released' has no tau, got {self.tau!r}")

    @property
    def renumbers(self) -> bool:
        """True for variant="released"."""
        return self.variant == "released"

    def _entering(self, grid: Grid3) -> int:
        """The budget; raises VTPruneError for variant="released", whose quotas may exceed their strips."""
        if self.variant == "released":
            raise VTPruneError("holov with variant='released' may keep fewer tokens than its budget, by its scores")
        return super()._entering(grid)

    def search_space(self, tokens: float) -> dict[str, Tunable]:
        """Crops, the weight of diversity and the sharpness; strips and diversity alone as released."""
        if self.variant == "released":
            return {"crops": Tunable(1, 64, whole=True, log=True), "alpha": Tunable(0.0, 1.0)}
        return {
            "crops": Tunable(1, 8, whole=True),
            "alpha": Tunable(0.0, 4.0),
            "tau": Tunable(0.125, 4.0, log=True),
        }

    def resolve(self) -> dict[str, Any]:
        """`alpha`, and the paper's `crops`, filled in."""
        if self.variant == "released":
            return {"alpha": RELEASED_ALPHA if self.alpha is None else self.alpha}
        return {"crops": self.crops or CROPS, "alpha": 1.0 if self.alpha is None else self.alpha}

    def strips(self, tokens: int, budget: int) -> int:
        """How many strips variant="released" cuts `tokens` into."""
        return self.crops or max(1, int(1024 / 576 * tokens / budget))

    @asking
    def select(self, stream: VisionStream) -> Asking[Selection]:
        """Keeps the budget, crop by crop; raises ScoreError for NaN."""
        assert stream.signals is not None
        attention, features = stream.signals.saliency(), stream.features
        if self.variant == "released":
            strips = self.strips(features.shape[0], stream.budget)
            alpha = RELEASED_ALPHA if self.alpha is None else self.alpha
            positions = select_strips(features, attention, strips=strips, budget=stream.budget, alpha=alpha).positions
            return Selection(positions[positions >= 0].sort().values, sound=True)
        crops = crops_of(stream.grid, self.crops or CROPS)
        if len(crops) != stream.indices.numel():
            indices = yield stream.indices
            crops = crops[indices]
        alpha = 1.0 if self.alpha is None else self.alpha
        kept = yield from started(
            select_crops, features, attention, crops=crops, budget=stream.budget, alpha=alpha, tau=self.tau
        )
        return Selection(kept, sound=True)

    def flops(self, work: Work) -> int:
        """The attention row (all rows without CLS), and the similarities inside the crops."""
        pairs = work.patches + 1 if work.has_cls else work.encoder_pairs
        attention = 2 * pairs * work.encoder_width
        released = self.variant == "released"
        crops = self.strips(work.tokens, work.kept) if released else (self.crops or CROPS) ** 2
        alike = work.tokens * max(1, work.tokens // (crops if released else crops * work.units))
        return attention + 2 * alike * work.decoder_width
