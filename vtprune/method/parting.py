"""Methods that think in rows and columns, on images whose tokens form several rectangles: asked about one after the
other."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vtprune.method.answers import Merge, Selection
from vtprune.method.asking import Asking, asking, started
from vtprune.method.sharing import shares_by_size
from vtprune.method.stages import BeforeDecoder, BetweenLayers
from vtprune.method.views import VisionStream


@dataclass(frozen=True)
class Piece:
    """What a method is shown of one rectangle: the stream of its tokens, the columns of the whole stream from `first`
    on."""

    first: int
    stream: VisionStream

    @property
    def tokens(self) -> int:
        """How many of its tokens are left."""
        return self.stream.indices.numel()


@asking
def select_by_part(pruner: BeforeDecoder, stream: VisionStream) -> Asking[Selection]:
    """What a method answers for each rectangle of an image, as one choice; the budget is shared by the tokens that are
    left of each, and one whose share is all of them is not asked about."""
    pieces = yield from started(_pieces, stream)
    shares = shares_by_size([piece.tokens for piece in pieces], stream.budget)
    chosen: list[tuple[Piece, Selection]] = []
    for piece, share in zip(pieces, shares, strict=True):
        own: Selection | None = None
        if 0 < share < piece.tokens:
            own = yield from started(pruner.select, replace(piece.stream, budget=share))
        if share:
            every = torch.arange(piece.tokens, device=stream.features.device)
            chosen.append((piece, Selection(every, sound=True) if own is None else own))
    return _joined(chosen)


@asking
def remember_by_part(pruner: BetweenLayers, stream: VisionStream) -> Asking[dict[str, Any]]:
    """What a method remembers of the tokens of each rectangle, one after the other; of what is no tensor, the first
    one's."""
    pieces = yield from started(_pieces, stream)
    found: list[dict[str, Any]] = []
    for piece in pieces:
        if piece.tokens:
            found.append((yield from started(pruner.remember, piece.stream)))
    return {
        name: torch.cat([own[name] for own in found]) if isinstance(value, Tensor) else value
        for name, value in found[0].items()
    }


@asking
def _pieces(stream: VisionStream) -> Asking[list[Piece]]:
    """The rectangles of a stream, each as a stream of its own."""
    sizes = [rectangle.tokens for rectangle in stream.rectangles]
    starts = list(itertools.accumulate(sizes, initial=0))
    bounds = starts
    if stream.indices.numel() < stream.total:
        ends = torch.tensor(starts[1:], device=stream.indices.device)
        bounds = [0, *(yield torch.searchsorted(stream.indices, ends)).tolist()]
    return [
        Piece(first, _of(stream, part, slice(first, last), starts[part]))
        for part, (first, last) in enumerate(itertools.pairwise(bounds))
    ]


def _of(stream: VisionStream, part: int, columns: slice, start: int) -> VisionStream:
    rectangle = stream.rectangles[part]
    own = torch.arange(columns.start, columns.stop, device=stream.indices.device)
    probe = stream.probe
    if probe is not None:
        probe = replace(
            probe, vision=probe.vision[columns], indices=probe.indices[columns] - start, total=rectangle.tokens
        )
    return replace(
        stream,
        features=stream.features[columns],
        grid=rectangle.grid,
        indices=stream.indices[columns] - start,
        total=rectangle.tokens,
        signals=None if stream.signals is None else stream.signals.cut(own),
        last_signals=None if stream.last_signals is None else stream.last_signals.cut(own),
        pixels=rectangle.pixels,
        picture=rectangle.picture,
        probe=probe,
        memory={name: value[columns] if isinstance(value, Tensor) else value for name, value in stream.memory.items()},
        rectangles=(),
    )


def _joined(chosen: Sequence[tuple[Piece, Selection]]) -> Selection:
    """One choice of those of several pieces."""
    merging = any(own.vectors is not None for _, own in chosen)
    vectors = None
    if merging:
        vectors = torch.cat(
            [piece.stream.features[own.kept] if own.vectors is None else own.vectors for piece, own in chosen]
        )

    def merges() -> tuple[Merge, ...]:
        return tuple(
            Merge(piece.first + one.into, tuple(piece.first + member for member in one.members), one.weights)
            for piece, own in chosen
            for one in own.merged()
        )

    return Selection(
        kept=torch.cat([piece.first + own.kept for piece, own in chosen]),
        vectors=vectors,
        merges=merges if merging else (),
        note="; ".join(dict.fromkeys(own.note for _, own in chosen if own.note)),
        sound=all(own.sound for _, own in chosen),
    )
