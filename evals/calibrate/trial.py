"""Whether promises are kept: `python -m vtprune.evals.calibrate.trial` calibrates on drawn questions, and looks.

Every setting is chosen and proved on its own samples, several times over, and then judged on fresh ones. How often a
promise with a confidence is broken is told by calibrations that are drawn, with replacement, from all stored answers:
these together are then the truth that it speaks of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table as Shown

from vtprune.adapters import adapter_for
from vtprune.assets import folder_of, title_of
from vtprune.console.output import notice, one_line_errors, open_console
from vtprune.console.progress import Steps
from vtprune.evals.calibrate.agreement import KEEPS, METHODS, identity_of
from vtprune.evals.calibrate.answers import Answers, Heard, table_of
from vtprune.evals.calibrate.asked import Asked, Source
from vtprune.files import held, write_json
from vtprune.loading.environment import prepare_environment
from vtprune.loading.model import default_batch, is_local, load_model
from vtprune.method.pruner import Pruner
from vtprune.method.registry import create
from vtprune.method.stages import encoder_layers
from vtprune.pruners.auto.ladder import Ladder, Table, best_ladder, cost_at, fixed
from vtprune.pruners.auto.promise import Settled, prove

RESULTS = "trial.json"
AGREEMENTS, CONFIDENCE = (0.95, 0.98, 0.99), 0.95
TUNING, MOST = 200, 16
# One more than `vtprune calibrate` tries: few images can spare tokens at a keep for all that is to be this safe.
TRIED = (*KEEPS, 0.9)
# The drawn questions that settings are chosen on have seeds of their own; all others are of one.
POOL = 424_243


@dataclass(frozen=True)
class Rule:
    """How a setting is proved, and whether it grows."""

    name: str
    confidence: float | None
    adaptive: bool


RULES = (
    Rule("auto, in expectation", None, True),
    Rule("one keep, in expectation", None, False),
    Rule(f"auto, {CONFIDENCE:.0%} sure", CONFIDENCE, True),
    Rule(f"one keep, {CONFIDENCE:.0%} sure", CONFIDENCE, False),
)


@dataclass(frozen=True)
class TrialConfig:
    """How much is tried: calibrations of each of some sizes, fresh samples, calibrations drawn from all answers, and
    methods with what they keep, rising."""

    model: str | None
    seeds: int
    sizes: tuple[int, ...]
    fresh: int
    draws: int
    methods: tuple[str, ...]
    keeps: tuple[float, ...]


class Bank:
    """The answers of one model to drawn questions, asked for when somebody looks."""

    def __init__(self, model: Any, answers: Answers, config: TrialConfig, *, console: Console) -> None:
        self.answers, self.keeps, self.console = answers, config.keeps, console
        self.pruners = {name: create(name, keep=self.keeps[-1]) for name in config.methods}
        facts = adapter_for(model).facts()
        self.shared = {name: not encoder_layers(one.bind(facts)) for name, one in self.pruners.items()}
        self._tables: dict[tuple[str, str], Table] = {}
        self._ladders: dict[tuple[str, int, float], Ladder] = {}

    def table(self, what: str, name: str, asked: Sequence[Asked]) -> Table:
        """What a method's levels did with questions; what: which ones these are."""
        key = what, name
        if key not in self._tables:
            with Steps(self.console, "settings", len(self.keeps) + 1, parts="answers") as steps:
                whole = self._ask(steps, f"{what}: the whole model", None, asked)
                levels = [
                    self._ask(steps, f"{what}: {name} at {keep:g}", create(name, keep=keep), asked)
                    for keep in self.keeps
                ]
            self._tables[key] = table_of(asked, levels, whole, "answer")
        return self._tables[key]

    def ladder(self, name: str, tuning: Table, level: float) -> Ladder:
        """The levels that are chosen on these samples."""
        key = name, id(tuning), level
        if key not in self._ladders:
            self._ladders[key] = best_ladder(tuning, level, shared=self.shared[name])[0]
        return self._ladders[key]

    def _ask(self, steps: Steps, name: str, pruner: Pruner | None, asked: Sequence[Asked]) -> list[Heard]:
        steps.begin(name, len(asked))
        found = self.answers.of(pruner, asked, lambda count: steps.part(count))
        steps.end(name)
        return found


def _cheapest(bank: Bank, tables: dict[str, Table], level: float, *, adaptive: bool) -> str:
    """The method whose best setting costs least on the samples for that."""

    def cost(name: str) -> float:
        if adaptive:
            return best_ladder(tables[name], level, shared=bank.shared[name])[1]
        return cost_at(fixed(tables[name]), tables[name].pictures, level)

    return min(tables, key=cost)


def run_trial(output: Path, console: Console, config: TrialConfig) -> dict[str, Any]:
    """Runs everything, prints the tables, and returns the content of trial.json."""
    model_name, seeds, methods = config.model, config.seeds, config.methods
    source = Source(model=model_name, max_new_tokens=MOST)
    size = max(config.sizes)
    tuning = [source.split(TUNING, 0, seed, lambda text: None).tuning for seed in range(seeds)]
    pool = source.split(0, seeds * size + config.fresh, POOL, lambda text: None).calibration
    with held(output):
        prepare_environment(offline=is_local(folder_of(model_name)))
        model, processor = load_model(model_name)
        answers = Answers(model, processor, output, identity=identity_of(model, processor), batch=default_batch(model))
        bank = Bank(model, answers, config, console=console)
        searched = [
            {name: bank.table(f"seed {seed}", name, asked) for name in methods} for seed, asked in enumerate(tuning)
        ]
        rows = []
        for agreement in AGREEMENTS:
            for count in config.sizes:
                for rule in RULES:
                    rows.append(_row(bank, searched, pool, agreement=agreement, count=count, rule=rule, config=config))
    data = {"model": title_of(model_name), "methods": list(methods), "keeps": list(config.keeps), "rows": rows}
    write_json(output / RESULTS, data)
    _tell(data, console)
    notice(console, f"wrote {output / RESULTS}")
    return data


def _row(
    bank: Bank,
    searched: Sequence[dict[str, Table]],
    pool: Sequence[Asked],
    *,
    agreement: float,
    count: int,
    rule: Rule,
    config: TrialConfig,
) -> dict[str, Any]:
    """One promise: each seed's setting on the fresh samples, and drawn calibrations with the first seed's method."""
    level, size = 1 - agreement, max(config.sizes)
    fresh = np.arange(len(searched) * size, len(pool))
    seen = []
    for seed, tables in enumerate(searched):
        name = _cheapest(bank, tables, level, adaptive=rule.adaptive)
        whole = bank.table("pool", name, pool)
        own = whole.where(np.arange(seed * size, seed * size + count))
        settled = _settled(bank, name, tables[name], own, agreement=agreement, rule=rule)
        seen.append({"method": name, **_judged(bank, name, settled, whole.where(fresh))})
    name = str(seen[0]["method"])
    whole, rng = bank.table("pool", name, pool), np.random.default_rng(0)
    risks = []
    for _ in range(config.draws):
        # Each draw counts for itself, that of a sample which came before as well.
        own = replace(whole.where(rng.integers(len(pool), size=count)), pictures=np.arange(count))
        settled = _settled(bank, name, searched[0][name], own, agreement=agreement, rule=rule)
        risks.append(_judged(bank, name, settled, whole)["risk"])
    return {
        "agreement": agreement,
        "samples": count,
        "rule": rule.name,
        "seeds": seen,
        "draws": {
            "count": config.draws,
            "mean_risk": float(np.mean(risks)),
            "broken": float(np.mean(np.array(risks) > level)),
        },
    }


def _settled(bank: Bank, name: str, tuning: Table, own: Table, *, agreement: float, rule: Rule) -> Settled:
    ladder = bank.ladder(name, tuning, 1 - agreement) if rule.adaptive else None
    return prove(own, bank.keeps, ladder, shared=bank.shared[name], agreement=agreement, confidence=rule.confidence)


def _judged(bank: Bank, name: str, settled: Settled, table: Table) -> dict[str, Any]:
    found = settled.on(table, bank.keeps, shared=bank.shared[name])
    return {
        "levels": list(settled.levels),
        "bound": settled.promise.bound,
        "risk": float(found.losses.mean()),
        "flops": float(found.flops.sum() / table.flops[:, -1].sum()),
        "kv": float(found.kv.sum() / table.kv[:, -1].sum()),
    }


def _tell(data: dict[str, Any], console: Console) -> None:
    table = Shown(title=f"Answers that differ, % ({data['model']}, means over seeds)", title_justify="left")
    for heading in (
        "promised",
        "samples",
        "rule",
        "fresh: mean",
        "worst seed",
        "draws: mean",
        "broken",
        "FLOPs",
        "KV",
        "methods",
    ):
        table.add_column(heading, justify="left" if heading in ("rule", "methods") else "right")
    for row in data["rows"]:
        risks = [100 * one["risk"] for one in row["seeds"]]
        flops, kv = (100 * np.mean([one[name] for one in row["seeds"]]) for name in ("flops", "kv"))
        cells = (
            f"{100 * (1 - row['agreement']):.0f}", str(row["samples"]), row["rule"],
            f"{np.mean(risks):.2f}", f"{max(risks):.2f}",
            f"{100 * row['draws']['mean_risk']:.2f}", f"{100 * row['draws']['broken']:.1f}%",
            f"{flops:.1f}%", f"{kv:.1f}%", ", ".join(sorted({one["method"] for one in row["seeds"]})),
        )  # fmt: skip
        table.add_row(*cells)
    console.print(table)


def main(
    output: Annotated[Path, typer.Option(help="The folder for answers and trial.json.")] = Path("trial"),
    model: Annotated[str | None, typer.Option(help="tiny-llava or tiny-qwen.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Calibrations, each on samples of its own.")] = 5,
    sizes: Annotated[str, typer.Option(help="Samples of a calibration, separated by commas.")] = "500,1000",
    fresh: Annotated[int, typer.Option(min=1, help="Samples that all of them are judged on.")] = 2000,
    draws: Annotated[int, typer.Option(min=1, help="Calibrations drawn from all answers.")] = 200,
    methods: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(METHODS),
    keeps: Annotated[str, typer.Option(help="What they keep, separated by commas.")] = ",".join(map(str, TRIED)),
) -> None:
    """Calibrate a bundled model several times, and see how often its answers differ on fresh questions."""
    with one_line_errors(False):
        config = TrialConfig(
            model,
            seeds,
            tuple(map(int, sizes.split(","))),
            fresh=fresh,
            draws=draws,
            methods=tuple(methods.split(",")),
            keeps=tuple(sorted(map(float, keeps.split(",")))),
        )
        run_trial(output, open_console(), config)


if __name__ == "__main__":
    typer.run(main)
