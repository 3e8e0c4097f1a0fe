"""The kinds of thing that a prompt shows, and what is known of one of them before anything runs."""

from __future__ import annotations

from dataclasses import dataclass

IMAGE, VIDEO = "image", "video"


@dataclass(frozen=True)
class Shown:
    """An image or a video as its sizes tell it.

    tokens: vision tokens of the whole of it; kind: IMAGE or VIDEO; units: the pieces (frames, crops) that the vision
    encoder attends within, each of which keeps at least one token there; keep: how many of its tokens stay where the
    images of a prompt share a budget, None where the method's own keep holds.
    """

    tokens: int
    kind: str = IMAGE
    units: int = 1
    keep: int | None = None
