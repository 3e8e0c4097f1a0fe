"""The input of one decoder forward: its rows, and the images in them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vtprune.decoder.conversation import Conversations
from vtprune.encoder.encoding import EncodedImage, cut_signals
from vtprune.method.answers import Merge
from vtprune.method.views import LayerSignals

# The label of what is no answer.
IGNORED = -100
# What is added to a logit and below this takes its key out of the softmax; masks hold the lowest number of their type,
# or minus infinity.
MASKED = -1e4


@dataclass
class ImageSpan:
    """One image in one row of the batch, and what is left of it.

    places: (total,) places of its tokens in the row's input, which follows `offset` places in the cache; kept: tokens
    alive now, indices into the whole image; talk: which of its row's conversations it belongs to; history: (layer,
    kept) at every change; merges: (layer, Merge) with whole-image indices; memories: what each pruner remembers of the
    tokens alive; notes: what pruners said; text_after: text tokens of its conversation after it; left: tokens left
    after each pruner (by its place in the list) acted on the decoder's side; asked: the decoder layers after which
    each of them was asked; probed: the tokens that each one's probe saw; cut: layers whose cache holds only what the
    last layer left; routed: by routed layer, the tokens alive and which of them it computes; structural: places of its
    placeholders that are no vision tokens, which are never dropped and are no text either.
    """

    row: int
    places: Tensor
    image: EncodedImage
    kept: Tensor
    offset: int = 0
    talk: int = 0
    history: list[tuple[int, Tensor]] = field(default_factory=list)
    merges: list[tuple[int, Merge]] = field(default_factory=list)
    memories: dict[int, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    text_after: int = 0
    left: dict[int, int] = field(default_factory=dict)
    asked: dict[int, list[int]] = field(default_factory=dict)
    probed: dict[int, int] = field(default_factory=dict)
    cut: frozenset[int] = frozenset()
    routed: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    structural: Tensor | None = None

    @property
    def key(self) -> tuple[int, int]:
        """Its row, and which of the row's conversations it belongs to."""
        return self.row, self.talk

    @property
    def end(self) -> int:
        """The place after its last token in the whole sequence."""
        return self.offset + int(self.places[-1]) + 1

    def kept_at(self, layer: int) -> Tensor:
        """Tokens that decoder layer `layer` processes."""
        if layer in self.routed:
            alive, computed = self.routed[layer]
            return alive[computed]
        return [kept for first, kept in self.history if first <= layer][-1]

    def cached_at(self, layer: int) -> Tensor:
        """Tokens that decoder layer `layer` holds in its cache once the prefill is over."""
        return self.history[-1][1] if layer in self.cut else self.kept_at(layer)


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

    def real(self) -> Tensor:
        """(B, length) True where a token of this input is not padding."""
        return self.real_so_far()[:, -self.length :]

    def real_so_far(self) -> Tensor:
        """(B, offset + length) the same of the whole sequence, with what is in the cache."""
        if self.mask is None:
            return torch.ones(self.batch, self.offset + self.length, dtype=torch.bool, device=self.device)
        return self.mask.to(self.device).expand(self.batch, -1)

    @cached_property
    def conversations(self) -> Conversations:
        """Which tokens of this input belong together: where the model's own rules keep some apart (positions that
        start again, without a mask and a cache, or a mask of four dimensions), a row holds several conversations."""
        real = self.real()
        if self.sees is not None:
            return Conversations.by_mask(
                self.sees[..., -self.length :].to(self.device).expand(self.batch, -1, -1), real
            )
        positions = self.positions
        if positions is not None and positions.ndim == 3:
            # The first of four planes numbers the text; three planes never say that conversations are packed.
            positions = positions[0] if positions.shape[0] == 4 else None
        if positions is None or self.mask is not None or self.cached:
            return Conversations.one_a_row(real)
        return Conversations.by_positions(positions.to(self.device), real)

    def questions(self, images: Tensor) -> Conversations:
        """The conversations without what the labels mark as an answer, which no prompt holds; one whose text is all
        answer is left as it is. images: (B, length) where a vision token stands."""
        found, labels = self.conversations, self.labels
        if labels is None:
            return found
        answer = labels.to(self.device) != IGNORED
        asked = found.counts((found.number >= 0) & ~images & ~answer) > 0
        left_out = answer & asked.gather(1, found.number.clamp(min=0))
        return replace(found, number=found.number.masked_fill(left_out, -1))


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
    return cut_signals(signals, torch.searchsorted(alive, span.kept.to(alive.device)).to(device))


def forget_tensors(spans: list[ImageSpan]) -> None:
    """Leaves the signals and pixels of images behind once they are selected from: the report outlives them."""
    slim = {id(span.image): replace(span.image, signals=None, last_signals=None, pixels=None) for span in spans}
    for span in spans:
        span.image = slim[id(span.image)]
