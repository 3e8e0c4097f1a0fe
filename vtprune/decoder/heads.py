"""Which key-value heads still read vision in the rows of a forward, chosen by what heads put out in its layers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vtprune.method.choosing import top_mask
from vtprune.tensors.apart import Apart, HeadsApart, with_heads
from vtprune.tensors.compaction import places_of


@dataclass
class HeadCascade:
    """The heads of one forward.

    given: by watched layer, (B, H) what each key-value head put out there; left: those that read vision now and those
    that do not, in each row, None for all.
    """

    given: list[Tensor] = field(default_factory=list)
    left: HeadsApart | None = None

    def narrow(self, scores: Tensor, count: int) -> None:
        """Goes on with the best `count` of the heads that are left in each row, by scores (B, H); ties go to the
        lowest index."""
        alive = None
        if self.left is not None:
            alive = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, self.left.reading, True)
        counts = [count] * len(scores)
        self.left = HeadsApart.of(places_of(top_mask(scores, counts, alive), counts), scores.shape[1])


@dataclass(frozen=True)
class Listening:
    """Who is told what the heads of one layer put out; tokens: (B, n) those of the prompts; heads, size: key-value
    heads, and the channels of one head."""

    cascade: HeadCascade
    tokens: Tensor
    heads: int
    size: int

    @torch.no_grad()
    def whole(self, found: Tensor) -> None:
        """found: (B, n, D) what all heads put out, one after the other."""
        self._note(self._magnitudes(found.unflatten(-1, (-1, self.size))))

    @torch.no_grad()
    def in_parts(self, apart: Apart, text: Tensor, vision: Tensor, reading: Tensor) -> None:
        """text: (B, t, Hq, d) what all heads put out for text, vision: (B, v, h, d) those with the key-value heads
        `reading` (B or 1, k) for vision."""
        spoken, seen = self._magnitudes(text), vision.new_zeros(*vision.shape[:2], self.heads, 1)
        if vision.shape[2]:
            share = text.shape[2] // self.heads
            own = vision.unflatten(2, (-1, share)).flatten(3)
            seen = with_heads(seen.to(spoken), reading, _sums(own)[..., None])
        self._note(apart.join(spoken, seen[..., 0].to(spoken)))

    def _magnitudes(self, found: Tensor) -> Tensor:
        """(B, n, H) of (B, n, Hq, d)."""
        return _sums(found.unflatten(2, (self.heads, -1)).flatten(3))

    def _note(self, magnitudes: Tensor) -> None:
        tokens = self.tokens.to(magnitudes.device)
        self.cascade.given.append(magnitudes.masked_fill(~tokens[..., None], 0).sum(dim=1))


def _sums(states: Tensor) -> Tensor:
    """The magnitudes of (..., c), summed up in at least single precision."""
    kind = torch.promote_types(states.dtype, torch.float32)
    found: Tensor = torch.linalg.vector_norm(states, ord=1, dim=-1, dtype=kind)
    return found
