"""The mean of consecutive frames of a video: the merging baseline in time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vtprune.method.answers import Merge, Selection
from vtprune.method.asking import Asking, asking, started
from vtprune.method.registry import register
from vtprune.method.views import VisionStream
from vtprune.pruners.parts.frames import ByFrames, one_frame_note, runs, whole_frames
from vtprune.tensors.attention import at_least_single


def pool_frames(values: Tensor, groups: list[range], size: int) -> Tensor:
    """(G * size, D) the mean over the frames of each group, place by place, of (T * size, D) values; summed in fp32 at
    the least, in their dtype."""
    frames = at_least_single(values).unflatten(0, (-1, size))
    means = [frames[group.start : group.stop].mean(dim=0) for group in groups]
    return torch.cat(means).to(values.dtype)


@register(
    "frame_pool",
    paper="Token-Efficient Long Video Understanding for Multimodal LLMs (STORM): its temporal pooling",
    arxiv="2503.04130",
    licence="Apache-2.0 (the authors released no code)",
    needs="vision tokens",
    unserved="prunes videos alone",
)
@dataclass(frozen=True)
class FramePool(ByFrames):
    """Averages every k consecutive frames of a video, place by place: STORM's temporal pooling (arXiv 2503.04130)
    without its mixer, and without the training that the paper does with it.

    every: k; without a `keep` the paper's 4, and what is left at the end is a group of its own (the paper does not
    say). `keep` makes as many groups of (almost) equal length as fit it, at least one (which is then more than asked,
    and said in a note). A merged token takes the place, and so the time, of its first frame. A frame is what the
    decoder sees as one: on Qwen two of the video's. Images stay whole. After a method that drops frames it counts
    those that are left.
    """

    @asking
    def select(self, stream: VisionStream) -> Asking[Selection | None]:
        """One token for each place and group of frames; raises VTPruneError where a frame is not whole."""
        frames = yield from started(whole_frames, self.name, stream)
        size, every = stream.indices.numel() // len(frames), self.every or 4
        groups = [range(start, min(len(frames), start + every)) for start in range(0, len(frames), every)]
        note = ""
        if self.keep is not None:
            budget = self.budget(stream.total)
            groups = runs(len(frames), max(1, min(len(frames), budget // size)))
            if size > budget:
                note = one_frame_note(size, budget)
        if len(groups) == len(frames):
            return None
        mix = partial(pool_frames, groups=groups, size=size)
        first = torch.tensor([group.start for group in groups], device=stream.features.device)[:, None] * size
        kept = (first + torch.arange(size, device=stream.features.device)).flatten()
        return Selection(
            kept, vectors=mix(stream.features), merges=partial(_merges, groups, size), note=note, sound=True, mix=mix
        )


def _merges(groups: list[range], size: int) -> tuple[Merge, ...]:
    return tuple(
        Merge(
            group.start * size + place,
            tuple(frame * size + place for frame in group),
            (1 / len(group),) * len(group),
        )
        for group in groups
        if len(group) > 1
        for place in range(size)
    )
