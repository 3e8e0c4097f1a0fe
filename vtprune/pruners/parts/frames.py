"""Which frames of a video a method is shown, and how runs of them are cut."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

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
