"""The parts of MustDrop's filters: what the text looks at in a decoder layer, and how many tokens each one leaves."""

from __future__ import annotations

import bisect
import functools
import itertools
import math

import torch
from torch import Tensor

from vtprune.errors import VTPruneError
from vtprune.method.choosing import top
from vtprune.method.facts import ModelFacts
from vtprune.method.views import DecoderLayer
from vtprune.pruners.parts.attending import check_attending, snapped
from vtprune.pruners.parts.checks import check_factor
from vtprune.pruners.parts.prompt_attention import text_behind

# The published layers of 32, and the thresholds of the published setting for 128 tokens.
PUBLISHED_LAYERS, PUBLISHED_DEPTH = (2, 6, 10, 14), 32
GLOBAL, INDIVIDUAL = 0.0012, 0.001
# At a given keep no filter leaves a smaller share than this of the tokens that it sees.
LEAST_SHARE = 0.5
# Shares between LEAST_SHARE and 1 are searched in steps of 1 / STEPS.
STEPS = 4096


def check_thresholds(method: str, keep: object, *values: float | None) -> None:
    """Raises VTPruneError unless both thresholds are numbers of at least 0 or None, and None beside a `keep`."""
    names = ("global_threshold", "individual_threshold")
    given = {name: value for name, value in zip(names, values, strict=True) if value is not None}
    if keep is not None and given:
        raise VTPruneError(f"{method}: keep and {' and '.join(given)} contradict each other; give one of them")
    for name, value in given.items():
        check_factor(method, name, value)


def thresholds(global_threshold: float | None, individual_threshold: float | None) -> tuple[float, float]:
    """The thresholds, the published ones where they are None."""
    return (
        GLOBAL if global_threshold is None else global_threshold,
        INDIVIDUAL if individual_threshold is None else individual_threshold,
    )


def key_size(tokens: int, share: float) -> int:
    """How many of so many tokens the key set holds: the `share` of them, rounded up."""
    return math.ceil(share * tokens)


def key_set(scores: Tensor, share: float) -> Tensor:
    """The `share` of tokens, rounded up, with the highest (..., N) scores: (..., N) bool; ties: the lowest."""
    rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return rank < key_size(scores.shape[-1], share)


def check_layers(method: str, layers: object) -> None:
    """Raises VTPruneError unless `layers` is None or a tuple of ascending ints from 0."""
    if layers is None:
        return
    found = layers if isinstance(layers, tuple) else ()
    counts = all(type(layer) is int and layer >= 0 for layer in found)
    if not found or not counts or list(found) != sorted(set(found)):
        raise VTPruneError(f"{method}: layers are ascending ints of at least 0 in a tuple, got {layers!r}")


def filter_layers(depth: int) -> tuple[int, ...]:
    """The published filter layers as fractions of the depth: rounded, distinct, from 1 to depth - 2."""
    layers = {max(1, (2 * layer * depth + PUBLISHED_DEPTH) // (2 * PUBLISHED_DEPTH)) for layer in PUBLISHED_LAYERS}
    return tuple(sorted(layer for layer in layers if layer < depth - 1))


def default_layers(model: ModelFacts) -> tuple[int, ...]:
    """Those of `filter_layers`, each moved on to the next one with attention."""
    return snapped(filter_layers(model.decoder_depth), _attending(model))


def _attending(model: ModelFacts) -> tuple[int, ...] | None:
    """The layers after which a filter may act, None for all."""
    layers = model.attention_layers
    return None if layers is None else tuple(layer for layer in layers if layer < model.decoder_depth - 1)


def layers_of(method: str, layers: tuple[int, ...] | None, model: ModelFacts) -> tuple[int, ...]:
    """`layers`, or those of `default_layers`; raises VTPruneError where the decoder has no place for them."""
    depth = model.decoder_depth
    check_attending(method, "layers", layers or (), _attending(model))
    found = default_layers(model) if layers is None else layers
    if not found or found[-1] > depth - 2:
        asked = f"got {', '.join(map(str, found))} of {depth}" if found else f"and a decoder of {depth} has none"
        raise VTPruneError(f"{method}: filters act after decoder layers {int(layers is None)} to L - 2 of L, {asked}")
    return found


def stage_lengths(layers: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """How many decoder layers run before the first filter, between filters, and after the last one."""
    edges = [0, *(layer + 1 for layer in layers), depth]
    return tuple(last - first for first, last in itertools.pairwise(edges))


def stage_tokens(entered: int, share: float, stages: int) -> list[int]:
    """Tokens in each stage where every filter leaves `share` of what it sees, rounded down, at least 1."""
    return [max(1, int(entered * share**stage)) for stage in range(stages)]


def layer_tokens(entered: int, share: float, lengths: tuple[int, ...]) -> int:
    """The sum over decoder layers of the tokens that they process."""
    counts = stage_tokens(entered, share, len(lengths))
    return sum(count * length for count, length in zip(counts, lengths, strict=True))


@functools.lru_cache(maxsize=4096)
def most_entering(alive: int, budget: int, lengths: tuple[int, ...]) -> int:
    """How many of `alive` tokens can enter the decoder so that the mean over its layers meets `budget`."""
    limit = budget * sum(lengths)
    return max(1, bisect.bisect_right(range(1, alive + 1), limit, key=lambda n: layer_tokens(n, LEAST_SHARE, lengths)))


@functools.lru_cache(maxsize=4096)
def schedule(entered: int, budget: int, lengths: tuple[int, ...]) -> tuple[int, ...]:
    """Tokens in each stage, falling by one factor (the largest that will do), their mean over layers at most
    `budget`; `entered` is at most what `most_entering` says."""
    limit, least = budget * sum(lengths), round(LEAST_SHARE * STEPS)
    steps = range(least + 1, STEPS + 1)
    found = bisect.bisect_right(steps, limit, key=lambda step: layer_tokens(entered, step / STEPS, lengths))
    return tuple(stage_tokens(entered, (least + found) / STEPS, len(lengths)))


def rows_after(layer: DecoderLayer, *, text_only: bool) -> Tensor | range:
    """(T,) places of the tokens after the image, or of the text tokens among them; the last prompt token if there
    are none."""
    rows = text_behind(layer) if text_only else range(layer.after, layer.last + 1)
    if rows is None and layer.text_after:
        return layer.text[layer.text.numel() - layer.text_after :]
    return rows or range(layer.last, layer.last + 1)


def sums_and_peaks(attention: Tensor) -> tuple[Tensor, Tensor]:
    """What (T, N) attention gives to each token in all, and the most that a row gives to it: both (N,)."""
    return attention.sum(dim=0), attention.amax(dim=0)


def passes(attention: Tensor, global_threshold: float, individual_threshold: float) -> Tensor:
    """(N,) bool: the tokens that get at least `global_threshold` of all that (T, N) attention gives to the image,
    or at least `individual_threshold` from a row."""
    sums, peaks = sums_and_peaks(attention)
    return (sums >= global_threshold * sums.sum()) | (peaks >= individual_threshold)


def threshold_factor(attention: Tensor) -> Tensor:
    """(N,) the factor up to which both published thresholds can be raised before (T, N) attention no longer
    passes them: ranking by it is what moving the thresholds together does."""
    sums, peaks = sums_and_peaks(attention)
    # Attention to an image can be too small for fp32 altogether.
    whole = sums.sum().clamp(min=torch.finfo(sums.dtype).tiny)
    return (sums / whole / GLOBAL).maximum(peaks / INDIVIDUAL)


def top_with_key(scores: Tensor, key: Tensor, count: int, held: int) -> Tensor:
    """(count,) ascending: the best of `scores` (N,), of which the `key` (N,) ones, at most `held`, are certain of up
    to half the places (the best of them where they are more)."""
    certain = key
    if held > count // 2:
        best = scores.where(key, float("-inf")).sort(descending=True, stable=True).indices[: count // 2]
        certain = torch.zeros_like(key).index_fill_(0, best, True) & key
    return top(scores.masked_fill(certain, float("inf")), count)
