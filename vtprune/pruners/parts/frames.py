"""Which frames of a video a method is shown, and how runs of them are cut."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vtprune.errors import VTPruneError
from vtprune.method.asking import Asking, asking
from vtprune.method.stages import BeforeDecoder
from vtprune.method.views import VisionStream
from vtprune.pruners.parts.checks import check_count


@asking
def whole_frames(method: str, stream: VisionStream) -> Asking[list[int]]:
    """The frames that are left of a video, ascending; raises VTPruneError where one of them is no longer whole."""
    frames, height, width = stream.grid
    if stream.indices.numel() == stream.total:
        return list(range(frames))
    known = yield stream.frames
    counts = [int((known == frame).sum()) for frame in range(frames)]
    if any(0 < count < height * width for count in counts):
        raise VTPruneError(
            f"{method} needs whole frames of {height * width} tokens: it cannot follow a stage that drops tokens "
            "inside a frame"
        )
    return [frame for frame, count in enumerate(counts) if count]


def by_frame(values: Tensor, stream: VisionStream) -> Tensor:
    """(T, h * w, ...) values (N, ...) of the tokens of T whole frames."""
    return values.unflatten(0, (-1, stream.grid[1] * stream.grid[2]))


def alike(features: Tensor, others: Tensor) -> Tensor:
    """(...,) fp32 cosines of vectors (..., D) to others in the same places; 0 for a vector of zeros."""
    return cosine_similarity(features.float(), others.float(), dim=-1)


def runs(count: int, pieces: int) -> list[range]:
    """`count` things in so many runs that follow each other, the first ones the longer where it does not divide."""
    size, rest = divmod(count, pieces)
    starts = [piece * size + min(piece, rest) for piece in range(pieces + 1)]
    return [range(start, end) for start, end in itertools.pairwise(starts)]


def apportioned(
    weights: Sequence[float] | npt.NDArray[np.floating], total: int, *, most: Sequence[int], least: int = 0
) -> list[int]:
    """Whole numbers that sum to `total`, in proportion to positive weights as far as each one's `least` and `most` let
    them; largest remainders round up, the first of equal ones. `total` lies between the sums of both bounds."""
    shares, upper = np.asarray(weights, dtype=np.float64), np.asarray(most)
    # The factor that makes the bounded shares sum to the total.
    low, high = 0.0, float(upper.max(initial=0) / shares.min(initial=1))
    for _ in range(100):
        middle = (low + high) / 2
        short = (middle * shares).clip(least, upper).sum() < total
        low, high = (middle, high) if short else (low, middle)
    ideal = (high * shares).clip(least, upper)
    counts = np.floor(ideal).astype(int)
    counts[np.argsort(counts - ideal, kind="stable")[: total - counts.sum()]] += 1
    found: list[int] = counts.tolist()
    return found


def best_of_frames(scores: Tensor, counts: Sequence[int]) -> Tensor:
    """The `counts` (T,) tokens of each frame with the highest of (T, n) scores, as ascending indices into all T * n;
    ties go to the lowest index."""
    places = scores.shape[1]
    order = scores.sort(dim=1, descending=True, stable=True).indices.flatten()
    taken = [frame * places + rank for frame, count in enumerate(counts) for rank in range(count)]
    ranks = torch.tensor(taken, dtype=torch.long, device=scores.device)
    return (order[ranks] + ranks // places * places).sort().values


def one_frame_note(size: int, budget: int) -> str:
    """What the report says where not even one frame fits the budget."""
    return f"one frame is the least that stays: {size} tokens, of a budget of {budget}"


@dataclass(frozen=True)
class ByFrames(BeforeDecoder):
    """A method that leaves fewer frames of a video, each of them whole: one of `every` so many, or as many as fit the
    `keep` where one is given."""

    every: int | None = None

    videos_only = True
    default_keep = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every is None:
            return
        check_count(self.name, "every", self.every)
        if self.keep is not None or self.keep_video is not None:
            raise VTPruneError(f"{self.name}: keep and every contradict each other; give one of them")

    def input_budget(self, tokens: int) -> int | None:
        """None: how many frames there are decides."""
        return tokens if self.keep == 1 and isinstance(self.keep, float) else None
