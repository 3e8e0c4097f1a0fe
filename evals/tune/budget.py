"""What every setting of a search may spend: tokens, or a share of the FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vtprune.errors import VTPruneError
from vtprune.evals.tune.measure import Measured, Meter
from vtprune.evals.tune.space import Params, setting_key
from vtprune.method.pruner import Pruner
from vtprune.method.registry import create
from vtprune.method.texts import show_keep


class OverBudgetError(VTPruneError):
    """A setting costs more than the budget even with a single token; least: the share of FLOPs that it needs."""

    def __init__(self, least: float) -> None:
        super().__init__(f"needs {100 * least:.1f}% of the FLOPs even with one vision token per image")
        self.least = least


@dataclass
class TokenBudget:
    """The same keep for every setting of a method."""

    method: str
    options: dict[str, Any]
    keep: int | float

    def given(self, params: Params) -> Pruner:
        """The pruner with these hyper-parameters."""
        return create(self.method, **self.options, **params, keep=self.keep)

    def start_from(self, trials: Sequence[Mapping[str, Any]]) -> None:
        """Nothing: all settings have the same keep."""

    def measure(self, params: Params, meter: Meter, unpruned: Tensor) -> tuple[Pruner, Measured]:
        """The pruner with these hyper-parameters, and what it does; raises VTPruneError where it cannot be met."""
        pruner = self.given(params)
        return pruner, meter.measure(pruner, unpruned)

    def __str__(self) -> str:
        return f"keep {show_keep(self.keep)}"


@dataclass
class FlopsBudget:
    """For every setting the largest keep whose prefill costs at most `share` of the unpruned one.

    probe: a few of the samples, on which keeps are tried; tokens: vision tokens of their largest image.
    """

    method: str
    options: dict[str, Any]
    share: float
    probe: Meter
    states: Tensor
    tokens: int
    hint: int = 0
    _known: dict[tuple[str, int], float] = field(default_factory=dict)

    def given(self, params: Params) -> Pruner:
        """The pruner with these hyper-parameters, at its own keep: no keep is known to fit."""
        return create(self.method, **self.options, **params)

    def pruner(self, params: Params, count: int) -> Pruner:
        """A setting that keeps `count` tokens of the largest image, and as large a share of the others."""
        return create(self.method, **self.options, **params, keep=count / self.tokens)

    def start_from(self, trials: Sequence[Mapping[str, Any]]) -> None:
        """Looks around the keep of the last trial that fitted: it depends on what is written down alone."""
        fitted = [trial["pruner"]["keep"] for trial in trials if "kept" in trial]
        self.hint = round(fitted[-1] * self.tokens) if fitted else 0

    def fit(self, params: Params) -> int:
        """The keep, as a count of the largest image's tokens; raises VTPruneError where there is none."""

        def share(count: int) -> float:
            key = setting_key(params), count
            if key not in self._known:
                self._known[key] = self.probe.measure(self.pruner(params, count), self.states).flops_share
            return self._known[key]

        return largest_count(share, self.share, self.tokens, self.hint or self.tokens // 2)

    def measure(self, params: Params, meter: Meter, unpruned: Tensor) -> tuple[Pruner, Measured]:
        """The pruner at the keep that fits, and what it does; raises VTPruneError where none fits."""
        count = self.fit(params)
        while True:
            pruner = self.pruner(params, count)
            measured = meter.measure(pruner, unpruned)
            # Other samples than the probes may cost a little more.
            if measured.flops_share <= self.share:
                return pruner, measured
            if count == 1:
                raise OverBudgetError(measured.flops_share)
            count -= 1

    def __str__(self) -> str:
        return f"{100 * self.share:.4g}% of the FLOPs"


def largest_count(share: Callable[[int], float], limit: float, tokens: int, hint: int) -> int:
    """The largest count below `tokens` at which `share` is at most `limit`, looked for around `hint` first.

    `share` grows with the count. It may raise VTPruneError: below the hint that counts as too few tokens for
    the setting, above it as too many. If nothing fits raises OverBudgetError where one token is
    too many, else what `share` raised.
    """
    low, high = 0, tokens
    fits: set[int] = set()
    refusal: VTPruneError | None = None
    guesses = iter((hint, hint + 1, hint - 1))
    while high - low > 1:
        guess = next(guesses, (low + high) // 2)
        if not low < guess < high:
            continue
        try:
            small = share(guess) <= limit
            if small:
                fits.add(guess)
        except VTPruneError as error:
            refusal, small = error, guess < hint
        low, high = (guess, high) if small else (low, guess)
    if fits:
        return max(fits)
    if refusal is None or low == 0:
        raise OverBudgetError(share(1))
    raise refusal
