"""What is under way in a thread while a wrapped model runs."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vtprune.decoding import DecoderRun
from vtprune.encoding import EncodedImage, Encoding

# The argument that carries a run through the layers' keyword arguments.
RUN = "vtprune_run"
# The attribute of an image's feature tensor that holds its EncodedImage.
RECORD = "_vtprune_image"
# The attribute of a cache that holds its Generation.
GENERATION = "_vtprune"


@dataclass
class Frame:
    """One forward of the multimodal model: its inputs, and its images once they are encoded."""

    inputs: dict[str, Any]
    images: list[EncodedImage] = field(default_factory=list)


class ThreadState(threading.local):
    """What is under way in this thread: forwards, the encoding, and the layers being run."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.encoding: Encoding | None = None
        self.runs: list[Encoding | DecoderRun | None] = []
        self.decoder: list[DecoderRun | None] = []

    def sink(self) -> dict[str, Tensor] | None:
        """Where the projections of the layer being run put their outputs."""
        run = self.runs[-1] if self.runs else None
        return None if run is None else run.taps
