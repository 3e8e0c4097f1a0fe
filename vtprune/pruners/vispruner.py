"""VisPruner: the tokens that attention dwells on, and of the others those that are not alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from torch import Tensor

from vtprune.errors import VTPruneError
from vtprune.method.answers import EncoderSelection
from vtprune.method.asking import Asking, asking, started, together
from vtprune.method.checks import check_scores, listed
from vtprune.method.choosing import top_mask
from vtprune.method.facts import Work
from vtprune.method.pruner import Tunable
from vtprune.method.registry import register
from vtprune.method.stages import NOTHING, InEncoder, Read
from vtprune.method.views import EncoderLayer
from vtprune.pruners.parts.checks import is_number
from vtprune.pruners.parts.cosines import fits, unit_vectors
from vtprune.pruners.parts.patches import saliency

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
METHOD = "vispruner"  # who errors name
# The most tokens that a round takes out.
STEP = 8
# So many of a token's likes are looked through for one that it may be compared with, before it is with all of them.
NEAR = 32


@asking
def without_duplicates(features: Tensor, count: int) -> Asking[Tensor]:
    """`count` of R tokens that are left once those go, round by round, that are most like another one: (count,) int64.

    features: (R, D), in the order of the first round; 1 <= count <= R. A round compares (cosine) every second token,
    from the first on, with all those in between. Of these second ones up to `STEP` go, those with the likest
    counterpart; the others, by falling likeness, then stand before those in between. Ties go to who stands first.
    Raises ScoreError for NaN.

    All cosines are known before the first round, so that the rounds are made on the host; where there are too many
    tokens for that, each round computes its own.
    """
    tokens, device = len(features), features.device
    if not fits(tokens):
        return _by_rounds(unit_vectors(features, METHOD), count)
    vectors = unit_vectors(features, None)
    matrix = vectors @ vectors.T
    cosines, likes = matrix.topk(min(NEAR, tokens), dim=1)
    found = yield torch.cat([matrix, cosines, likes.float()], dim=1)
    whole, highest, whom = np.split(found, [tokens, tokens + cosines.shape[1]], axis=1)
    # What is no number comes first among the likes of every token.
    listed(highest[:, 0], METHOD)
    return torch.from_numpy(_left(whole, highest, likes=whom.astype(np.int64), count=count)).to(device)


def _by_rounds(vectors: Tensor, count: int) -> Tensor:
    """The same where the vectors are, of unit vectors (R, D)."""
    rest = torch.arange(len(vectors), device=vectors.device)
    while len(rest) > count:
        second, between = rest[::2], rest[1::2]
        alike = (vectors[second] @ vectors[between].T).amax(dim=1)
        order = alike.argsort(descending=True, stable=True)
        rest = torch.cat([second[order[min(STEP, len(rest) - count) :]], between])
    return rest


def _left(matrix: Floats, cosines: Floats, likes: Ints, count: int) -> Ints:
    """The same on the host, of all cosines (R, R), and of each token's highest ones and whom they are with, both
    (R, n) in falling order. Most tokens have one of those in between among their likes, so that a round reads little
    of the matrix."""
    rest, stands = np.arange(len(matrix)), np.zeros(len(matrix), dtype=bool)
    while len(rest) > count:
        second, between = rest[::2], rest[1::2]
        stands[:] = False
        stands[between] = True
        found = stands[likes[second]]
        alike = cosines[second, found.argmax(axis=1)]
        far = ~found.any(axis=1)
        alike[far] = matrix[np.ix_(second[far], between)].max(axis=1)
        order = np.argsort(-alike, kind="stable")
        rest = np.concatenate([second[order[min(STEP, len(rest) - count) :]], between])
    return rest


@asking
def important_and_diverse(scores: Tensor, features: Tensor, count: int, important: int) -> Asking[Tensor]:
    """`count` of N tokens, distinct, in no order: (count,) int64; the `important` ones with the highest scores (N,),
    and of the others those whose features (N, D) are not alike. Ties go to the lowest index."""
    order = scores.argsort(descending=True, stable=True)
    first, rest = order[:important], order[important:]
    if count == important:
        return first
    left = yield from started(without_duplicates, features.index_select(0, rest), count - important)
    return torch.cat([first, rest.index_select(0, left)])


@register(
    "vispruner",
    paper="Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs (VisPruner); "
    "important_ratio=1 is FasterVLM",
    arxiv="2412.01818",
    licence="Apache-2.0",
    needs="q and k of the encoder layer that feeds the decoder, and its hidden states",
    variants=("paper", "released"),
    serves="states",
)
@dataclass(frozen=True)
class VisPruner(InEncoder):
    """VisPruner: Exploiting Visual Cues for Effective Token Pruning (ICCV 2025, arXiv 2412.01818), and FasterVLM, the
    first version of the same paper, with important_ratio=1.

    important_ratio: the share (rounded down) of the kept tokens that are those with the highest CLS attention in the
    layer that feeds the decoder. The others are what is left of the rest, in the order of attention, when duplicates
    go: in each round every second token is compared with those in between, by the cosine of the features before the
    projector, and the eight with the likest counterpart go. `default_keep` is the paper's 64 of 576.

    Reference: Theia-4869/VisPruner (Apache-2.0), not copied; variant="released" differs only in renumbered positions.
    Departures of both: where a round has an odd number of tokens, one more of them is compared than is compared with
    (the code raises there); cosines are fp32; ties go to the higher attention, then to the lowest index.
    As in the code, each crop of an image in several gets its share of the budget.

    Encoders without CLS (SigLIP, Qwen; not in the code): the attention that a token receives, mean over heads and
    queries, stands in for the CLS row; on Qwen it is summed over a merge group, whose patches, one behind the other,
    are the token's features.
    """

    important_ratio: float = 0.5
    variant: str = "paper"

    default_keep = 64 / 576

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.important_ratio) or not 0 <= self.important_ratio <= 1:
            raise VTPruneError(
                f"{self.name}: important_ratio is a number from 0 to 1, the share of the kept tokens that attention "
                f"chooses, got {self.important_ratio!r}"
            )

    @property
    def renumbers(self) -> bool:
        """True for variant="released"."""
        return self.variant == "released"

    @property
    def encoder_reads(self) -> frozenset[Read]:
        """Hidden states, unless attention alone chooses."""
        return NOTHING if self.important_ratio == 1 else frozenset({Read.HIDDEN})

    def search_space(self, tokens: float) -> dict[str, Tunable]:
        """The share that attention chooses."""
        return {"important_ratio": Tunable(0.0, 1.0)}

    def encoder_layers(self) -> tuple[int, ...]:
        """The one that feeds the decoder."""
        return (self.model.encoder_depth - 1,)

    def prune_encoder(self, layer: EncoderLayer) -> EncoderSelection:
        """The important and the diverse tokens; raises ScoreError for NaN."""
        scores = check_scores(saliency(layer), self.name)
        counts = tuple(map(min, layer.alive, layer.budgets))
        valid = None if layer.full else layer.valid
        if self.important_ratio == 1:
            return EncoderSelection.drop(top_mask(scores, counts, valid), counts)
        assert layer.hidden is not None
        features = rearrange(layer.hidden[:, layer.prefix :], "b (n g) d -> b n (g d)", g=layer.group)
        places = _places(valid, layer.alive)
        chosen = together(
            [
                started(
                    important_and_diverse,
                    own if places is None else own[places[row]],
                    features[row] if places is None else features[row, places[row]],
                    count=counts[row],
                    important=self.important_count(counts[row]),
                )
                for row, own in enumerate(scores)
            ]
        )
        keep = torch.zeros_like(scores, dtype=torch.bool)
        for row, tokens in enumerate(chosen):
            keep[row].scatter_(0, tokens if places is None else places[row][tokens], True)
        return EncoderSelection.drop(keep, counts)

    def important_count(self, kept: int) -> int:
        """How many of the `kept` tokens attention chooses."""
        return int(kept * self.important_ratio)

    def flops(self, work: Work) -> int:
        """The attention row (all rows without CLS), and the similarities of what it does not choose."""
        if not work.encoder_layers:
            return 0
        patches = work.encoder_patches[max(work.encoder_layers)]
        rows = 1 if work.has_cls else patches // work.units
        attention = 2 * rows * patches * work.encoder_width
        if self.important_ratio == 1:
            return attention
        kept, group = max(1, work.kept // work.units), self.model.group
        # Padding is not among those that are compared.
        tokens = min((patches // work.units - work.has_cls) // group, work.tokens // work.units)
        rest = tokens - self.important_count(kept)
        pairs = rest**2 if fits(rest) else sum(_pairs(rest, kept - self.important_count(kept)))
        return attention + 2 * work.units * pairs * work.encoder_width * group


def _pairs(tokens: int, count: int) -> Iterator[int]:
    """How many pairs each round compares that computes its own cosines, from so many tokens down to `count`."""
    while tokens > count:
        yield (tokens + 1) // 2 * (tokens // 2)
        tokens -= min(STEP, tokens - count)


def _places(valid: Tensor | None, alive: Sequence[int]) -> list[Tensor] | None:
    """Where the `alive` (B,) tokens of each image stand in `valid` (B, N), None for everywhere."""
    if valid is None:
        return None
    order = torch.sort((~valid).view(torch.uint8), dim=1, stable=True).indices
    return [own[:count] for own, count in zip(order, alive, strict=True)]
