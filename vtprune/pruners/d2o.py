"""D2O: after the prompt the cache keeps what was attended to most, and similar entries take in what leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vtprune.errors import UnsupportedModelError, VTPruneError
from vtprune.method.answers import Eviction
from vtprune.method.checks import check_scores
from vtprune.method.facts import Work
from vtprune.method.pruner import Counted
from vtprune.method.registry import register
from vtprune.method.stages import InCache
from vtprune.method.views import CachedRow, CacheEntries
from vtprune.pruners.parts.checks import check_choice
from vtprune.pruners.parts.cosines import unit_vectors
from vtprune.tensors.attention import at_least_single

Ints = npt.NDArray[np.int64]
# What floats may fall short of a whole number.
ROUNDING = 1e-6


def spread_of_columns(sums: Tensor) -> Tensor:
    """The variance of the attention that tokens get, as a share of the largest that there could be, which is N where
    all N tokens attend to one alone; the mean over key-value heads of that of their mean map.

    sums: (..., Hkv, G, N) column sums of the attention maps of the G query heads that share each of them; each sums to
    N. Returns (...).
    """
    group, tokens = sums.shape[-2:]
    if tokens < 2:
        return sums.new_zeros(sums.shape[:-3])
    heads = sums.mean(dim=-2) if group > 1 else sums.squeeze(-2)
    return heads.var(dim=-1).mean(dim=-1) / tokens


def skew_of_heads(sums: Tensor) -> Tensor:
    """The released code's number: the variances of (..., Hkv, G, N) column sums by query head, scaled to 0 .. 1 among
    the heads of the layer, and their mean: (...)."""
    if sums.shape[-1] < 2:
        return sums.new_zeros(sums.shape[:-3])
    variance = sums.var(dim=-1).flatten(-2)
    low, high = torch.aminmax(variance, dim=-1, keepdim=True)
    return ((variance - low) / (high - low + 1e-6)).mean(dim=-1)


def flatness(densities: Sequence[float]) -> list[float]:
    """softmax(-f): the flatter a layer's attention, the more it may keep."""
    powers = [math.exp(min(densities) - density) for density in densities]
    return [power / sum(powers) for power in powers]


def shares_out(weights: Sequence[float], most: Sequence[int], total: int) -> list[int]:
    """Whole numbers in proportion to the weights, from 1 to `most` each, whose sum is `total` (or that of `most`).

    What a limit takes from one or gives to it comes from the others, in proportion; what rounding down leaves goes to
    the largest remainders, ties to the first. total: at least the count of the weights.
    """
    if total >= sum(most):
        return list(most)

    def limited(scale: float) -> list[float]:
        return [min(float(cap), max(1.0, scale * weight)) for weight, cap in zip(weights, most, strict=True)]

    low, high = 0.0, max(most) / min(weights)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(limited(middle)) <= total else (low, middle)
    ideal = limited(low)
    found = [math.floor(value + ROUNDING) for value in ideal]
    order = sorted(range(len(found)), key=lambda place: (round(found[place] - ideal[place], 6), place))
    while sum(found) < total:
        for place in order:
            if sum(found) < total and found[place] < most[place]:
                found[place] += 1
    return found


def best_of(scores: Tensor, count: int, *, ordered: bool = True) -> tuple[Tensor, Tensor]:
    """The columns of the highest `count` of `scores` (H, n) in each head, ascending, and those of the others, which
    are ascending if `ordered`; ties go to the lowest column."""
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices
    others = order[:, count:]
    return order[:, :count].sort(dim=1).values, others.sort(dim=1).values if ordered else others


def merge_evicted(
    key: Tensor,
    value: Tensor,
    kept: Tensor,
    evicted: Tensor,
    threshold: float | None,
    *,
    by_order: bool = False,
    method: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What evicted entries leave of the kept ones that they are most alike, of keys and values (H, n, d).

    kept: (H, m) and evicted: (H, e) columns. m_e is the cosine of an evicted key to the nearest kept key of its head
    (ties: the first). Those with an m_e of at least tau add m_e * k_e and m_e * v_e to a mean with the kept entry's
    own; the others are lost. tau is the mean of all m_e, averaged with the `threshold` before it if there is one.
    by_order: the mean over heads of the j-th evicted entries' m_e decides for all of them.
    Returns keys and values (H, m, d) of the kept entries, how many entries flowed into each (H, m), and tau.
    """
    count, width = kept.shape[1], key.shape[-1]
    states = at_least_single(torch.cat([key, value], dim=2))
    states = states.gather(1, torch.cat([kept, evicted], dim=1)[..., None].expand(-1, -1, states.shape[-1]))
    unit = unit_vectors(states[..., :width], method)
    cosines = unit[:, count:] @ unit[:, :count].mT
    alike, nearest = cosines.max(dim=2)
    alike = check_scores(alike, method, still=True)
    average = alike.detach().mean()
    tau = average if threshold is None else (threshold + average) / 2
    decisive = alike.mean(dim=0, keepdim=True).expand_as(alike) if by_order else alike
    passed = (decisive >= tau).to(alike)
    # (H, m, e): a product rather than an indexed sum, whose order of additions would not be fixed on a GPU. Counts are
    # whole numbers, which any order sums up alike.
    weights = torch.zeros_like(cosines.mT).scatter_(1, nearest[:, None], (alike * passed)[:, None])
    arrived = torch.zeros_like(weights[..., 0]).scatter_add_(1, nearest, passed)
    # Where nothing arrives, nothing is added and the sum is divided by one.
    sums = torch.baddbmm(states[:, :count], weights.to(states), states[:, count:])
    means = sums / (1 + arrived[..., None])
    return means[..., :width], means[..., width:], arrived, tau


# Entries at the start of the row that text=True never evicts (attention sinks).
SINKS = 4
# What the reference sets a layer's share to at the least.
LEAST = 0.01


@register(
    "d2o",
    paper="D2O: Dynamic Discriminative Operations for Efficient Long-Context Inference of Large Language Models",
    arxiv="2406.13035",
    licence="Apache-2.0",
    needs="q of the decoder layers that it cuts (released: of all), and their caches",
    variants=("paper", "released"),
)
@dataclass(frozen=True)
class D2O(InCache):
    """D2O: Dynamic Discriminative Operations (ICLR 2025, arXiv 2406.13035).

    The prefill is dense. The first forward afterwards that brings no new image (a decode step, or a turn of text)
    still attends to everything; then the caches of decoder layers 2 .. L - 2 are cut. In each key-value head the
    vision entries stay that got the most attention from the whole prompt and from the new tokens, summed over the
    query heads that share it. An evicted entry flows into the kept entry of its image with the nearest key (cosine,
    rotary embedding applied) if the cosine is at least the mean over the image's evicted entries and heads: that entry
    becomes the mean of itself and the evicted keys (values), each times its cosine. merge=False just evicts. Text
    entries stay, and nothing is cut again until another image comes.

    `keep` counts the entries kept of an image in the layers that may be cut, their mean, which is met exactly; None is
    the paper's 0.2. Layers share it by softmax(-f), f the variance of the attention that tokens get in the layer:
    flat layers keep more. Each keeps at least one entry of an image and at most those it has; what these limits
    change, the other layers make up in proportion.

    text=True is the reference's rule, for rows with images: all entries of the prompt count and may go, but for the
    first 4 and a window of the latest, half the budget; after the first cut each new token evicts one entry, by
    attention summed over all steps. The threshold is then the mean of the last one and the new. `keep` is a fraction
    of all entries at the first cut (what is left of the image is not held to it), and a later image starts anew.

    Reference: AIoT-MLSys-Lab/D2O. Its code stands in for the paper's own text, which was not at hand: the paper's
    merging weights (an exponential of the cosine, commented out in the code) are left out. Departures: the code evicts
    per query head from keys repeated for each, a cache several times as large; its threshold of a prompt starts from
    that of the one before; it spreads the budget over all L layers though it cuts L - 3; it scales variances to 0 .. 1
    among the heads of a layer, so that a layer's own variance drops out (here: by N, the largest it can be); it
    lets the mean over heads of their j-th evicted entries, which are unrelated, decide for all. variant="released"
    does the last three; its `keep` may be exceeded or not be met.
    """

    merge: bool = True
    text: bool = False
    variant: str = "paper"

    default_keep = 0.2
    counted = Counted.CACHED

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("merge", "text"):
            check_choice(self.name, option, getattr(self, option), (True, False))
        if self.text and isinstance(self.keep, int):
            raise VTPruneError(
                f"{self.name}: text=True counts all entries of a prompt, so keep is a fraction (a float in (0, 1]), "
                f"got {self.keep!r}"
            )

    def resolve(self) -> dict[str, Any]:
        """Raises VTPruneError for a decoder that has no layer to cut."""
        if self.model.decoder_depth < 4:
            raise VTPruneError(
                f"{self.name} cuts the caches of decoder layers 2 .. L - 2 and needs at least 4 layers, got "
                f"{self.model.decoder_depth}"
            )
        if not self._cuttable:
            raise UnsupportedModelError(
                f"{self.name} cuts the caches of decoder layers 2 .. L - 2, and none of them holds entries on this "
                "decoder (linear attention)"
            )
        return {}

    @property
    def _cuttable(self) -> tuple[int, ...]:
        """All layers with entries but the first two and the last of the decoder."""
        return tuple(layer for layer in self.model.readable if 2 <= layer < self.model.decoder_depth - 1)

    @property
    def released(self) -> bool:
        """Whether the released code's rules hold."""
        return self.variant == "released"

    def evict_layers(self) -> tuple[int, ...]:
        """All with entries but the first two and the last, where any entry is to go."""
        return () if isinstance(self.keep, float) and self.keep == 1 else self._cuttable

    def density_layers(self) -> tuple[int, ...]:
        """Those that may be cut; all for variant="released"."""
        cut = self.evict_layers()
        return self.model.readable if self.released and cut else cut

    @property
    def evicts_again(self) -> bool:
        """Where text may go."""
        return self.text

    def densities(self, sums: Tensor) -> Tensor:
        """How concentrated attention is in each layer, from 0 to 1."""
        return skew_of_heads(sums) if self.released else spread_of_columns(sums)

    def _sizes(self, row: CachedRow, held: list[int], tokens: int) -> list[int]:
        """Entries that each layer keeps of the `held` ones, which were `tokens` at first."""
        weights = dict(zip(row.densities, flatness(list(row.densities.values())), strict=True))
        layers = [layer.index for layer in row.layers]
        budget = self.budget(tokens)
        if not self.released:
            return shares_out([weights[index] for index in layers], held, budget * len(layers))
        ratios = [min(1.0, max(LEAST, weights[index] * len(weights) * budget / tokens)) for index in layers]
        return [min(n, max(1, int(ratio * tokens))) for ratio, n in zip(ratios, held, strict=True)]

    def evict(self, row: CachedRow) -> list[Eviction | None]:
        """Keeps the most attended entries of each head; raises ScoreError for NaN."""
        if self.text:
            return self._evict_all(row)
        # Layers that share their entries share where an image's are, too.
        known: dict[tuple[int, int], Stretch] = {}
        own: dict[int, list[Stretch]] = {number: [] for number in row.totals}
        for layer in row.layers:
            for number, found in own.items():
                key = id(layer.images), number
                if key not in known:
                    known[key] = Stretch.of((layer.images == number).nonzero()[0], layer.key.device)
                found.append(known[key])
        sizes = {
            number: self._sizes(row, [len(stretch.known) for stretch in own[number]], total)
            for number, total in row.totals.items()
        }
        every = Every(row)
        return [
            self._evict_images(layer, [(own[number][order], sizes[number][order]) for number in own], every)
            for order, layer in enumerate(row.layers)
        ]

    def _evict_images(self, layer: CacheEntries, images: list[tuple[Stretch, int]], every: Every) -> Eviction | None:
        scores = check_scores(layer.scores, self.name, still=True)
        cut = _Cut(layer, self, every)
        for own, count in images:
            if count < len(own.known):
                kept, evicted = best_of(own.values(scores), count, ordered=self.released)
                cut.evict(own, kept, evicted, None)
        return cut.result({})

    def _evict_all(self, row: CachedRow) -> list[Eviction | None]:
        sizes = [int(layer.state.get("size", 0)) for layer in row.layers]
        if row.first:
            held = [layer.scores.shape[1] for layer in row.layers]
            sizes = self._sizes(row, held, max(held))
        every = Every(row)
        return [self._evict_oldest(layer, size, every) for layer, size in zip(row.layers, sizes, strict=True)]

    def _evict_oldest(self, layer: CacheEntries, size: int, every: Every) -> Eviction | None:
        scores = check_scores(layer.scores, self.name).clone()
        recent = size // 2
        candidates = scores.shape[1] - recent
        scores[:, :SINKS] = math.inf
        kept, evicted = best_of(scores[:, :candidates], size - recent)
        columns = np.arange(scores.shape[1])
        window = every.columns(layer)[candidates:].expand(scores.shape[0], -1)
        cut = _Cut(layer, self, every)
        whole = Stretch.of(columns, scores.device)
        tau = cut.evict(whole, torch.cat([kept, window], dim=1), evicted, layer.state.get("threshold"))
        state: dict[str, float | Tensor] = (
            {"size": float(size)} if tau is None else {"size": float(size), "threshold": tau}
        )
        return cut.result(state, always=True)

    def flops(self, work: Work) -> int:
        """The products of queries and keys in the watched layers, shared among the images of the row."""
        if not work.decoder_pairs:
            return 0
        watched = {*self.evict_layers(), *self.density_layers()}
        return 2 * work.attention_width * sum(work.decoder_pairs[layer] for layer in watched) // work.images


@dataclass(frozen=True)
class Stretch:
    """Some columns of a cache, ascending: `known` on the host; at: the same on the device, or as a slice where they
    follow each other."""

    known: Ints
    at: Tensor | slice

    @classmethod
    def of(cls, known: Ints, device: torch.device) -> Stretch:
        """Of these columns."""
        if len(known) and known[-1] - known[0] + 1 == len(known):
            return cls(known, slice(int(known[0]), int(known[-1]) + 1))
        return cls(known, torch.from_numpy(known).to(device))

    def values(self, values: Tensor) -> Tensor:
        """(H, m, ...) those of values (H, n, ...) of all columns."""
        return values[:, self.at] if isinstance(self.at, slice) else values.index_select(1, self.at)

    def columns(self, places: Tensor) -> Tensor:
        """The columns at some places among these."""
        return places + self.at.start if isinstance(self.at, slice) else self.at[places]


class Every:
    """All columns of the layers of a row, made once for layers that have equally many."""

    def __init__(self, row: CachedRow) -> None:
        self._most = max((layer.scores.shape[1] for layer in row.layers), default=0)
        self._made: dict[torch.device, Tensor] = {}

    def columns(self, layer: CacheEntries) -> Tensor:
        """(n,) those of a layer, ascending."""
        device = layer.scores.device
        if device not in self._made:
            self._made[device] = torch.arange(self._most, device=device)
        return self._made[device][: layer.scores.shape[1]]


@dataclass(frozen=True)
class _Part:
    """The entries that stay of a stretch: their columns (H, m), keys and values (H, m, d), and how many flowed into
    each (H, m), None for none."""

    stretch: Stretch
    columns: Tensor
    key: Tensor
    value: Tensor
    merged: Tensor | None = None


class _Cut:
    """One layer of one row while its entries leave."""

    def __init__(self, layer: CacheEntries, method: D2O, every: Every) -> None:
        self._layer, self._method, self._every = layer, method, every
        self._parts: list[_Part] = []

    def evict(self, stretch: Stretch, kept: Tensor, evicted: Tensor, threshold: float | None) -> float | Tensor | None:
        """Takes (H, e) of the places of a stretch out, which may flow into those `kept` (H, m), all others, ascending;
        answers the new threshold."""
        if evicted.shape[1] == 0:
            return threshold
        key, value, columns = stretch.values(self._layer.key), stretch.values(self._layer.value), stretch.columns(kept)
        if not self._method.merge:
            wide = kept[..., None].expand(-1, -1, key.shape[-1])
            self._parts.append(_Part(stretch, columns, key.gather(1, wide), value.gather(1, wide)))
            return threshold
        key, value, merged, tau = merge_evicted(
            key,
            value,
            kept=kept,
            evicted=evicted,
            threshold=threshold,
            by_order=self._method.released,
            method=self._method.name,
        )
        self._parts.append(_Part(stretch, columns, key, value, merged=merged))
        return tau

    def result(self, state: dict[str, float | Tensor], *, always: bool = False) -> Eviction | None:
        """What is left, None if that is all of it."""
        if not self._parts and not always:
            return None
        pieces, ascending = self._pieces()
        kept, key, value = (
            torch.cat([getattr(piece, name) for piece in pieces], dim=1) for name in ("columns", "key", "value")
        )
        merged = torch.zeros(kept.shape, device=kept.device)
        start = 0
        for piece in pieces:
            stop = start + piece.columns.shape[1]
            if piece.merged is not None:
                merged[:, start:stop] = piece.merged
            start = stop
        if not ascending:
            kept, order = kept.sort(dim=1)
            wide = order[..., None].expand(-1, -1, key.shape[-1])
            key, value, merged = key.gather(1, wide), value.gather(1, wide), merged.gather(1, order)
        return Eviction(kept=kept, key=key, value=value, merged=merged, state=state, sound=True)

    def _pieces(self) -> tuple[list[_Part], bool]:
        """What stays of the stretches and what stands between them, and whether it is in order."""
        count = self._layer.scores.shape[1]
        found: list[_Part] = []
        if not all(isinstance(part.stretch.at, slice) for part in self._parts):
            gone = np.concatenate([part.stretch.known for part in self._parts])
            rest = np.setdiff1d(np.arange(count), gone)
            return [*self._parts, self._untouched(Stretch.of(rest, self._layer.scores.device))], False
        start = 0
        for part in sorted(self._parts, key=lambda part: int(part.stretch.known[0])):
            first = int(part.stretch.known[0])
            found += [self._untouched(Stretch(np.arange(start, first), slice(start, first))), part]
            start = first + len(part.stretch.known)
        return [*found, self._untouched(Stretch(np.arange(start, count), slice(start, count)))], True

    def _untouched(self, stretch: Stretch) -> _Part:
        layer = self._layer
        columns = self._every.columns(layer)[stretch.at].expand(len(layer.key), -1)
        return _Part(stretch, columns, stretch.values(layer.key), stretch.values(layer.value))
