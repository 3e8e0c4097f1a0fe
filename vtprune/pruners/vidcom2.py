"""VidCom2: the tokens of a video that are least like it and their frame, more of them from frames of their own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtprune.method.answers import Selection
from vtprune.method.asking import Array, Asking, asking, started
from vtprune.method.checks import listed
from vtprune.method.facts import Work
from vtprune.method.pruner import asked
from vtprune.method.registry import register
from vtprune.method.stages import BeforeDecoder
from vtprune.method.views import VisionStream
from vtprune.pruners.parts.frames import apportioned, best_of_frames, by_frame, whole_frames

WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1, 2)
CHANNELS, TEMPERATURE = 0.5, 0.01


def likeness(features: Tensor) -> tuple[Tensor, Tensor]:
    """How alike each token of (T, n, D) features is to the mean of the video, and to that of its frame: (T, n) fp32
    each, at most 5.

    The tokens are compared at length 1, over the half of the channels that vary least in the video, by a sum of five
    Gaussians of their distance. Both are NaN where a number of any channel is none.
    """
    features = features.detach().float()
    variance = features.var(dim=(0, 1), correction=0)
    calm = variance.sort(stable=True).indices[: max(1, int(CHANNELS * variance.numel()))]
    tokens = normalize(features.index_select(-1, calm), dim=-1)
    # The channels that are not finite vary most, and would be overlooked.
    tokens = tokens + 0 * variance.amax()
    in_frame = tokens.mean(dim=1, keepdim=True)
    centres = torch.stack([in_frame.mean(dim=0, keepdim=True).expand_as(in_frame), in_frame])
    distances = torch.stack([(tokens - centre).square().sum(dim=-1) for centre in centres])
    to_video, to_frame = (-distances[..., None] / (2 * distances.new_tensor(WIDTHS))).exp().sum(dim=-1)
    return to_video, to_frame


def frame_weights(to_video: Tensor) -> Tensor:
    """(T,) what share of its tokens each frame keeps, over the video's share, from (T, n) likeness to the video: the
    less alike its tokens are, the more; the mean is 1."""
    unlike = -to_video.mean(dim=1)
    found = ((unlike - unlike.max()) / TEMPERATURE).softmax(dim=0)
    return 1 + found - found.mean()


def released_counts(rates: Array, places: int) -> list[int]:
    """How many of its `places` each frame keeps by its fp32 rate: each rounded alone, half to even, at least one."""
    counts: list[int] = np.rint(rates.clip(max=1) * places).clip(min=1).astype(int).tolist()
    return counts


@register(
    "vidcom2",
    paper="Video Compression Commander: Plug-and-Play Inference Acceleration for Video Large Language Models",
    arxiv="2505.14454",
    licence="Apache-2.0",
    needs="decoder-width features of whole frames",
    variants=("paper", "released"),
    unserved="prunes videos alone",
)
@dataclass(frozen=True)
class VidCom2(BeforeDecoder):
    """VidCom2: Video Compression Commander (EMNLP 2025, arXiv 2505.14454).

    Over the half of the channels that vary least in the video, at length 1, each token's likeness to the mean of the
    video and to the mean of its frame are sums of five Gaussians of the distance. A frame whose tokens are less like
    the video keeps more of them (a softmax at temperature 0.01, nearly all or nothing: often one frame keeps twice the
    share), and each frame keeps those with the lowest sum of both. Features are those behind the projector or merger;
    no attention and no text is read. `default_keep` 0.25 is the code's.

    Reference: xuyang-liu16/VidCom2, not copied. Departures: `keep` is met to the token (the code rounds frame by
    frame; frames still keep one token each where there are as many), and what a frame has no tokens for goes to the
    others; tokens keep their positions. variant="released" rounds as the code does, and numbers positions anew where
    they are 1-D. The newline tokens that the code keeps of every frame of LLaVA-Video are no vision tokens here.
    Images stay whole: they have one frame. A frame is what the decoder sees as one: on Qwen two of the video's.
    """

    variant: str = "paper"

    videos_only = True

    @property
    def renumbers(self) -> bool:
        """True for variant="released"."""
        return self.variant == "released"

    def input_budget(self, tokens: int) -> int | None:
        """`keep`; None as released, where rounding decides."""
        budget = self.budget(tokens)
        return None if self.variant == "released" and budget < tokens else budget

    @asking
    def select(self, stream: VisionStream) -> Asking[Selection]:
        """Keeps what is outstanding in each frame; raises ScoreError for NaN, VTPruneError where a frame is not
        whole."""
        yield from started(whole_frames, self.name, stream)
        to_video, to_frame = likeness(by_frame(stream.features, stream))
        weights = yield frame_weights(to_video)
        listed(weights, self.name)
        places = to_video.shape[1]
        if self.variant == "released":
            counts = released_counts(np.float32(self._share(stream)) * weights, places)
        else:
            least = int(stream.budget >= len(weights))
            counts = apportioned(weights, stream.budget, least=least, most=[places] * len(weights))
        return Selection(best_of_frames(-(to_video + to_frame), counts), sound=True)

    def _share(self, stream: VisionStream) -> float:
        """Of the tokens that are shown, those to keep."""
        keep = asked(self)
        share = keep if isinstance(keep, float) else self.budget(stream.total) / stream.total
        return min(1.0, share * stream.total / stream.indices.numel())

    def flops(self, work: Work) -> int:
        """A variance a channel; of half of them a length and two distances a token."""
        return 5 * work.shown * work.decoder_width
