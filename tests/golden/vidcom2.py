"""VidCom2's cases: likeness to the video and to the frame, the rates of the frames, and the tokens that stay."""

from __future__ import annotations

import torch

from tests.golden.case import Case, UnknownCase, expect_close, expect_equal
from vtprune.pruners.parts.frames import best_of_frames
from vtprune.pruners.vidcom2 import frame_weights, likeness, released_counts


def run(case: Case) -> None:
    """Raises Mismatch where a result differs, UnknownCase for another kind of case."""
    if "features" not in case or "kept" not in case:
        raise UnknownCase(f"no VidCom2 case has tensors {', '.join(case.tensors)}")
    to_video, to_frame = likeness(case["features"].unflatten(0, (int(case["frames"]), int(case["tokens_per_frame"]))))
    rates = (float(case["ratio"]) * frame_weights(to_video)).clamp(max=1)
    counts = released_counts(rates.numpy(), to_video.shape[1])
    for name, found in (("video_score", to_video), ("frame_score", to_frame), ("rates", rates)):
        if name in case:
            expect_close(name, found, case[name])
    if "kept_per_frame" in case:
        expect_equal("tokens of each frame", torch.tensor(counts), case["kept_per_frame"])
    expect_equal("tokens that stay", best_of_frames(-(to_video + to_frame), counts), case["kept"].sort().values)
