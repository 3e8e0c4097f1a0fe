"""EVS: the tokens of a video that differ from the same place one frame before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtprune.method.answers import Selection
from vtprune.method.asking import Asking, asking, started
from vtprune.method.checks import check_scores
from vtprune.method.facts import Work
from vtprune.method.registry import register
from vtprune.method.stages import BeforeDecoder
from vtprune.method.views import VisionStream
from vtprune.pruners.parts.frames import alike, by_frame, whole_frames

# Above every dissimilarity, which lies between 0 and 2.
FIRST = 3.0


def temporal_change(features: Tensor) -> Tensor:
    """(T, n) fp32: 1 - cosine of each token to the one at its place in the frame before, of (T, n, D) features; in the
    first frame `FIRST` and 1 - cosine to the frame's mean, which is above all others."""
    first = features[:1].float()
    start = FIRST + 1 - alike(first, first.mean(dim=1, keepdim=True))
    return torch.cat([start, 1 - alike(features[1:], features[:-1])])


@register(
    "evs",
    paper="Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference",
    arxiv="2510.14624",
    licence="none that allows use of the released file; written from the rule alone",
    needs="decoder-width features of whole frames",
    unserved="prunes videos alone",
)
@dataclass(frozen=True)
class EVS(BeforeDecoder):
    """EVS: Efficient Video Sampling (arXiv 2510.14624), as serving engines prune videos.

    A token's score is 1 - cosine to the token at its place in the frame before (whether or not that one is kept), over
    features behind the projector or merger; the tokens with the highest scores stay, over the whole video, so that a
    still frame may lose all of its own. `default_keep` 0.3 is what one engine ships with (0.7 pruned).

    The first frame has none before it and comes first: where the budget holds it, it stays whole, as released. Where
    the budget is smaller than a frame the released rule keeps the whole frame all the same; here the budget holds, and
    the tokens of the first frame that are least like its mean stay. Images, which have one frame, stay whole. A frame
    is what the decoder sees as one: on Qwen two of the video's. Positions are those of the unpruned prompt.
    """

    videos_only = True
    default_keep = 0.3

    @asking
    def select(self, stream: VisionStream) -> Asking[Selection]:
        """Keeps what changes most; raises ScoreError for NaN, VTPruneError where a frame is not whole."""
        yield from started(whole_frames, self.name, stream)
        scores = temporal_change(by_frame(stream.features, stream))
        return Selection.best(check_scores(scores.flatten(), self.name), stream.budget)

    def flops(self, work: Work) -> int:
        """A product and two lengths a token."""
        return 6 * work.shown * work.decoder_width
