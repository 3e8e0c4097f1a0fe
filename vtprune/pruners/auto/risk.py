"""How much a setting may lose, with proof: conformal risk control, and learn-then-test.

Settings stand in a row, from the boldest to the most careful one, which is the whole model and loses nothing. Losses
are (n, m) in [0, 1]: of each of n pictures under each of m settings. Both rules see them for pictures that are drawn
like those to come, and answer the place of the boldest setting that they can vouch for, m - 1 where there is none.

Conformal risk control (arXiv 2208.02814) holds in expectation, over what it was calibrated with and over the next
picture; it needs losses that never rise towards the careful end, which `monotone` makes of any. Learn-then-test (arXiv
2110.01052) holds for all but a share of the calibrations, and needs no such thing.
"""

from __future__ import annotations

import math

import numpy as np

from vtprune.errors import InputError, VTPruneError

# Halvings in the search for a bound: past the digits that a message shows.
HALVINGS = 60


def monotone(losses: np.ndarray) -> np.ndarray:
    """(n, m) the least losses that are nowhere below these and never rise towards the careful end.

    Each is the highest one from its setting on. The opposite, the lowest one so far, would lie below the losses, and
    what holds for it says nothing of them.
    """
    return np.maximum.accumulate(losses[:, ::-1], axis=1)[:, ::-1]


def mean_by(groups: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(g, m) means of the rows of (n, m) values that have the same group: several questions about one picture are one
    draw."""
    _, place = np.unique(groups, return_inverse=True)
    sums = np.zeros((int(place.max()) + 1, values.shape[1]))
    np.add.at(sums, place, values)
    return sums / np.bincount(place)[:, None]


def needed(level: float, delta: float | None = None) -> int:
    """The fewest pictures with which a setting that never loses anything would be vouched for: at `level`, the most
    that may be lost, and wrong with probability `delta`; None: in expectation."""
    exact = 1 / level - 1 if delta is None else math.log(delta) / math.log1p(-level)
    return math.ceil(exact - 1e-9)


def check_level(level: float, delta: float | None, pictures: int, what: str = "") -> None:
    """Raises InputError where so few pictures can vouch for nothing; what: of which task."""
    least = needed(level, delta)
    if pictures < least:
        sure = "" if delta is None else f" with a confidence of {1 - delta:g}"
        raise InputError(
            f"samples: {pictures} pictures{what} cannot vouch for an agreement of {1 - level:g}{sure}, whatever they "
            f"show; it takes at least {least}"
        )


def crc_bound(losses: np.ndarray) -> np.ndarray:
    """(m,) what conformal risk control says of each setting: (the sum of losses + 1) / (n + 1)."""
    return (losses.sum(axis=0) + 1) / (len(losses) + 1)


def conformal(losses: np.ndarray, level: float) -> int:
    """The boldest setting whose expected loss on the next picture is at most `level`, for losses as `monotone` makes
    them; raises VTPruneError for others."""
    _check(losses)
    if (np.diff(losses, axis=1) > 0).any():
        raise VTPruneError("conformal risk control needs losses that never rise towards the careful end")
    # In exact numbers a bound may be equal to the level.
    fine = crc_bound(losses) <= level + 1e-12
    return int(fine.argmax()) if fine.any() else losses.shape[1] - 1


def p_value(losses: np.ndarray, level: float) -> float:
    """How likely it is that n losses (n,) are this low in the mean where their expectation is above `level`: exact for
    losses of 0 and 1, else by the bound of Hoeffding and Bentkus."""
    count, mean = len(losses), float(losses.mean())
    if np.isin(losses, (0, 1)).all():
        return _at_most(round(float(losses.sum())), count, level)
    low = min(mean, level)
    bentkus = math.e * _at_most(math.ceil(count * mean - 1e-9), count, level)
    return min(1.0, math.exp(-count * _divergence(low, level)), bentkus)


def learn_then_test(losses: np.ndarray, level: float, delta: float) -> int:
    """The boldest setting such that its expected loss is at most `level` with probability 1 - `delta` over the
    calibration: settings are tested from the careful end on, each at `delta`, up to the first that fails."""
    _check(losses)
    chosen = losses.shape[1] - 1
    while chosen and p_value(losses[:, chosen - 1], level) <= delta:
        chosen -= 1
    return chosen


def ltt_bound(losses: np.ndarray, delta: float) -> float:
    """The lowest level at which the test of losses (n,) would have passed."""
    low, high = float(losses.mean()), 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if p_value(losses, middle) <= delta else (middle, high)
    return high


def _at_most(hits: int, count: int, level: float) -> float:
    """The chance of so many hits of `count` or fewer, at `level` each."""
    # Not at the top: every `import vtprune` of a method would wait for it.
    from scipy.stats import binom

    return float(binom.cdf(hits, count, level))


def _divergence(low: float, level: float) -> float:
    """Kullback-Leibler between coins of these two biases, low <= level in (0, 1)."""
    first = low * math.log(low / level) if low else 0.0
    return first + (1 - low) * math.log((1 - low) / (1 - level))


def _check(losses: np.ndarray) -> None:
    if losses.ndim != 2 or not losses.size or not ((losses >= 0) & (losses <= 1)).all():
        raise VTPruneError(f"losses are (n, m) numbers in [0, 1], got an array of shape {losses.shape}")
    if losses[:, -1].any():
        raise VTPruneError("the last setting is the whole model, whose answers are the reference: it loses nothing")
