"""What is under way in a thread while a wrapped model runs."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from vtprune.decoder.run import DecoderRun
from vtprune.encoder.encoding import EncodedImage, Encoding
from vtprune.method.checks import Checks

# The argument that carries a run through the layers' keyword arguments.
RUN = "vtprune_run"
# The argument that carries the gates of a routed layer to its attention, which runs before its MLP.
GATE = "vtprune_gate"
# The arguments that carry keys and values of tokens that skip a routed layer to its attention, and where these stand,
# by what `Joining` calls them: each by itself, as a checkpoint cuts the gradients of what it is given.
READ = {name: f"vtprune_read_{name}" for name in ("key", "value", "order", "columns")}
# The argument that carries what a planned layer does with vision to its attention, which runs before its MLP.
PLAN = "vtprune_plan"
# The argument that carries a forward's Frame to the decoder.
FRAME = "vtprune_frame"


@dataclass
class Frame:
    """One forward of the multimodal model: its inputs, what it shows once that is encoded, by kind, and the checks of
    the scores that it chose tokens by. closed: whether its decoder began, so that what is encoded later is not its."""

    inputs: dict[str, Any]
    encoded: dict[str, list[EncodedImage]] = field(default_factory=dict)
    checks: Checks = field(default_factory=Checks)
    closed: bool = False


@dataclass
class Call:
    """One call of `generate`: what its first forward, which reads the prompt, ran on; cache: None if it had none."""

    begun: bool = False
    images: bool = False
    cache: weakref.ReferenceType[Cache] | None = None

    def asks_for(self, run: DecoderRun) -> bool:
        """Whether a forward belongs to the sequence that the call generates; the first one says which that is."""
        if not self.begun:
            self.begun, self.images = True, bool(run.spans)
            self.cache = None if run.cache is None else weakref.ref(run.cache)
            return True
        if run.cache is not None:
            return self.cache is not None and self.cache() is run.cache
        # Without a cache every forward reads the whole sequence again.
        return self.cache is None and bool(run.spans) == self.images


class ThreadState(threading.local):
    """What is under way in this thread: the forward, the encoding, and the tapped layers being run.

    Frames and runs travel in the arguments of the calls that they belong to; here they are only remembered
    weakly, so that nothing survives a call that was interrupted.
    """

    def __init__(self) -> None:
        self.encoding: Encoding | None = None
        # What the output of the next MLP is multiplied by.
        self.gate: Tensor | None = None
        # What the next MLP does with vision.
        self.planned: Any = None
        # Who is told what the heads of the attention under way put out.
        self.listening: Any = None
        # What methods add to the loss of the forward under way, and its labels, if it has any.
        self.loss: Tensor | None = None
        self.labels: Tensor | None = None
        # What they add to it while images are encoded.
        self.lessons: list[Tensor] = []
        # What is kept in place of the methods' own keep, where one runs at several levels.
        self.level: int | float | None = None
        # The record of this thread's last generation.
        self.generation: Any = None
        # The call of `generate` under way, the outermost one.
        self.call: Call | None = None
        self._frame: weakref.ReferenceType[Frame] | None = None
        self._inside: weakref.ReferenceType[Encoding] | None = None
        self._taps: dict[str, Tensor] | None = None
        self._runs: list[weakref.ReferenceType[Encoding | DecoderRun] | None] = []

    @property
    def frame(self) -> Frame | None:
        """The multimodal forward under way."""
        return None if self._frame is None else self._frame()

    @frame.setter
    def frame(self, frame: Frame) -> None:
        self._frame = weakref.ref(frame)

    @contextmanager
    def at_level(self, level: int | float) -> Iterator[None]:
        """Runs this thread's forwards at a level within the block."""
        outer, self.level = self.level, level
        try:
            yield
        finally:
            self.level = outer

    def enter(self, run: Encoding | DecoderRun | None) -> None:
        """Notes that a tapped layer of this run is about to run."""
        self._runs.append(None if run is None else weakref.ref(run))

    def leave(self) -> Encoding | DecoderRun | None:
        """The run of the tapped layer that has just ended."""
        run = self._runs.pop() if self._runs else None
        return None if run is None else run()

    @property
    def running(self) -> Encoding | DecoderRun | None:
        """The run of the tapped layer that is under way."""
        run = self._runs[-1] if self._runs else None
        return None if run is None else run()

    @property
    def inside(self) -> Encoding | None:
        """The encoding whose attention has just run in this thread, now or once more in a backward pass."""
        return None if self._inside is None else self._inside()

    @inside.setter
    def inside(self, encoding: Encoding | None) -> None:
        self._inside = None if encoding is None else weakref.ref(encoding)

    def sink(self) -> dict[str, Tensor] | None:
        """Where the projections of the layer being run put their outputs."""
        run = self.running
        return self._taps if run is None else run.taps

    @contextmanager
    def tapping(self, wanted: bool) -> Iterator[dict[str, Tensor]]:
        """What is tapped of a layer within the block, if `wanted`: of a tapped layer that is under way, or of one that
        a backward pass runs again."""
        run = self.running
        taps: dict[str, Tensor] = {} if run is None or not wanted else run.taps
        outer, self._taps = self._taps, taps if wanted and run is None else None
        try:
            yield taps
        finally:
            self._taps = outer

    def show_taps(self, taps: dict[str, Tensor]) -> None:
        """Puts these in place of what was tapped of the layer that is under way."""
        run = self.running
        if run is not None:
            run.taps.update(taps)
