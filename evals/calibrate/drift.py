"""`vtprune calibrate --check`: whether what was promised holds on other samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from vtprune.console.output import notice
from vtprune.console.progress import Steps
from vtprune.errors import InputError
from vtprune.evals.calibrate.agreement import opened
from vtprune.evals.calibrate.answers import Heard, table_of
from vtprune.evals.calibrate.asked import Source
from vtprune.files import held
from vtprune.method.config import load_config
from vtprune.method.pruner import Pruner
from vtprune.method.registry import create_checked
from vtprune.pruners import Auto
from vtprune.pruners.auto.calibration import CalibrationFile, read_calibration
from vtprune.pruners.auto.ladder import Outcome, Table, fixed
from vtprune.pruners.auto.risk import mean_by, p_value

# Drawn samples are those of a seed, which is none that a calibration is likely to have had.
APART = 1_000_003
# How unlikely the disagreement has to be under the promise before it counts as broken.
DOUBT = 0.05


@dataclass(frozen=True)
class CheckConfig:
    """The folder of a calibration, and the samples that it is checked on."""

    folder: Path
    source: Source
    samples: int
    seed: int
    model: str | None = None
    device: str | None = None
    dtype: str = "auto"
    attn_implementation: str | None = None
    batch_size: int | None = None


def run_check(config: CheckConfig, console: Console) -> bool:
    """Whether the answers differ no more often than was promised, as far as so many samples can tell.

    Raises VTPruneError for a folder without a calibration, and for a model or options that it is not of.
    """
    found = load_config(config.folder)
    if not isinstance(found, Auto):
        raise InputError(f"check: {config.folder} holds no calibration of auto; give the folder of an earlier one")
    data = read_calibration(config.folder)
    auto = found.at(config.folder)
    seed = config.seed + (APART if config.source.data is None else 0)
    asked = config.source.split(config.samples, 0, seed, lambda text: notice(console, text)).tuning
    with held(config.folder):
        _, _, answers = opened(config, config.folder)
        tokens = data["loss"] == "tokens"
        # Tokens are compared by forcing them on each level; what auto would have done follows from that.
        tried = [_level(data, keep) for keep in data["keeps"]] if tokens else [auto]
        with Steps(console, "settings", 1 + len(tried), parts="answers") as steps:

            def ask(pruner: Pruner | None, forced: Sequence[Heard] | None = None) -> list[Heard]:
                name = "the whole model" if pruner is None else pruner.name
                steps.begin(name, len(asked))
                found = answers.of(pruner, asked, lambda count: steps.part(count), forced=forced)
                steps.end(name)
                return found

            whole = ask(None)
            own = [ask(pruner, whole if tokens else None) for pruner in tried]
    table = table_of(asked, own, whole, data["loss"])
    outcome = auto.settled(data).on(table, data["keeps"], shared=data["shared"]) if tokens else fixed(table)
    return _tell(Outcome(*(values[:, :1] for values in vars(outcome).values())), table, auto, console)


def _level(data: CalibrationFile, keep: int | float) -> Pruner:
    method = dict(data["method"])
    return create_checked(method.pop("method"), {**method, "keep": keep})


def _tell(found: Outcome, table: Table, auto: Auto, console: Console) -> bool:
    """Says what was seen, and what follows."""
    losses = mean_by(table.pictures, found.losses)[:, 0]
    level = 1 - auto.agreement
    chance = p_value(1 - losses, auto.agreement)
    flops, kv = found.flops.sum() / table.flops[:, -1].sum(), found.kv.sum() / table.kv[:, -1].sum()
    console.print(
        f"{losses.mean():.2%} of the answers about {len(losses)} pictures differ, {level:.2%} were promised at most; "
        f"FLOPs {flops:.1%}, KV cache {kv:.1%} of the whole model's",
        highlight=False,
        soft_wrap=True,
    )
    holds = losses.mean() <= level or chance >= DOUBT
    if losses.mean() <= level:
        text = "within the promise"
    elif holds:
        text = f"above the promise by chance, as it seems (p = {chance:.2f}); more samples could tell"
    else:
        text = f"the promise does not hold on these samples (p = {chance:.2g}): calibrate on samples like them"
    console.print(text, highlight=False, style=None if holds else "bold")
    return bool(holds)
