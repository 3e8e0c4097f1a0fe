"""What the cache held after each forward, noted while a generation runs and counted when somebody asks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vtprune.cache.books import CacheLayer, books, entry_layers
from vtprune.cache.layer import PrunedLayer
from vtprune.cache.names import PLANES, ROWS
from vtprune.cache.states import StateLayer
from vtprune.cache.waiting import Step, VisionLog
from vtprune.report.report import ImageStep
from vtprune.report.trail import ImageTrail


def origins(layers: Sequence[CacheLayer]) -> Tensor | None:
    """(B, 1) the row of the prompt that each row of the cache was, None where they stand as they came in."""
    return books(layers).aux.get(ROWS)


@dataclass(frozen=True)
class Held:
    """A `CacheNote`, counted.

    entries[layer][row] in the cache, 0 in the layers `states`; whole[row]: of any other layer, had nothing been
    dropped; returned[layer][row]: the
    vision tokens of earlier forwards that this one computed (none: empty); allocated, waiting: bytes.
    """

    entries: list[list[int]] = field(default_factory=list)
    whole: list[int] = field(default_factory=list)
    returned: list[list[int]] = field(default_factory=list)
    allocated: int = 0
    waiting: int = 0
    states: frozenset[int] = frozenset()

    @property
    def unpruned(self) -> list[list[int]]:
        """[layer][row] entries, had nothing been dropped."""
        none = [0] * len(self.whole)
        return [none if layer in self.states else self.whole for layer in range(len(self.entries))]

    def with_returned(self, tokens: list[list[int]]) -> list[list[int]]:
        """[layer][row] of tokens, those that returned included."""
        if not self.returned:
            return tokens
        return [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(tokens, self.returned, strict=True)]


@dataclass(frozen=True)
class CacheNote:
    """The cache after one forward.

    rows: their `origins`; entries: of each layer, padding left out, two numbers to be added, each (B,) or one int for
    all rows; layers that hold the same places share them; whole: one number, had nothing been dropped. allocated:
    bytes of the cache's tensors, padding included; waiting: of those beside it. step: which tokens returned, where any
    may. states: the layers that hold a state in place of entries.
    """

    rows: Tensor | None
    entries: tuple[tuple[Tensor | int, Tensor | int], ...]
    whole: Tensor | int
    allocated: int
    waiting: int
    step: Step | None
    states: frozenset[int] = frozenset()

    @classmethod
    def of(cls, layers: Sequence[CacheLayer], mask: Tensor | None, *, full: bool = False) -> CacheNote:
        """Notes what the layers hold; `mask`: (B, length) with 0 where a token is padding, or None; full: whether it
        is None because nothing is. Waits for no device."""
        counted, holding, book = _Counted(mask, full=full), entry_layers(layers), books(layers)
        entries = tuple((0, 0) if isinstance(layer, StateLayer) else counted.entries(layer) for layer in layers)
        whole = counted.between(0, book.length)
        steps = book.log.steps if book.log is not None else ()
        waiting = sum(layer.waiting.bytes for layer in holding if layer.waiting is not None)
        waiting += sum(layer.aux[PLANES].nbytes for layer in holding if PLANES in layer.aux)
        return cls(
            rows=origins(layers),
            entries=entries,
            whole=whole,
            allocated=sum(map(_bytes, layers)),
            waiting=waiting,
            step=steps[-1] if steps else None,
            states=frozenset(index for index, layer in enumerate(layers) if isinstance(layer, StateLayer)),
        )

    def held(self, rows: Sequence[int]) -> Held:
        """What these rows of the cache hold."""
        known: dict[int, list[int]] = {}
        for entries in (*itertools.chain(*self.entries), self.whole):
            if id(entries) not in known:
                known[id(entries)] = _counts(entries, rows)
        returned = [] if self.step is None else _returned(self.step, rows, len(self.entries))
        return Held(
            entries=[
                [one + two for one, two in zip(known[id(start)], known[id(more)], strict=True)]
                for start, more in self.entries
            ],
            whole=known[id(self.whole)],
            returned=returned,
            allocated=self.allocated,
            waiting=self.waiting,
            states=self.states,
        )


def image_steps(log: VisionLog | None, image: ImageTrail, depth: int) -> list[ImageStep]:
    """What the forwards after the one that brought an image made of its tokens, where these may return."""
    if log is None:
        return []
    entered = image.kept_at(0)
    own = (image.offset + image.places[entered]).to(log.places.device)
    row, column = (log.places[image.row] == own[:, None]).nonzero(as_tuple=True)
    tokens = entered.to(row.device)[row].tolist()
    return [
        _image_step(tokens, step.until[image.row, column].tolist(), step.first[image.row, column].tolist(), depth)
        for step in log.steps
        if step.since > image.offset and tokens
    ]


def _image_step(tokens: list[int], until: list[int], first: list[int], depth: int) -> ImageStep:
    attended: list[list[int]] = []
    computed: list[list[int]] = []
    changes = {0, *until, *first}
    for layer in range(depth):
        if layer in changes:
            still = [(token, since) for token, end, since in zip(tokens, until, first, strict=True) if layer < end]
            alive, new = [token for token, _ in still], [token for token, since in still if since <= layer]
        # Layers that do the same share a list.
        attended.append(alive)
        computed.append(new)
    return ImageStep(attended, computed)


def _counts(entries: Tensor | int, rows: Sequence[int]) -> list[int]:
    if isinstance(entries, int):
        return [entries for _ in rows]
    counts = entries.tolist()
    return [counts[row] for row in rows]


def _returned(step: Step, rows: Sequence[int], depth: int) -> list[list[int]]:
    """Tokens [layer][row] that a forward computed again."""
    until, first = step.until[list(rows)], step.first[list(rows)]
    layers = torch.arange(depth, device=until.device)[:, None, None]
    return ((first <= layers) & (layers < until)).sum(dim=2).tolist()


class _Counted:
    """Counts entries that are no padding, by the `mask` (B, length) of all places, None where there is none; full:
    whether nothing is padding, as the host knows."""

    def __init__(self, mask: Tensor | None, *, full: bool) -> None:
        self._mask, self._full = mask, full
        self._between: dict[tuple[int, int], Tensor | int] = {}
        self._held: tuple[Tensor, Tensor] | None = None

    def between(self, first: int, end: int) -> Tensor | int:
        """How many of the places from `first` to before `end` hold a token."""
        if self._mask is None:
            return end - first
        if (first, end) not in self._between:
            self._between[first, end] = self._mask[:, first:end].sum(dim=1)
        return self._between[first, end]

    def entries(self, layer: PrunedLayer) -> tuple[Tensor | int, Tensor | int]:
        """Of a layer: those that its slots start with, which are counted once, and those that came to them."""
        slots = layer.places
        if slots is None:
            return self.between(0, layer.length), 0
        masked = None if self._full else self._mask is not None
        if slots.real is None or (masked != slots.masked and None not in (masked, slots.masked)):
            slots.real, slots.masked = self._real(slots.start, ragged=layer.ragged), masked
        return slots.real, self.between(slots.first, slots.first + slots.more)

    def _real(self, places: Tensor, *, ragged: bool) -> Tensor | int:
        if self._mask is None:
            return (places >= 0).sum(dim=1) if ragged else places.shape[1]
        if self._held is None:
            # Padding, at -1, takes the extra place.
            held = torch.nn.functional.pad(self._mask.to(places.device).bool(), (0, 1))
            self._held = torch.arange(len(held), device=held.device)[:, None], held
        rows, held = self._held
        return held[rows, places.clamp(max=held.shape[1] - 2)].sum(dim=1)


def _bytes(layer: CacheLayer) -> int:
    if isinstance(layer, StateLayer):
        return layer.nbytes
    return sum(part.numel() * part.element_size() for part in (layer.keys, layer.values) if part is not None)
