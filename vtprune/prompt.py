"""The input of one decoder forward: its rows, and the images in them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vtprune.encoding import EncodedImage, cut_signals
from vtprune.selection import Merge
from vtprune.signals import LayerSignals

# The label of what is no answer.
IGNORED = -100
# What is added to a logit and below this takes its key out of the softmax; masks hold the lowest number of their type,
# or minus infinity.
MASKED = -1e4


@dataclass
class ImageSpan:
    """One image in one row of the batch, and what is left of it.

    places: (total,) places of its tokens in the row's input, which follows `offset` places in the cache; kept:
    tokens alive now, indices into the whole image; history: (layer, kept) at every change; merges: (layer, Merge)
    with whole-image indices; memories: what each pruner remembers of the tokens alive; notes: what pruners said;
    text_after: text tokens of the row after it; left: tokens left after each pruner (by its place in the list) acted
    on the decoder's side; asked: the decoder layers after which each of them was asked; probed: the tokens that
    each one's probe saw; cut: layers whose cache holds only what the last layer left; routed: by routed layer, the
    tokens alive and which of them it computes.
    """

    row: int
    places: Tensor
    image: EncodedImage
    kept: Tensor
    offset: int = 0
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

    mask: (B, offset + length) bool, False where a token is padding, or None; positions: (B, length) or (3, B, length)
    position ids as the model got them, or None.
    """

    batch: int
    length: int
    offset: int
    device: torch.device
    mask: Tensor | None
    positions: Tensor | None

    def real(self) -> Tensor:
        """(B, length) True where a token of this input is not padding."""
        return self.real_so_far()[:, -self.length :]

    def real_so_far(self) -> Tensor:
        """(B, offset + length) the same of the whole sequence, with what is in the cache."""
        if self.mask is None:
            return torch.ones(self.batch, self.offset + self.length, dtype=torch.bool, device=self.device)
        return self.mask.to(self.device).expand(self.batch, -1)

    def ends(self, places: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B,) the columns, among the tokens at `places` (B, n) (None: all), of each row's first and last token that
        is no padding."""
        real = self.real()
        if places is not None:
            real = real.gather(1, places.clamp(min=0)) & (places >= 0)
        column = torch.arange(real.shape[1], device=real.device)
        return real.int().argmax(dim=1), (real * column).max(dim=1).values


def real_tokens(mask: Any) -> Tensor | None:
    """(B, n) bool, False where a token is padding, or None, from any attention mask that a decoder takes.

    mask: None; (B, n) in any type, 0 where a token is padding; (B, heads, q, n) bool, or floats that are added to the
    logits: what the last query sees is real; or a dict of these by layer type, of which the one without a window
    counts.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        return None
    if mask.ndim == 2:
        return mask != 0
    last = mask[:, :, -1].to(torch.bool) if not mask.is_floating_point() else mask[:, :, -1] > MASKED
    return last.any(dim=1)


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
