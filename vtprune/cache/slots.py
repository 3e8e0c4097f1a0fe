"""Which place of the sequence each entry of a cache layer holds."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor


class Slots:
    """The places that the entries of a layer hold: those of a tensor, and after them some in a row.

    Every step of decoding adds one place to every layer. As numbers these launch nothing, and nobody asks for them
    before the next cut, mask or report. Layers that hold the same places share one object.

    start: (B, K) the places of the first entries, -1 where an entry is padding; first, more: after them come `more`
    entries of the places from `first` on. real: how many entries of `start` are no padding, (B,) or one int for all
    rows, once somebody counted them; masked: whether by a mask, None where they are known without one.
    """

    def __init__(self, start: Tensor, *, first: int = 0, more: int = 0) -> None:
        self.start, self.first, self.more = start, first, more
        self.real: Tensor | int | None = None
        self.masked: bool | None = None
        self._changed: tuple[object, Slots] | None = None

    @cached_property
    def tensor(self) -> Tensor:
        """(B, K') of all entries."""
        return self.after(self.start)

    def after(self, start: Tensor) -> Tensor:
        """(..., K') the places of `start` (..., K), and behind them those that were added to these slots."""
        if not self.more:
            return start
        added = torch.arange(self.first, self.first + self.more, device=start.device)
        return torch.cat([start, added.expand(*start.shape[:-1], -1)], dim=-1)

    def extended(self, place: int, count: int) -> Slots:
        """The same and `count` entries more, of the places from `place` on."""
        if self.more and self.first + self.more != place:
            return Slots(self.tensor, first=place, more=count)
        found = Slots(self.start, first=self.first if self.more else place, more=self.more + count)
        found.real, found.masked = self.real, self.masked
        return found

    def extends(self, past: Slots | None) -> bool:
        """Whether nothing but places in a row came to `past`."""
        return past is not None and past.start is self.start

    def changed(self, key: object, change: Callable[[], Slots]) -> Slots:
        """`change()`, made once for all layers that share these slots, so that they go on sharing them (and masks)."""
        if self._changed is None or self._changed[0] is not key:
            self._changed = (key, change())
        return self._changed[1]

    def of_rows(self, change: Callable[[Tensor], Tensor]) -> Slots:
        """Of other rows, which `change` picks."""
        return Slots(change(self.start), first=self.first, more=self.more)
