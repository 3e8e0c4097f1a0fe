"""DivPrune: the tokens that are farthest from each other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vtprune.method.answers import Selection
from vtprune.method.asking import Asking, asking, started
from vtprune.method.checks import listed
from vtprune.method.facts import Work
from vtprune.method.registry import register
from vtprune.method.stages import BeforeDecoder
from vtprune.method.views import VisionStream
from vtprune.pruners.parts.cosines import (
    cosine_matrix,
    cosine_row,
    fits,
    matrix_flops,
    unit_vectors,
)

Floats = npt.NDArray[np.float32]
METHOD = "divprune"  # who errors name


@asking
def max_min_diverse(features: Tensor, count: int) -> Asking[Tensor]:
    """`count` of N tokens in the order of choice: (count,) int64, distinct.

    features: (N, D), count <= N. The first token is the one whose nearest neighbour is farthest, each next one
    the farthest from its nearest among those chosen; ties go to the lowest index. The distance is 1 - cosine:
    the running maximum of the cosine is what is kept, so a choice reads one row. Raises ScoreError for NaN.

    The first choice takes all cosines, from which the others are made on the host; where they are too many to be kept,
    each choice computes its own row.
    """
    held = fits(len(features))
    vectors = unit_vectors(features, None if held else METHOD)
    matrix, closest = cosine_matrix(vectors, keep=held)
    if matrix is not None:
        both = torch.cat([matrix, closest[None]])
        # Other images may go as far as this before the device is asked.
        del vectors, matrix
        found = yield both
        # A token without a finite length is alike to none, not even to itself.
        listed(found[:-1].diagonal(), METHOD)
        return torch.from_numpy(_chosen(found[:-1], found[-1], count)).to(features.device)
    chosen = torch.empty(count, dtype=torch.long, device=features.device)
    taken = torch.zeros_like(closest)
    for turn in range(count):
        index = (closest + taken).argmin(dim=0, keepdim=True)
        chosen[turn : turn + 1] = index
        taken.index_fill_(0, index, torch.inf)
        if turn + 1 < count:
            row = cosine_row(vectors, index)
            closest = torch.maximum(closest, row) if turn else row
    return chosen


def _chosen(matrix: Floats, closest: Floats, count: int) -> npt.NDArray[np.int64]:
    """The same on the host, from all cosines (N, N) and each token's highest one to another (N,): a choice there takes
    no longer than launching the first of its operations on a device."""
    chosen = np.empty(count, dtype=np.int64)
    taken = np.zeros_like(closest)
    for turn in range(count):
        index = chosen[turn] = (closest + taken).argmin()
        taken[index] = np.inf
        closest = np.maximum(closest, matrix[index]) if turn else matrix[index]
    return chosen


@register(
    "divprune",
    paper="DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models",
    arxiv="2503.02175",
    licence="CC BY-NC 4.0",
    needs="decoder-width features",
    variants=("paper", "released"),
    serves="features",
)
@dataclass(frozen=True)
class DivPrune(BeforeDecoder):
    """DivPrune: Diversity-based Visual Token Pruning (CVPR 2025, arXiv 2503.02175).

    Greedy max-min diversity over the vectors that enter the decoder, by cosine distance; neither attention nor
    text. `default_keep` is the paper's 0.098 for images. Nothing to tune.

    variant="released" is the authors' code (vbdi/divprune, CC BY-NC 4.0, not copied): the same choice, and
    renumbered positions. Departures from it, of both variants: a token is never chosen twice (the code repeats
    tokens once every distance is about 0, for exact duplicates); distances are fp32 whatever the model's dtype
    (in fp16 they tie); zero vectors have cosine 0 to everything, not NaN; each image is pruned on its own (the
    code takes the first image of the first row, at a fixed place of the prompt).

    CLS is not used, so encoders without it (SigLIP, Qwen) need no substitute.
    """

    variant: str = "paper"

    default_keep = 0.098

    def __post_init__(self) -> None:
        super().__post_init__()

    @property
    def renumbers(self) -> bool:
        """True for variant="released"."""
        return self.variant == "released"

    @asking
    def select(self, stream: VisionStream) -> Asking[Selection]:
        """Keeps the budget; raises ScoreError for NaN."""
        chosen = yield from started(max_min_diverse, stream.features, stream.budget)
        return Selection(chosen.sort().values, sound=True)

    def flops(self, work: Work) -> int:
        """All cosines once; where they are not kept, also those of each chosen token."""
        flops = matrix_flops(work.tokens, work.decoder_width)
        if not fits(work.tokens):
            flops += 2 * (work.kept - 1) * work.tokens * work.decoder_width
        return flops
