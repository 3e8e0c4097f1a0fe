"""Which setting to try next: a Gaussian process over a method's search space, without state of its own."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vtprune.console.output import log_level
from vtprune.errors import InputError
from vtprune.method.pruner import Pruner, Tunable

Params = dict[str, Any]
# Drawn at random before the Gaussian process has a say.
STARTUP = 10
# A space of fewer settings than this is listed, so that a search can end when all have been tried.
LISTED = 10_000
DIGITS = 4


def searched(pruner: Pruner, options: Mapping[str, Any], tokens: float = 576) -> dict[str, Tunable]:
    """The search space of a method without the options that are fixed; tokens: of the images searched on."""
    return {name: tunable for name, tunable in pruner.search_space(tokens).items() if name not in options}


def holds(tunable: Tunable, value: Any) -> bool:
    """Whether a value is one that a search may give."""
    if tunable.choices:
        return any(type(value) is type(choice) and value == choice for choice in tunable.choices)
    if isinstance(value, bool) or not isinstance(value, int if tunable.whole else int | float):
        return False
    return tunable.low <= value <= tunable.high


def setting_key(params: Mapping[str, Any]) -> str:
    """Identifies a setting; 1 and 1.0 and true differ."""
    return json.dumps(params, sort_keys=True)


def all_settings(space: Mapping[str, Tunable]) -> list[Params] | None:
    """Every setting of a small finite space, or None."""
    values: list[Sequence[Any]] = []
    for tunable in space.values():
        if not tunable.choices and not tunable.whole:
            return None
        values.append(tunable.choices or range(math.ceil(tunable.low), math.floor(tunable.high) + 1))
    if math.prod(len(one) for one in values) > LISTED:
        return None
    return [dict(zip(space, one, strict=True)) for one in itertools.product(*values)]


def propose(
    space: Mapping[str, Tunable], tried: Sequence[tuple[Params, float | None]], number: int, seed: int
) -> Params | None:
    """The setting of trial `number`, none that was tried before; None if there is no other.

    tried: settings and their objectives, None where there was none: such a setting counts as the worst so
    far. The answer depends on the arguments alone, so a resumed search goes on as it would have.
    """
    known = {setting_key(params) for params, _ in tried}
    found = _suggested(space, tried, seed=int(np.random.SeedSequence([seed, number]).generate_state(1)[0]))
    if setting_key(found) not in known:
        return found
    rng = np.random.default_rng([seed, number])
    finite = all_settings(space)
    if finite is not None:
        left = [params for params in finite if setting_key(params) not in known]
        return left[int(rng.integers(len(left)))] if left else None
    while setting_key(found) in known:
        found = {name: _drawn(tunable, rng) for name, tunable in space.items()}
    return found


def require_optuna() -> None:
    """Raises InputError where the optimiser is not installed."""
    try:
        import optuna  # noqa: F401
        import scipy  # noqa: F401
    except ImportError as error:
        raise InputError(f"a search needs optuna and scipy ({error}); pip install 'vtprune[eval]'") from error


def _suggested(space: Mapping[str, Tunable], tried: Sequence[tuple[Params, float | None]], seed: int) -> Params:
    import optuna

    optuna.logging.set_verbosity(log_level())
    distributions = {name: _distribution(tunable) for name, tunable in space.items()}
    inside = [(p, v) for p, v in tried if p.keys() == space.keys() and all(holds(space[k], p[k]) for k in p)]
    worst = min((value for _, value in inside if value is not None), default=0.0)
    # A fresh sampler a trial: nothing that it remembers could differ after an interruption.
    sampler = optuna.samplers.GPSampler(seed=seed, n_startup_trials=STARTUP)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.add_trials(
        [
            optuna.trial.create_trial(
                params=params, distributions=distributions, value=worst if value is None else value
            )
            for params, value in inside
        ]
    )
    params = study.ask(distributions).params
    return {name: _rounded(space[name], params[name]) for name in space}


def _distribution(tunable: Tunable) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if tunable.choices:
        return CategoricalDistribution(tunable.choices)
    if tunable.whole:
        return IntDistribution(math.ceil(tunable.low), math.floor(tunable.high), log=tunable.log)
    return FloatDistribution(tunable.low, tunable.high, log=tunable.log)


def _drawn(tunable: Tunable, rng: np.random.Generator) -> Any:
    if tunable.choices:
        return tunable.choices[int(rng.integers(len(tunable.choices)))]
    if tunable.whole:
        return int(rng.integers(math.ceil(tunable.low), math.floor(tunable.high), endpoint=True))
    low, high = (math.log(tunable.low), math.log(tunable.high)) if tunable.log else (tunable.low, tunable.high)
    value = float(rng.uniform(low, high))
    return _rounded(tunable, math.exp(value) if tunable.log else value)


def _rounded(tunable: Tunable, value: Any) -> Any:
    """Four digits of a number are enough, and can be read."""
    if tunable.choices or tunable.whole:
        return value
    return float(min(max(float(f"{value:.{DIGITS}g}"), tunable.low), tunable.high))
