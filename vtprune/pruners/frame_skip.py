"""Every so many frames of a video: the baseline in time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vtprune.method.answers import Selection
from vtprune.method.asking import Asking, asking, started
from vtprune.method.registry import register
from vtprune.method.views import VisionStream
from vtprune.pruners.parts.frames import ByFrames, one_frame_note, runs, whole_frames


@register(
    "frame_skip",
    paper="Token-Efficient Long Video Understanding for Multimodal LLMs (STORM): its temporal sampling",
    arxiv="2503.04130",
    licence="Apache-2.0 (the authors released no code)",
    needs="nothing",
    unserved="prunes videos alone",
)
@dataclass(frozen=True)
class FrameSkip(ByFrames):
    """Keeps frames 0, s, 2s, ... of a video, whole: STORM's sampling at test time (arXiv 2503.04130), no mixer.

    every: s; without a `keep` the paper's 2. `keep` leaves as many frames as fit it, spread evenly, at least one
    (which is then more than asked, and said in a note). A frame is what the decoder sees as one: on Qwen two of the
    video's. Images stay whole. After a method that drops frames it counts those that are left.
    """

    @asking
    def select(self, stream: VisionStream) -> Asking[Selection | None]:
        """The frames that stay; raises VTPruneError where one is not whole."""
        frames = yield from started(whole_frames, self.name, stream)
        size = stream.indices.numel() // len(frames)
        count = max(1, min(len(frames), self.budget(stream.total) // size))
        kept = [run[0] for run in runs(len(frames), count)]
        if self.keep is None:
            kept = list(range(0, len(frames), self.every or 2))
        if len(kept) == len(frames):
            return None
        note = ""
        if self.keep is not None and size > self.budget(stream.total):
            note = one_frame_note(size, self.budget(stream.total))
        first = torch.tensor(kept, device=stream.features.device)[:, None] * size
        tokens = first + torch.arange(size, device=stream.features.device)
        return Selection(tokens.flatten(), note=note, sound=True)
