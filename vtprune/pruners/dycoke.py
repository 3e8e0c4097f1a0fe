"""DyCoke: in windows of four frames, what hardly differs from the frame before goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vtprune.method.answers import KEPT_WHOLE, Selection
from vtprune.method.asking import Asking, asking, started
from vtprune.method.checks import check_scores
from vtprune.method.choosing import top
from vtprune.method.facts import Work
from vtprune.method.pruner import Tunable
from vtprune.method.registry import register
from vtprune.method.stages import BeforeDecoder
from vtprune.method.views import VisionStream
from vtprune.pruners.parts.checks import check_share
from vtprune.pruners.parts.frames import alike, by_frame, whole_frames

WINDOW, PUBLISHED_RATIO = 4, 0.7


def compared(frames: int, *, released: bool) -> list[int | None]:
    """For each frame the one that it is compared with, None for one that stays whole, -1 for one that goes.

    In windows of four the first frame stays, the second and fourth are compared with the one before, the third with
    the first. released: the third frame of the last window stays whole too where it is the window's own bound that
    leaves it out, and the last of an odd number of frames goes.
    """
    found: list[int | None] = []
    for frame in range(frames):
        place = frame % WINDOW
        found.append(None if place == 0 else frame - (2 if place == 2 else 1))
    if released:
        for frame in range(2, frames, WINDOW):
            if frame - 2 >= frames - WINDOW:
                found[frame] = None
        if frames % 2 and frames > 1:
            found[-1] = -1
    return found


def keep_unlike(features: Tensor, against: Sequence[int | None], count: int) -> Tensor:
    """The tokens that stay, ascending: of (T, n, D) features all of a frame that is compared with none, and the
    `count` of each other one that are least like their place in the frame that it is compared with; none of a frame
    at -1."""
    places, kept = features.shape[1], []
    for frame, other in enumerate(against):
        if other is None:
            own = torch.arange(places, device=features.device)
        elif other < 0 or count == 0:
            continue
        else:
            own = top(check_scores(-alike(features[frame], features[other]), "dycoke"), count)
        kept.append(frame * places + own)
    return torch.cat(kept)


@register(
    "dycoke",
    paper="DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models",
    arxiv="2411.15024",
    licence="Apache-2.0",
    needs="decoder-width features of whole frames",
    variants=("paper", "released"),
    unserved="prunes videos alone",
)
@dataclass(frozen=True)
class DyCoke(BeforeDecoder):
    """DyCoke's first stage, temporal token merging (CVPR 2025, arXiv 2411.15024), which drops and averages nothing.

    ratio: the share that goes of each frame but the first one of every window of four; without a `keep` the published
    0.7. `keep` counts the whole video: the others of a window all keep as many as fit it. A budget below the first
    frames of the windows, a quarter of the video, cannot be met: the video stays whole, with the reason in its report.

    The second and fourth frame of a window are compared with the frame before, the third with the first, place by
    place, by the cosine of features behind the projector or merger. Reference: KD-TAO/DyCoke, not copied. Departures:
    tokens stay in raster order (the code leaves a reduced frame in the order of its scores); a window that the video's
    end cuts short is reduced like any other; and the second stage, which gathers from the cache anew at each step, is
    not part of this. variant="released" keeps the code's bounds: the third frame of the last window stays whole, and
    of an odd number of frames the last one goes. Images stay whole. A frame is what the decoder sees as one: on Qwen
    two of the video's.
    """

    ratio: float | None = None
    variant: str = "paper"

    videos_only = True
    default_keep = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for keep in (self.keep, self.keep_video):
            check_share(self.name, "ratio", self.ratio, keep)

    def search_space(self, tokens: float) -> dict[str, Tunable]:
        """Without `keep` the ratio."""
        return {} if self.keep is not None else {"ratio": Tunable(0.1, 0.95, start=PUBLISHED_RATIO)}

    def input_budget(self, tokens: int) -> int | None:
        """None: how many frames there are decides."""
        return tokens if self.keep == 1 and isinstance(self.keep, float) else None

    @asking
    def select(self, stream: VisionStream) -> Asking[Selection]:
        """Whole frames, and what is unlike them of the others; raises ScoreError for NaN, VTPruneError where a frame
        is not whole."""
        frames = yield from started(whole_frames, self.name, stream)
        features = by_frame(stream.features, stream)
        against = compared(len(frames), released=self.variant == "released")
        places = features.shape[1]
        if self.keep is None:
            ratio = PUBLISHED_RATIO if self.ratio is None else self.ratio
            return Selection(keep_unlike(features, against, int((1 - ratio) * places)), sound=True)
        whole, reduced = against.count(None), sum(other is not None and other >= 0 for other in against)
        left = self.budget(stream.total) - whole * places
        if left < 0:
            everything = torch.arange(stream.indices.numel(), device=stream.features.device)
            note = f"{KEPT_WHOLE}the {whole} frames that stay whole have {whole * places} tokens, more than the budget"
            return Selection(everything, note=note, sound=True)
        count = min(places, left // reduced) if reduced else 0
        return Selection(keep_unlike(features, against, count), sound=True)

    def flops(self, work: Work) -> int:
        """A product and two lengths a token of the frames that are compared."""
        return 6 * work.shown * work.decoder_width * (WINDOW - 1) // WINDOW
