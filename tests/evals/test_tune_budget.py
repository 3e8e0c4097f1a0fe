"""Budgets of a search, in tokens and in FLOPs: met by every setting, and refused where none can meet them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import vtprune
from tests.evals.tuning import (
    fails,
    numbers,
    private_environment,  # noqa: F401 (a fixture of every test here)
    read,
    tune,
)
from vtprune.evals.settings import parse_flops
from vtprune.evals.tune import search as tune_search
from vtprune.evals.tune.space import STARTUP
from vtprune.method.config import from_dict
from vtprune.pruners.vflowopt.budget import stage_layers


def test_a_flops_budget_gives_every_setting_the_most_tokens_that_fit(tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert tune(output, "--flops", "60%", "--trials", "3").exit_code == 0
    for trial in read(output)["trials"]:
        assert 0.59 < trial["flops_share"] <= 0.6
        assert trial["pruner"]["keep"] == pytest.approx(trial["kept"] / 144)


def test_a_flops_budget_that_no_setting_meets(tmp_path: Path) -> None:
    fails(tune(tmp_path, "--flops", "20%", "--trials", "3"), "no setting of holov meets 20% of the FLOPs", "49.", "%")
    assert not (tmp_path / "vtprune_config.json").exists()


def test_a_share_of_flops_is_read() -> None:
    assert (parse_flops("40%"), parse_flops(" 0.4 ")) == (0.4, 0.4)


@pytest.mark.parametrize("budget", [("--keep", "20%"), ("--keep", "30"), ("--flops", "65%")])
def test_staged_settings_meet_the_budgets_equation(tmp_path: Path, budget: tuple[str, str]) -> None:
    output = tmp_path / "out"
    result = tune(output, *budget, "--trials", "5", "--samples", "2", method="vflowopt")
    assert result.exit_code == 0, result.output
    trials = [trial for trial in read(output)["trials"] if trial["state"] == "measured"]
    assert trials[0]["params"].keys() == {"first", "second", "threshold", "cell", "alpha"}
    for trial in trials:
        pruner = from_dict(trial["pruner"])
        fitted = pruner.bind(vtprune.method.facts.ModelFacts(True, 5, 6, 1))
        entering, middle, last = fitted.schedule().counts(144)
        start, end = stage_layers(6)
        assert trial["kept"] == pytest.approx((start * entering + (end - start) * middle + (6 - end) * last) / 6)
        assert trial["kept"] <= fitted.budget(144)
        if budget[0] == "--keep":
            assert pruner.keep == (0.2 if "%" in budget[1] else 30)
        else:
            assert trial["flops_share"] <= 0.65
            assert fitted.budget(144) <= 1.6 * trial["kept"]


def test_an_interrupted_search_at_a_flops_budget_goes_on_as_it_would_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = ("--flops", "70%", "--trials", "5", "--samples", "2")
    assert tune(tmp_path / "whole", *budget).exit_code == 0
    original, count = tune_search.Tuner._try, [0]

    def stop(self: Any, *args: Any) -> None:
        count[0] += 1
        if count[0] == 4:
            raise KeyboardInterrupt
        original(self, *args)

    monkeypatch.setattr(tune_search.Tuner, "_try", stop)
    assert tune(tmp_path / "cut", *budget).exit_code == 130
    monkeypatch.setattr(tune_search.Tuner, "_try", original)
    assert tune(tmp_path / "cut", *budget).exit_code == 0
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")


def test_a_search_ends_early_where_every_setting_is_refused_alike(tmp_path: Path) -> None:
    result = tune(tmp_path / "out", "--flops", "1%", "--trials", "40")
    fails(result, "no setting of holov meets", "the least that was reached")
    assert len(read(tmp_path / "out")["trials"]) == STARTUP
