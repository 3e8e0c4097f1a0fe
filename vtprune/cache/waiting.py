"""What a KV cache knows of vision tokens that may return: the hidden states of those that a layer left out, and which
ones each forward attended to. Tensors only, which follow the cache's rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from vtprune.tensors.compaction import gather_tokens, pick

Change = Callable[[Tensor], Tensor]
# As the count of an image's tokens: all of them.
WHOLE = torch.iinfo(torch.int32).max


@dataclass(frozen=True)
class Tokens:
    """Tokens on their way into a decoder layer.

    places: (B, n) logical places, -1 padding; states: (B, n, D) hidden states; cos, sin: (B, n, d) their rotary
    embedding.
    """

    places: Tensor
    states: Tensor
    cos: Tensor
    sin: Tensor

    @property
    def count(self) -> int:
        """Columns, padding included."""
        return self.places.shape[1]

    def take(self, columns: Tensor) -> Tokens:
        """The tokens in `columns` (B, m), -1 padding."""
        return Tokens(
            pick(self.places, columns), *(gather_tokens(part, columns) for part in (self.states, self.cos, self.sin))
        )

    def join(self, other: Tokens) -> Tokens:
        """These and the others after them."""
        pairs = ((getattr(self, name), getattr(other, name)) for name in ("places", "states", "cos", "sin"))
        return Tokens(*(torch.cat([one, two.to(one)], dim=1) for one, two in pairs))

    def rows(self, change: Change) -> Tokens:
        """With other rows."""
        return Tokens(change(self.places), change(self.states), change(self.cos), change(self.sin))


@dataclass(frozen=True)
class Waiting:
    """The auxiliary cache of one decoder layer: its input for tokens that were left out before it.

    tokens: all that ever were; those that the layer has computed since stay, so that `crop` can undo it. since: (n,)
    the length of the sequence before the forward that left each out. wanted: (B, I) how many tokens of each image (of
    each row, in order) go on to the layer; an image beyond I goes on whole.
    """

    tokens: Tokens
    since: Tensor
    wanted: Tensor

    def add(self, tokens: Tokens, length: int) -> Waiting:
        """With more tokens, left out by a forward that `length` places came before."""
        since = torch.cat([self.since, torch.full_like(tokens.places[0], length)])
        return replace(self, tokens=self.tokens.join(tokens), since=since)

    def limits(self, images: int) -> Tensor:
        """(B, images) `wanted` of so many images."""
        return pad(self.wanted, (0, images - self.wanted.shape[1]), value=WHOLE)

    def rows(self, change: Change) -> Waiting:
        """With other rows."""
        return replace(self, tokens=self.tokens.rows(change), wanted=change(self.wanted))

    def crop(self, length: int) -> Waiting:
        """As it was when the sequence had `length` places."""
        places = self.tokens.places
        places = places.masked_fill((places >= length) | (self.since >= length), -1)
        columns = (places >= 0).any(dim=0).nonzero().flatten()
        tokens = replace(self.tokens, places=places)
        return replace(
            self, tokens=tokens.rows(lambda part: part[:, columns.to(part.device)]), since=self.since[columns]
        )

    @property
    def bytes(self) -> int:
        """Bytes of the hidden states and rotary embeddings, padding included."""
        parts = (self.tokens.states, self.tokens.cos, self.tokens.sin)
        return sum(part.numel() * part.element_size() for part in parts)


@dataclass(frozen=True)
class Step:
    """One forward on the cache. since: the length of the sequence before it; until: (B, V) how many layers, the first
    ones, attended to each vision token; first: (B, V) the layer from which on it was computed, up to `until`, or the
    number of layers."""

    since: int
    until: Tensor
    first: Tensor

    def rows(self, change: Change) -> Step:
        """With other rows."""
        return Step(self.since, change(self.until), change(self.first))


@dataclass(frozen=True)
class VisionLog:
    """The vision tokens of a cache, and what the forwards since made of them.

    places: (B, V) the logical place of each token that entered the decoder, ascending, -1 padding; owner: (B, V) which
    of the row's images it belongs to, counted from 0; images: how many images a row has at the most.
    """

    places: Tensor
    owner: Tensor
    images: int
    steps: tuple[Step, ...] = ()

    def add(self, places: Tensor, owner: Tensor, images: int) -> VisionLog:
        """With the tokens of more images."""
        return replace(
            self,
            places=torch.cat([self.places, places], dim=1),
            owner=torch.cat([self.owner, owner], dim=1),
            images=images,
        )

    def rows(self, change: Change) -> VisionLog:
        """With other rows."""
        steps = tuple(step.rows(change) for step in self.steps)
        return replace(self, places=change(self.places), owner=change(self.owner), steps=steps)

    def crop(self, length: int) -> VisionLog:
        """As it was when the sequence had `length` places."""
        steps = tuple(step for step in self.steps if step.since < length)
        return replace(self, places=self.places.masked_fill(self.places >= length, -1), steps=steps)
