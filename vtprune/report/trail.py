"""What happened to each image in one forward of the decoder: hooks write it while the forward runs, and the report
alone reads it."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from vtprune.decoder.prompt import ImageSpan
from vtprune.encoder.encoding import EncodedImage
from vtprune.method.answers import Computed, Merge
from vtprune.method.kinds import Shown
from vtprune.tensors.compaction import fill_index, pick

# Merges, or what makes them once somebody asks.
Merged = tuple[Merge, ...] | Callable[[], tuple[Merge, ...]]


@dataclass
class Routed:
    """Which of an image's tokens a routed layer computes, worked out when somebody asks.

    alive: (n,) tokens of the image alive there; places: (total,) of its tokens in the row `row` of an input of
    `length`; layout: (B, m) places of the tokens alive, None for all; columns: which of these the layer computes;
    read: whether it has keys and values of the others, too.
    """

    alive: Tensor
    row: int
    places: Tensor
    length: int
    layout: Tensor | None
    columns: Computed
    read: bool = False

    @cached_property
    def computed(self) -> Tensor:
        """(k,) those that it computes."""
        columns = self.places[self.alive]
        if self.layout is not None:
            where = fill_index(self.layout, self.length)
            columns = where[self.row, columns]
        return self.alive[self.columns.mask[self.row, columns].to(self.alive.device)]


@dataclass
class RoutedText:
    """How many text tokens of each conversation a routed layer computes, worked out when somebody asks.

    number: (B, L) the conversation of each text token of the input, -1 for all else; computed, layout, read: as in
    `Routed`.
    """

    number: Tensor
    computed: Computed
    layout: Tensor | None
    read: bool = False

    @cached_property
    def counts(self) -> dict[int, list[int]]:
        """By conversation, the tokens of each row."""
        computed = self.computed.mask
        number = self.number.to(computed.device)
        if self.layout is not None:
            number = pick(number, self.layout)
        most = int(self.number.max()) + 1
        return {talk: ((number == talk) & computed).sum(dim=1).tolist() for talk in range(most)}

    def of_rows(self, rows: Sequence[int]) -> RoutedText:
        """The same of a cache whose rows are the prompt's `rows`."""
        layout = None if self.layout is None else self.layout[list(rows)]
        return RoutedText(self.number[list(rows)], self.computed.of_rows(list(rows)), layout, self.read)


@dataclass
class ImageTrail:
    """The trail of one image in one row of the batch; `order` is a pruner's place in the list.

    places: (total,) of its tokens in the row's input, which follows `offset` places in the cache; talk: which of its
    row's conversations it belongs to; encoded: the image as the encoder left it, without what only methods look at.
    layers: by decoder layer, the tokens (n,) alive there, once the forward is over; routed: by routed layer, which of
    them it computes; cut: the layers whose cache holds only what the last layer left.
    merges: the decoder layer before which some of these tokens (n,) merged, and how. left: by order, the tokens that
    it left the last time that it acted on the decoder's side; asked: by order, the decoder layers after which it was
    asked; probed: by order, the tokens that its probe saw; memories: by order, what it remembers of the tokens left.
    notes: what pruners said; text_after: how many text tokens of its conversation stand after it; share: as in
    `ImageSpan`; newlines_gone: placeholders that are no vision tokens and were dropped with them.
    """

    row: int
    talk: int
    places: Tensor
    offset: int
    encoded: EncodedImage
    layers: list[Tensor] = field(default_factory=list)
    routed: dict[int, Routed] = field(default_factory=dict)
    cut: frozenset[int] = frozenset()
    merges: list[tuple[int, Tensor, Merged]] = field(default_factory=list)
    left: dict[int, int] = field(default_factory=dict)
    asked: dict[int, list[int]] = field(default_factory=dict)
    probed: dict[int, int] = field(default_factory=dict)
    memories: dict[int, dict[str, Any]] = field(default_factory=dict)
    seen: dict[int, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    text_after: int = 0
    share: int | None = None
    newlines_gone: int = 0

    @property
    def key(self) -> tuple[int, int]:
        """Its row, and which of the row's conversations it belongs to."""
        return self.row, self.talk

    @property
    def total(self) -> int:
        """Vision tokens of the whole image."""
        return self.encoded.total

    @property
    def shown(self) -> Shown:
        """What was known of it before anything ran."""
        return replace(self.encoded.shown, keep=self.share)

    @property
    def end(self) -> int:
        """The place after its last token in the whole sequence."""
        return self.offset + int(self.places[-1]) + 1

    def alive_at(self, layer: int) -> Tensor:
        """Tokens alive at decoder layer `layer`; of a forward that was interrupted, at the last one before it."""
        reached = self.layers[: layer + 1]
        return reached[-1] if reached else self.encoded.alive

    def kept_at(self, layer: int) -> Tensor:
        """Tokens that decoder layer `layer` processes."""
        if layer in self.routed:
            return self.routed[layer].computed
        return self.alive_at(layer)

    @property
    def whole(self) -> bool:
        """Whether every decoder layer processed all of its tokens, once the forward is over."""
        return all(self.kept_at(layer).numel() == self.total for layer in range(len(self.layers)))

    def held_at(self, layer: int) -> Tensor:
        """Tokens that decoder layer `layer` has keys and values of in the prefill: those that it processes, and those
        that skip it and are read all the same."""
        routed = self.routed.get(layer)
        return self.alive_at(layer) if routed is not None and routed.read else self.kept_at(layer)

    def cached_at(self, layer: int) -> Tensor:
        """Tokens that decoder layer `layer` holds in its cache once the prefill is over."""
        return self.layers[-1] if layer in self.cut else self.held_at(layer)

    def left_by(self, order: int) -> int:
        """The tokens that the pruner at this place of the list left, or found where it had nothing to do."""
        acted = [place for place in self.left if place <= order]
        return self.left[max(acted)] if acted else int(self.encoded.alive.numel())

    def kept_per_part(self) -> list[int]:
        """How many tokens of each of its parts (frames) enter the decoder."""
        ends = list(itertools.accumulate(part.tokens for part in self.encoded.parts))
        found = [0] * len(ends)
        for token in self.kept_at(0).tolist():
            found[bisect.bisect_right(ends, token)] += 1
        return found

    def merged(self) -> list[tuple[int, Merge]]:
        """The merges between decoder layers, in indices of the whole image, each with the layer that follows it."""
        found = []
        for layer, tokens, merges in self.merges:
            whole = tokens.tolist()
            found += [
                (layer, Merge(whole[one.into], tuple(whole[m] for m in one.members), one.weights))
                for one in (merges() if callable(merges) else merges)
            ]
        return found


@dataclass
class Trail:
    """The trails of the images that one forward brings; routed_text: by routed layer, the text tokens of each
    conversation that it computed."""

    images: list[ImageTrail] = field(default_factory=list)
    routed_text: dict[int, RoutedText] = field(default_factory=dict)

    @classmethod
    def of(cls, spans: Sequence[ImageSpan]) -> Trail:
        """An empty trail for each of these images, in order. The report outlives signals and pixels of theirs; rows
        that share an image go on sharing it."""
        slim = {
            id(span.image): replace(span.image, signals=None, last_signals=None, pixels=None, arrangement=None)
            for span in spans
        }
        return cls(
            [
                ImageTrail(
                    row=span.row,
                    talk=span.talk,
                    places=span.places,
                    offset=span.offset,
                    encoded=slim[id(span.image)],
                    share=span.share,
                )
                for span in spans
            ]
        )

    def of_rows(self, rows: Sequence[int], length: int) -> Trail:
        """What is left of it in a cache of `length` places (0: unknown) whose rows are the prompt's `rows`."""
        text = {layer: counts.of_rows(rows) for layer, counts in self.routed_text.items()}
        return Trail(still_there(self.images, rows, length), text)


def still_there(images: Sequence[ImageTrail], rows: Sequence[int], length: int) -> list[ImageTrail]:
    """Those images that are still in a cache of `length` places (0: unknown) whose rows are the prompt's `rows`."""
    return [
        replace(image, row=row)
        for image in images
        for row, origin in enumerate(rows)
        if image.row == origin and (image.end <= length or not length)
    ]
