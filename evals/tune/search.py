"""The loop of a search: one setting after another, each written down before the next one is asked for."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from typing import Any

from torch import Tensor

import vtprune
from vtprune.adapters import adapter_for
from vtprune.console.progress import Steps
from vtprune.errors import InputError, ScoreError, VTPruneError, first_line
from vtprune.evals.tune.budget import FlopsBudget, OverBudgetError, TokenBudget
from vtprune.evals.tune.measure import Measured, Meter
from vtprune.evals.tune.space import (
    STARTUP,
    Params,
    holds,
    propose,
    searched,
)
from vtprune.evals.tune.store import (
    FAILED,
    INFEASIBLE,
    MEASURED,
    Search,
    Trial,
)
from vtprune.method.config import from_dict
from vtprune.method.pruner import Pruner, Tunable


class Tuner:
    """One search on one loaded model; everything that it finds goes into `search` at once."""

    def __init__(
        self,
        model: Any,
        budget: TokenBudget | FlopsBudget,
        meters: dict[str, Meter],
        states: dict[str, Tensor],
        search: Search,
        steps: Steps,
    ) -> None:
        self.model, self.budget, self.meters, self.states = model, budget, meters, states
        self.search, self.steps = search, steps

    def run(self, total: int, seed: int) -> None:
        """Measures trials until there are `total` of them; raises InputError if none can be measured."""
        trials = self.search.trials
        if not trials:
            self._step({}, 0)
        space = self._search_space()
        while len(trials) < total:
            tried = [(trial["params"], trial["objective"]) for trial in trials if trial["params"]]
            params = propose(space, tried, len(trials), seed)
            if params is None:
                self.steps.say(f"every setting of the search space has been tried ({len(tried)})")
                break
            self._step(params, len(trials))
            self._check_reach()
        self.search.save()
        if self.search.best is None:
            raise self._nothing_found()

    def _step(self, params: Params, number: int) -> None:
        """Measures one setting, and says what came of it and what the best one is."""
        best = self.search.best
        self.steps.begin("no objective yet" if best is None else f"best so far {best['objective']:.5f}")
        self._try(params, number)
        trial, best = self.search.trials[number], self.search.best
        found = trial["state"] if trial["objective"] is None else f"cosine {trial['objective']:.5f}"
        so_far = (
            "no objective yet" if best is None else f"best so far {best['objective']:.5f} (trial {best['number']})"
        )
        self.steps.end(f"trial {number}: {found}, {so_far}")

    def _check_reach(self) -> None:
        """Raises InputError once as many settings as are drawn at random have all been refused for one reason."""
        trials = self.search.trials
        over = all(trial.get("least_flops") is not None for trial in trials)
        alike = len({trial["reason"] for trial in trials}) == 1
        if len(trials) >= STARTUP and all(trial["state"] == INFEASIBLE for trial in trials) and (over or alike):
            raise self._nothing_found()

    def _search_space(self) -> dict[str, Tunable]:
        """The search space at the budget that the defaults were measured at."""
        pruner = from_dict(self.search.trials[0]["pruner"])
        assert isinstance(pruner, Pruner)
        if pruner.keep is None:
            # A budget of FLOPs gives every setting a keep, also where the defaults could not meet it.
            pruner = dataclasses.replace(pruner, keep=0.5)
        space = searched(pruner, self.budget.options)
        self.search.data["space"] = {name: _written(tunable) for name, tunable in space.items()}
        return space

    def _try(self, params: Params, number: int) -> None:
        """Measures one setting and writes it down; {} are the method's defaults."""
        self.budget.start_from(self.search.trials)
        started = time.perf_counter()
        trial: Trial = {"number": number, "params": params, "state": INFEASIBLE, "objective": None, "reason": None}
        try:
            pruner, measured = self.budget.measure(params, self.meters["search"], self.states["search"])
        except vtprune.UnsupportedModelError:
            raise
        except VTPruneError as error:
            pruner = self.budget.given(params)
            trial["reason"] = first_line(error)
            trial["state"] = FAILED if isinstance(error, ScoreError) else INFEASIBLE
            trial["least_flops"] = error.least if isinstance(error, OverBudgetError) else None
        else:
            trial.update(self._numbers(measured))
        trial["pruner"] = pruner.to_dict()
        if not number:
            trial["params"] = self._resolved(pruner, trial.get("tokens", 1.0))
        trial["seconds"] = round(time.perf_counter() - started, 3)
        if trial["state"] == FAILED:
            self.steps.say(f"trial {number} failed: {trial['reason']} ({_show(params)})", "yellow")
        self.search.add(trial)
        if self.search.data["best"] == number:
            self.search.save_best()

    def _numbers(self, measured: Measured) -> Trial:
        if measured.kept >= measured.tokens:
            raise InputError(
                f"keep: at {self.budget} every one of {measured.tokens:.4g} vision tokens is kept, so there is "
                "nothing to tune"
            )
        lost = [i for i, cosine in enumerate(measured.cosines) if not math.isfinite(cosine)]
        names = ", ".join(self.meters["search"].samples[i].name for i in lost[:3])
        return {
            "state": FAILED if lost else MEASURED,
            "objective": None if lost else measured.objective,
            "reason": f"the pruned state is not a number on {len(lost)} samples ({names})" if lost else None,
            "kept": measured.kept,
            "tokens": measured.tokens,
            "flops_share": measured.flops_share,
        }

    def _resolved(self, pruner: Pruner, tokens: float) -> Params:
        """The defaults as a point of the search space, {} where they are none (a default that is no number)."""
        space = searched(pruner, self.budget.options, tokens)
        try:
            resolved = pruner.bind(adapter_for(self.model).facts())
        except VTPruneError:
            return {}
        known = {name: (getattr(pruner, name), one.start, getattr(resolved, name)) for name, one in space.items()}
        params = {name: next((value for value in values if value is not None), None) for name, values in known.items()}
        return params if all(holds(space[name], params[name]) for name in space) else {}

    def _nothing_found(self) -> InputError:
        trials = self.search.trials
        least = [trial["least_flops"] for trial in trials if trial.get("least_flops") is not None]
        if least:
            return InputError(
                f"flops: no setting of {self.budget.method} meets {self.budget}; the least that was reached, with one "
                f"vision token per image, is {100 * min(least):.1f}%"
            )
        reasons = list(dict.fromkeys(trial["reason"] for trial in trials))
        more = f" (and {len(reasons) - 1} other reasons, in {self.search.path})" if len(reasons) > 1 else ""
        tried = "the only trial" if len(trials) == 1 else f"none of the {len(trials)} trials"
        has = "has no objective" if len(trials) == 1 else "has an objective"
        return InputError(f"{tried} of {self.budget.method} {has}: {reasons[0]}{more}")

    def check(self) -> None:
        """Measures the defaults and the best setting on the held-out samples, unless that was done before."""
        best, first = self.search.best, self.search.trials[0]
        assert best is not None
        known = self.search.data["check"]
        if "check" not in self.meters or (known is not None and known["trial"] == best["number"]):
            return
        found = self._held_out(best)
        defaults = found if best is first else self._held_out(first) if first["state"] == MEASURED else None
        check: dict[str, Any] = {"trial": best["number"], "samples": len(self.meters["check"].samples)}
        for name, measured in (("defaults", defaults), ("found", found)):
            check[name] = None if measured is None else _summary(measured)
        if defaults is not None and found is not None:
            gains = [one - other for one, other in zip(found.cosines, defaults.cosines, strict=True)]
            check["gain"] = statistics.fmean(gains)
            error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else None
            check["gain_stderr"] = error
        self.search.data["check"] = check
        self.search.save()

    def _held_out(self, trial: Trial) -> Measured | None:
        """A trial's setting on the held-out samples; None, and a line that says why, where it cannot be met."""
        pruner = from_dict(trial["pruner"])
        assert isinstance(pruner, Pruner)
        try:
            return self.meters["check"].measure(pruner, self.states["check"])
        except VTPruneError as error:
            self.steps.say(f"trial {trial['number']} on the held-out samples: {first_line(error)}", "yellow")
            return None


def _summary(measured: Measured) -> dict[str, Any]:
    finite = math.isfinite(measured.objective)
    return {
        "objective": measured.objective if finite else None,
        "cosines": [cosine if math.isfinite(cosine) else None for cosine in measured.cosines],
        "kept": measured.kept,
        "tokens": measured.tokens,
        "flops_share": measured.flops_share,
    }


def _show(params: Params) -> str:
    return ", ".join(f"{name}={value}" for name, value in params.items()) or "the defaults"


def _written(tunable: Tunable) -> dict[str, Any]:
    """A tunable as the file of a search has it: what may be tried, not where it starts."""
    return {name: value for name, value in vars(tunable).items() if name != "start"}
