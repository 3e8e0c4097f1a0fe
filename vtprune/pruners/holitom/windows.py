"""The runs of frames that a video is cut into, so that as many tokens as can be stand still within theirs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Flags = npt.NDArray[np.bool_]
LONGEST = 1024


def cut_windows(still: Flags) -> list[range]:
    """Runs of frames that follow each other, from (T - 1, n) whether each place hardly differs from one frame to the
    next.

    The places that stand still throughout a run need one token in place of one a frame; the runs are those that save
    most tokens in all. Of equal savings a run that ends alone comes before a longer one, a shorter before a longer.
    """
    frames, places = still.shape[0] + 1, still.shape[1]
    # saved[i]: by the first i frames at best; length[i]: of the run that ends them then.
    saved, length = np.zeros(frames + 1, dtype=np.int64), np.ones(frames + 1, dtype=np.int64)
    # How many frames back each place stands still, up to the frame before the next.
    since = np.zeros(places, dtype=np.int64)
    for end in range(2, frames + 1):
        since = np.where(still[end - 2], since + 1, 0)
        most = min(end, LONGEST) - 1
        # held[w]: places that stand still for w frames and one more.
        held = np.bincount(since.clip(max=most), minlength=most + 1)[::-1].cumsum()[::-1]
        steps = np.arange(1, most + 1)
        found = saved[end - 1 - steps] + held[1:] * steps
        best = int(found.argmax())
        if found[best] > saved[end - 1]:
            saved[end], length[end] = found[best], best + 2
        else:
            saved[end] = saved[end - 1]
    windows, end = [], frames
    while end:
        windows.append(range(end - int(length[end]), end))
        end = windows[-1].start
    return windows[::-1]


def still_places(still: Flags, windows: list[range]) -> Flags:
    """(W, n) which places stand still throughout each window; none in a window of one frame."""
    whole = [still[window.start : window.stop - 1] for window in windows]
    return np.stack([own.all(axis=0) & bool(len(own)) for own in whole])
