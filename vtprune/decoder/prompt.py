"""The input of one decoder forward: its rows, and the images in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtprune.decoder.conversation import Conversations, numbers_by_mask, numbers_by_positions
from vtprune.decoder.outline import Ints, Outline
from vtprune.encoder.encoding import EncodedImage
from vtprune.method.kinds import Shown
from vtprune.method.views import LayerSignals

# The label of what is no answer.
IGNORED = -100
# What is added to a logit and below this takes its key out of the softmax; masks hold the lowest number of their type,
# or minus infinity.
MASKED = -1e4


@dataclass(eq=False)
class ImageSpan:
    """One image in one row of the batch, and what is left of it.

    stands, places: (total,) places of its tokens in the row's input, which follows `offset` places in the cache, on
    the host and on the device; kept: tokens alive now, indices into the whole image; talk: which of its row's
    conversations it belongs to; layers: the tokens (n,) that were alive at each decoder layer so far; memories: what
    each pruner (by its place in the list) remembers of the tokens alive; structural: places of its placeholders that
    are no vision tokens and no text either; gone: those of them that were dropped; share: what it may keep of a budget
    that its prompt's images share, None where each has its own.
    """

    row: int
    stands: Ints
    image: EncodedImage
    kept: Tensor
    offset: int = 0
    talk: int = 0
    layers: list[Tensor] = field(default_factory=list)
    memories: dict[int, dict[str, Any]] = field(default_factory=dict)
    seen: dict[int, int] = field(default_factory=dict)
    structural: Ints = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    gone: Ints = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    share: int | None = None

    def __post_init__(self) -> None:
        self.places = torch.from_numpy(self.stands).to(self.kept.device)
        # The last answer of `standing`, and for which tokens it is.
        self._standing: tuple[Tensor, Tensor] | None = None
        self._shown: Shown | None = None

    @property
    def standing(self) -> Tensor:
        """(n,) the places of the tokens alive now, on the device."""
        if self._standing is None or self._standing[0] is not self.kept:
            self._standing = self.kept, self.places.index_select(0, self.kept)
        return self._standing[1]

    @cached_property
    def first(self) -> int:
        """The place of the first of its placeholders."""
        return min(int(part[0]) for part in (self.stands, self.structural) if part.size)

    @property
    def key(self) -> tuple[int, int]:
        """Its row, and which of the row's conversations it belongs to."""
        return self.row, self.talk

    def words_after(self, words: Ints) -> int:
        """How many of these rising places (T,) stand after it."""
        return words.size - int(np.searchsorted(words, self.stands[-1], side="right"))

    @property
    def shown(self) -> Shown:
        """What is known of it before anything runs."""
        if self._shown is None or self._shown.keep != self.share:
            self._shown = replace(self.image.shown, keep=self.share)
        return self._shown

    @property
    def entered(self) -> Tensor:
        """The tokens that entered the decoder."""
        return self.layers[0]

    @property
    def processed(self) -> int:
        """How many of its tokens were alive at the decoder layers so far, in all."""
        return sum(kept.numel() for kept in self.layers)

    def keep(self, left: Tensor) -> None:
        """Goes on with those of the tokens alive that stand at `left` (K,), and what is remembered of them."""
        self.kept = self.kept.index_select(0, left)
        self.memories = {
            order: {
                name: values.index_select(0, left.to(values.device)) if isinstance(values, Tensor) else values
                for name, values in memory.items()
            }
            for order, memory in self.memories.items()
        }


def numbers_in_rows(spans: Sequence[ImageSpan]) -> list[int]:
    """Which of these images of its row each one is, counted from 0."""
    return [sum(other.row == span.row for other in spans[:at]) for at, span in enumerate(spans)]


@dataclass
class PromptInfo:
    """The logical input of this forward: `length` tokens after `offset` in the cache, B rows.

    mask: (B, offset + length) bool, False where a token is padding, or None; positions: (B, length) or (3 or 4, B,
    length) position ids as the model got them, or None; cached: whether this forward fills a cache; labels: (B,
    length), `IGNORED` where a token is no answer, or None; sees: (B or 1, length, offset + length) bool, which places
    each token sees, where the mask has four dimensions, else None.
    """

    batch: int
    length: int
    offset: int
    device: torch.device
    mask: Tensor | None
    positions: Tensor | None
    cached: bool = True
    labels: Tensor | None = None
    sees: Tensor | None = None
    _outline: Outline | None = None

    def real(self) -> Tensor:
        """(B, length) True where a token of this input is not padding."""
        return self.real_so_far()[:, -self.length :]

    def real_so_far(self) -> Tensor:
        """(B, offset + length) the same of the whole sequence, with what is in the cache."""
        if self.mask is None:
            return torch.ones(self.batch, self.offset + self.length, dtype=torch.bool, device=self.device)
        return self.mask.to(self.device).expand(self.batch, -1)

    @cached_property
    def _number(self) -> Tensor | None:
        """(B, length) which of its row's conversations each token belongs to, -1 for padding; None where no row has
        padding or more than one.

        Where the model's own rules keep tokens apart (positions that start again, without a mask and a cache, or a
        mask of four dimensions), a row holds several conversations.
        """
        real = self.real()
        if self.sees is not None:
            own = self.sees[..., -self.length :].to(self.device).expand(self.batch, -1, -1)
            return numbers_by_mask(own, real)
        if self._packs:
            assert self._positions is not None
            return numbers_by_positions(self._positions.to(self.device), real)
        return None if self.mask is None else real.long() - 1

    @property
    def _positions(self) -> Tensor | None:
        positions = self.positions
        if positions is not None and positions.ndim == 3:
            # The first of four planes numbers the text; three planes never say that conversations are packed.
            return positions[0] if positions.shape[0] == 4 else None
        return positions

    @property
    def _packs(self) -> bool:
        return self._positions is not None and self.mask is None and not self.cached

    @cached_property
    def conversations(self) -> Conversations:
        """Which tokens of this input belong together."""
        number = self._number
        most = self.outline.most if self.sees is not None or self._packs else 1
        if number is None:
            number = torch.zeros(self.batch, self.length, dtype=torch.long, device=self.device)
        return Conversations(number, most)

    @property
    def outline(self) -> Outline:
        """Where conversations and padding stand, and the placeholders that it was made of."""
        if self._outline is None:
            self.look([])
        assert self._outline is not None
        return self._outline

    def look(self, marks: Sequence[Tensor]) -> Outline:
        """Makes the outline, with the placeholders (B, length) of each source: one transfer from the device."""
        answers = None if self.labels is None else self.labels.to(self.device) != IGNORED
        self._outline = Outline.read(self._number, marks, answers, shape=(self.batch, self.length))
        return self._outline


def sight(mask: Any) -> Tensor | None:
    """(B, q, n) bool which keys each query sees in some head, from a mask (B, heads, q, n) of bools or of floats that
    are added to the logits, or from a dict of masks by layer type, of which the one without a window counts; None for
    any other mask."""
    mask = _one_mask(mask)
    if mask is None or mask.ndim != 4:
        return None
    return (mask > MASKED if mask.is_floating_point() else mask.to(torch.bool)).any(dim=1)


def real_tokens(mask: Any) -> Tensor | None:
    """(B, n) bool, False where a token is padding, or None, from any attention mask that a decoder takes: one that
    `sight` knows, or (B, n) in any type, 0 where a token is padding."""
    sees, mask = sight(mask), _one_mask(mask)
    if sees is not None:
        return _real_by_sight(sees)
    return mask != 0 if mask is not None and mask.ndim == 2 else None


def _one_mask(mask: Any) -> Tensor | None:
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    return mask if isinstance(mask, Tensor) else None


def _real_by_sight(sees: Tensor) -> Tensor:
    """(B, n) of (B, q, n) `sees`, the last q keys being the queries' own: which keys are no padding.

    Padding may see all keys (a model opens rows that see nothing), itself alone, or, on the right, what the last real
    token sees; no real token sees it. So a token is real that a later real one sees, or that sees what no token before
    it did as the last. Of the keys before the queries those are real that a real query sees.
    """
    length, total = sees.shape[1:]
    own = sees[..., total - length :]
    itself, place = own.diagonal(dim1=1, dim2=2), torch.arange(total, device=sees.device)
    opened = own[..., -1] & (place[:length] < length - 1)
    asks = itself & ~opened
    earlier = place < place[total - length :, None]
    seen = (own & asks[..., None] & earlier[:, total - length :]).any(dim=1)
    before = torch.where(sees & earlier, place, -1).amax(dim=2)
    ends = asks & ~seen & (before >= 0)
    again = (before[:, :, None] == before[:, None]) & ends[:, None] & earlier[:, total - length :]
    real = asks & (seen | (ends & ~again.any(dim=2)))
    # A lone token at the end is a prompt of one.
    real[:, -1] |= asks[:, -1] & (before[:, -1] < 0)
    held = (sees[..., : total - length] & real[..., None]).any(dim=1)
    return torch.cat([held, real], dim=1)


def left_signals(signals: LayerSignals | None, image: EncodedImage, span: ImageSpan) -> LayerSignals | None:
    """The signals of the tokens that the span still has, of those that left the encoder."""
    if signals is None or span.kept.numel() == image.alive.numel():
        return signals
    alive, device = image.alive, signals.query.device
    return signals.cut(torch.searchsorted(alive, span.kept.to(alive.device)).to(device))
