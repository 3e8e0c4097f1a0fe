"""What a training run reads: a sequence of conversations, in an order that depends on the seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from vtprune.errors import VTPruneError
from vtprune.training.conversations import Conversation


class TrainingData(Protocol):
    """Conversations by their index; size: how many there are, None for data that is drawn without end."""

    @property
    def size(self) -> int | None:
        """How many there are."""

    def __getitem__(self, index: int) -> Conversation:
        """One of them."""

    def identity(self) -> dict[str, Any]:
        """What makes two of these the same, as plain JSON."""


class Order:
    """Which sample stands at each place of a run: every epoch goes through all of them in another order."""

    def __init__(self, size: int | None, seed: int) -> None:
        self.size, self.seed = size, seed
        self._epoch, self._order = -1, np.zeros(0, dtype=np.int64)

    def __getitem__(self, place: int) -> int:
        """The index of the sample."""
        if self.size is None:
            return place
        epoch, rest = divmod(place, self.size)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.size)
        return int(self._order[rest])


class Part:
    """Some of the samples of a data set."""

    def __init__(self, data: TrainingData, indices: Sequence[int]) -> None:
        self.data, self.indices = data, indices

    @property
    def size(self) -> int:
        """How many there are."""
        return len(self.indices)

    def __getitem__(self, index: int) -> Conversation:
        """One of them."""
        return self.data[self.indices[index]]

    def identity(self) -> dict[str, Any]:
        """What makes two of these the same."""
        return {**self.data.identity(), "records": self.size}

    @property
    def videos(self) -> bool:
        """Whether there are videos among what the whole data set shows."""
        return shows_videos(self.data)

    def texts(self) -> Iterator[tuple[str, str]]:
        """The texts of the whole data set, where it tells them."""
        yield from texts_of(self.data)


def texts_of(data: TrainingData) -> Iterator[tuple[str, str]]:
    """Where each text of a data set stands, and the text, as far as it tells them (`texts`) without its pictures."""
    yield from getattr(data, "texts", lambda: ())()


def shows_videos(data: TrainingData) -> bool:
    """Whether there are videos among what a data set shows, as far as it tells it (`videos`)."""
    return bool(getattr(data, "videos", False))


def hold_out(data: TrainingData, count: int, seed: int) -> tuple[Part, Part]:
    """The data without `count` samples drawn with the seed, and these; raises VTPruneError if too few are left."""
    size = data.size or 0
    if count >= size:
        raise VTPruneError(f"eval_limit: {count} samples are to be held out, and there are {size}")
    mixed = np.random.default_rng([seed, size]).permutation(size).tolist()
    return Part(data, sorted(mixed[count:])), Part(data, sorted(mixed[:count]))
