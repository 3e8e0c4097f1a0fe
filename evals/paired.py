"""Two settings that answered the same questions: how far apart they are, and how sure that is.

Scores are lists with one number a question, in the same order for both: 1 and 0 for right and wrong, or fractions.
Differences between questions, which both settings share, cancel out; errors that ignore the pairing are too wide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vtprune.errors import InputError

# Said of tasks that a mean of shares leaves out.
NO_SHARE = "The mean share of the unpruned score leaves out where the unpruned model scores nothing:"
# Of the permutation test for fractions: enough to tell 0.001 from 0.002.
RESAMPLES, SEED = 20_000, 0


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences, with the standard error of it and a two-sided p-value of "no difference".

    wins, losses: on how many questions the first setting scored higher, and lower. stderr is None for one question.
    """

    mean: float
    stderr: float | None
    p: float
    wins: int
    losses: int


@dataclass(frozen=True)
class Share:
    """What is left of a score, as a share of another one (1.0: all of it), with its standard error.

    stderr is None where there is too little to tell it from.
    """

    value: float
    stderr: float | None


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Compares two settings question by question.

    The p-value is the exact McNemar test's where every score is 0 or 1; elsewhere that of flipping the signs of the
    differences, all of the ways for few questions and a fixed draw of them for many. Raises InputError for lists
    that are empty, of two lengths, or not of finite numbers.
    """
    first, second = _paired(ours, theirs)
    gaps = first - second
    wins, losses = int((gaps > 0).sum()), int((gaps < 0).sum())
    binary = bool(np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all())
    p = mcnemar(wins, losses) if binary else _sign_flips(gaps)
    return Difference(float(gaps.mean()), _stderr(gaps), p, wins=wins, losses=losses)


def mcnemar(wins: int, losses: int) -> float:
    """The exact two-sided p-value of so many wins and losses, where both are equally likely; ties say nothing."""
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def share_kept(ours: Sequence[float], unpruned: Sequence[float]) -> Share | None:
    """The mean of one setting's scores over the mean of another's, None where the latter is not above 0.

    The standard error is that of the delta method on the paired scores. Raises InputError as `difference` does.
    """
    first, second = _paired(ours, unpruned)
    whole = float(second.mean())
    if whole <= 0:
        return None
    value = float(first.mean()) / whole
    error = _stderr(first - value * second)
    return Share(value, None if error is None else error / whole)


def mean_share(shares: Sequence[Share]) -> Share:
    """The mean of several tasks' shares; tasks have questions of their own, so their errors are independent.

    Raises InputError where there is none.
    """
    if not shares:
        raise InputError("shares: give at least one to take the mean of")
    value = math.fsum(share.value for share in shares) / len(shares)
    errors = [share.stderr for share in shares if share.stderr is not None]
    known = len(errors) == len(shares)
    return Share(value, math.sqrt(math.fsum(error**2 for error in errors)) / len(shares) if known else None)


def holm(values: Sequence[float]) -> list[float]:
    """The p-values of a table after Holm's correction, in their order: a table without any true difference holds one
    at or below x with a chance of at most x."""
    adjusted = [1.0] * len(values)
    highest = 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=lambda index: values[index])):
        highest = max(highest, min(1.0, (len(values) - rank) * values[place]))
        adjusted[place] = highest
    return adjusted


def _paired(ours: Sequence[float], theirs: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise InputError(f"scores: need one of each setting for the same questions, got {len(ours)} and {len(theirs)}")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise InputError("scores: need finite numbers, got NaN or infinity")
    return first, second


def _stderr(values: np.ndarray) -> float | None:
    """Of the mean, from the sample's own variance (n - 1)."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def _sign_flips(gaps: np.ndarray) -> float:
    """How often the sum of the differences is as far from 0 as it is, were each as likely to have the other sign."""
    from scipy.stats import permutation_test

    told = gaps[gaps != 0]
    if not len(told):
        return 1.0
    found = permutation_test(
        (told,),
        lambda sample, axis: sample.sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, 10**7 // len(told)),
        random_state=np.random.default_rng(SEED),
    )
    return float(found.pvalue)
