"""Attention rows from the queries and keys of one layer, never a materialised N x N map per head."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor

# Scores that are held at once: what a CPU's cache holds, and what an accelerator's memory can spare for few launches.
CPU_BYTES, CHUNK_BYTES = 8 * 2**20, 64 * 2**20
# The longest prompt for which what hides later tokens is made once for all, which takes a megabyte of a device.
SHORT = 512


def rows_at_once(device: torch.device, numbers: int) -> int:
    """How many rows of so many fp32 numbers each are computed together on a device, at least one."""
    return max(1, (CPU_BYTES if device.type == "cpu" else CHUNK_BYTES) // (4 * numbers))


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Switches autocast off: scores are fp32 products, whatever the model runs in."""
    if not _casts(device.type) or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


@lru_cache
def _casts(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


def at_least_single(states: Tensor) -> Tensor:
    """The states in fp32, or in fp64 if that is what they are: what is summed up and goes on keeps its precision."""
    return states.to(torch.promote_types(states.dtype, torch.float32))


def attention_rows(query: Tensor, key: Tensor, scale: float, valid: Tensor | None = None) -> Tensor:
    """Softmaxed attention of a few queries over all keys, in fp32.

    query: (..., H, Q, d), key: (..., H, N, d), valid: (..., N) bool, False where a key is padding.
    Returns (..., H, Q, N).
    """
    query = query.float() if scale == 1 else query.float() * scale
    logits = torch.matmul(query, key.float().transpose(-1, -2))
    if valid is not None:
        logits.masked_fill_(~valid[..., None, None, :], float("-inf"))
    return logits.softmax(dim=-1)


def attention_received(query: Tensor, key: Tensor, scale: float, *, skip: int = 0, softmax: bool = True) -> Tensor:
    """Mean over heads and queries of the attention that each key receives, accumulated in chunks of queries.

    query, key: (..., H, N, d). `skip` leading tokens (CLS) are left out of queries and of the answer, but stay in
    the softmax. Returns (..., N - skip) in fp32.
    """
    return _accumulate(query, key, scale=scale, skip=skip, softmax=softmax)


def attention_received_and_given(
    query: Tensor, key: Tensor, scale: float, *, skip: int = 0, softmax: bool = True
) -> tuple[Tensor, Tensor]:
    """Both means of `attention_received` and of what each query gives, in one pass, each (..., N - skip)."""
    given: list[Tensor] = []
    received = _accumulate(query, key, scale=scale, skip=skip, softmax=softmax, given=given)
    return received, torch.cat(given, dim=-1)


def _accumulate(
    query: Tensor, key: Tensor, *, scale: float, skip: int, softmax: bool, given: list[Tensor] | None = None
) -> Tensor:
    """The mean that each key receives; what each query gives is added to `given`, chunk by chunk."""
    heads, tokens, _ = key.shape[-3:]
    rows = rows_at_once(key.device, key.shape[:-1].numel())
    turned = key.float().transpose(-1, -2)
    received = turned.new_zeros(*key.shape[:-3], tokens - skip)
    for chunk in query[..., skip:, :].split(rows, dim=-2):
        weights = torch.matmul(chunk.float() * scale, turned)
        weights = weights.softmax(dim=-1) if softmax else weights
        weights = weights[..., skip:]
        received += weights.sum(dim=(-3, -2))
        if given is not None:
            given.append(weights.mean(dim=(-3, -1)))
    return received / (heads * (tokens - skip))


class Sight(ABC):
    """Which keys each of some queries sees. What hides the others is made once, whatever the layers that ask."""

    def __init__(self) -> None:
        self._hidden: dict[tuple[int, int, bool], Tensor] = {}

    @abstractmethod
    def span(self, start: int, stop: int) -> tuple[int, int]:
        """Of the queries `start` .. `stop` - 1: how many keys, the first ones, all of them see, and how many any of
        them; keys that no query of a chunk sees are left out of its products."""

    @abstractmethod
    def hides(self, start: int, stop: int) -> bool:
        """Whether one of these queries may not see a key that another one sees."""

    @abstractmethod
    def make(self, start: int, stop: int, *, whole: bool) -> Tensor:
        """What `hidden` answers."""

    def hidden(self, start: int, stop: int, *, whole: bool) -> Tensor:
        """(q, n) bool which keys each of these queries does not see, of those that not all of them see; whole: fp32,
        what that adds to the logits of all keys that any of them sees, 0 or -inf."""
        known = (start, stop, whole)
        if known not in self._hidden:
            self._hidden[known] = self.make(start, stop, whole=whole)
        return self._hidden[known]


class SightByPlaces(Sight):
    """Queries see the keys at or before their own places.

    asked: (Q,) the places of the queries; places: (N,) those of the keys; seen: (Q,) how many of the keys lie at or
    before each query's place, where both stand in order of their places.
    """

    def __init__(self, asked: Tensor, places: Tensor, seen: Sequence[int] | None = None) -> None:
        super().__init__()
        self._asked, self._places, self._seen = asked, places, seen

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """All keys, unless it is known how many of them are seen."""
        return (0, len(self._places)) if self._seen is None else (self._seen[start], self._seen[stop - 1])

    def hides(self, start: int, stop: int) -> bool:
        """A query alone sees all keys of its chunk where it is known how many these are."""
        return self._seen is None or stop - start > 1

    def make(self, start: int, stop: int, *, whole: bool) -> Tensor:
        """The places, compared."""
        first, end = self.span(start, stop)
        own = self._places[0 if whole else first : end] > self._asked[start:stop, None]
        return torch.zeros(1, 1, device=own.device).masked_fill(own, float("-inf")) if whole else own


@lru_cache
def _triangle(device: torch.device, length: int) -> Tensor:
    """(length, length) what hides later tokens, 0 or -inf."""
    # It outlives the block that asks for it first.
    with torch.inference_mode(False):
        return torch.full((length, length), float("-inf"), device=device).triu_(1)


def hiding_later(start: int, stop: int, keys: int, device: torch.device) -> Tensor:
    """(stop - start, keys) fp32 what hides the later ones of so many keys from the queries `start` .. `stop` - 1: 0
    or -inf, which nobody writes into."""
    if max(stop, keys) <= SHORT:
        return _triangle(device, SHORT)[start:stop, :keys]
    return torch.full((stop - start, keys), float("-inf"), device=device).triu_(start + 1)


class CausalSight(Sight):
    """Queries see their own key and those before it: there are as many of both, in one order."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """Up to the first query's own key, and up to the last one's."""
        return start + 1, stop

    def hides(self, start: int, stop: int) -> bool:
        """A query alone sees all keys of its chunk."""
        return stop - start > 1

    def make(self, start: int, stop: int, *, whole: bool) -> Tensor:
        """Triangles."""
        if whole:
            return hiding_later(start, stop, stop, self._device)
        count = stop - start
        return torch.ones(count, count - 1, dtype=torch.bool, device=self._device).triu_()


def attention_sums(query: Tensor, key: Tensor, sight: Sight, scale: float) -> Tensor:
    """The attention that each key gets from all queries up to which it is visible, in fp32, accumulated in chunks of
    queries.

    query: (H, Q, d); key: (Hkv, N, d), each shared by H / Hkv heads. Returns (H, N).
    """
    heads, count, width = query.shape
    group, tokens = heads // key.shape[0], key.shape[1]
    turned = key.float().transpose(-1, -2)
    sums: Tensor | None = None
    rows = rows_at_once(query.device, heads * tokens)
    for start in range(0, count, rows):
        stop = min(start + rows, count)
        first, end = sight.span(start, stop)
        some = (query if stop - start == count else query[:, start:stop]).float()
        some = some.reshape(len(key), group * (stop - start), width)
        # Where most is hidden it is added as the product is made; else it is filled in behind what all queries see.
        whole, hides = 2 * first < end, sight.hides(start, stop)
        if whole and hides:
            added = sight.hidden(start, stop, whole=True).to(some.dtype)
            added = added if group == 1 else added.repeat(group, 1)
        else:
            # Nothing is added to the product.
            added = some.new_empty(1, 1, 1)
        seen = turned if end == tokens else turned[..., :end]
        logits = torch.baddbmm(added, some, seen, beta=int(whole and hides), alpha=scale)
        logits = logits.view(heads, stop - start, end)
        if hides and not whole:
            logits[..., first:].masked_fill_(sight.hidden(start, stop, whole=False), float("-inf"))
        weights = logits.softmax(dim=-1)
        found = weights.sum(dim=1) if stop - start > 1 else weights[:, 0]
        if sums is None and end == tokens:
            sums = found
            continue
        if sums is None:
            sums = torch.zeros(heads, tokens, device=key.device)
        sums[:, :end].add_(found)
    return torch.zeros(heads, tokens, device=key.device) if sums is None else sums


def split_heads(states: Tensor, heads: int) -> Tensor:
    """(..., N, H * d) to (..., H, N, d)."""
    return states.unflatten(-1, (heads, -1)).transpose(-2, -3)
