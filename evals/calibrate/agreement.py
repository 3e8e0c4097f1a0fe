"""`vtprune calibrate`: how few vision tokens a model needs to answer as it does with all of them, with a proof."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

import vtprune
from vtprune.adapters import adapter_for, core_model
from vtprune.assets import folder_of, title_of
from vtprune.console.output import notice
from vtprune.console.progress import Steps
from vtprune.errors import InputError, RunError, VTPruneError, first_line
from vtprune.evals.calibrate.answers import LOSSES, Answers, Heard, table_of
from vtprune.evals.calibrate.asked import Asked, Source, Split
from vtprune.evals.calibrate.outputs import tell_candidates, tell_promise, write_plot
from vtprune.files import held, write_text
from vtprune.hooks.base_sample import sample_base
from vtprune.hooks.levels import unfit
from vtprune.hooks.weights import SUBMODULE
from vtprune.loading.environment import prepare_environment
from vtprune.loading.model import default_batch, is_local, load_model
from vtprune.method.config import save_config
from vtprune.method.pruner import Pruner, checked_keep
from vtprune.method.resolving import resolve
from vtprune.method.stages import encoder_layers
from vtprune.method.texts import show
from vtprune.provenance import code_fingerprint
from vtprune.pruners import Auto
from vtprune.pruners.auto.calibration import (
    CALIBRATION_NAME,
    FORMAT,
    VERSION,
    CalibrationFile,
    to_file,
)
from vtprune.pruners.auto.ladder import Table, best_ladder
from vtprune.pruners.auto.promise import Settled
from vtprune.pruners.auto.risk import check_level

# What is tried where nothing is named: a method of each kind that did best on the bundled questions, and a dull one.
METHODS = ("grid", "divprune", "visionzip", "turbo", "flowcut")
KEEPS: tuple[int | float, ...] = (0.05, 0.11, 0.25, 0.5, 0.75)


@dataclass(frozen=True)
class AgreementConfig:
    """What is promised, what is tried, and on which questions."""

    output: Path
    source: Source
    agreement: float = 0.98
    confidence: float | None = None
    adaptive: bool = True
    loss: str = "answer"
    methods: tuple[str, ...] = METHODS
    keeps: tuple[int | float, ...] = KEEPS
    tuning: int = 200
    samples: int = 500
    seed: int = 0
    model: str | None = None
    device: str | None = None
    dtype: str = "auto"
    attn_implementation: str | None = None
    batch_size: int | None = None

    def auto(self) -> Auto:
        """What is calibrated; raises VTPruneError for a promise that cannot be made."""
        return Auto(agreement=self.agreement, confidence=self.confidence, adaptive=self.adaptive)


@dataclass(frozen=True)
class Candidate:
    """A method at every keep, and what its best setting would cost on the samples that settings are chosen on."""

    pruner: Pruner
    keeps: tuple[int | float, ...]
    table: Table
    shared: bool
    cost: float


def run_agreement(config: AgreementConfig, console: Console) -> Settled:
    """Asks, chooses, proves, and writes the folder that `vtprune.wrap` takes.

    Raises VTPruneError for a request that cannot be carried out, before a model is loaded where that can be seen.
    """
    auto = config.auto()
    pruners = _pruners(config)
    if config.loss not in LOSSES:
        raise InputError(f"loss: {' or '.join(LOSSES)}, got {config.loss}")

    def tell(text: str) -> None:
        notice(console, text)

    split = config.source.split(config.tuning, config.samples, config.seed, tell)
    _check_split(split, config)
    with held(config.output):
        model, processor, answers = opened(config, config.output)
        run = _Run(config, model, answers, split, console=console)
        chosen = run.choose(pruners)
        data = run.calibrate(chosen, processor)
        write_text(config.output / CALIBRATION_NAME, json.dumps(data) + "\n")
        settled = auto.settled(data)
        auto = replace(auto, promise=settled.promise.to_dict())
        save_config(auto, config.output)
        write_plot(config.output, settled, data)
    tell_promise(settled, show(replace(chosen.pruner, keep=None)), console)
    notice(console, f"wrote {config.output}")
    console.print(f'vtprune.wrap(model, "{_as_text(config.output)}")', style="dim", highlight=False)
    return settled


class Where(Protocol):
    """Which model answers, and how it is loaded."""

    @property
    def model(self) -> str | None:
        """As `--model` takes it."""

    @property
    def device(self) -> str | None:
        """A torch device, None: the best there is."""

    @property
    def dtype(self) -> str:
        """The name of a torch dtype, or auto."""

    @property
    def attn_implementation(self) -> str | None:
        """As transformers takes it."""

    @property
    def batch_size(self) -> int | None:
        """Rows that are answered together, None: as many as change nothing."""


def opened(where: Where, folder: Path) -> tuple[Any, Any, Answers]:
    """The model, its processor, and the answers that a folder has of it."""
    prepare_environment(offline=is_local(folder_of(where.model)))
    model, processor = load_model(
        where.model, device=where.device, dtype=where.dtype, attn_implementation=where.attn_implementation
    )
    batch = where.batch_size or default_batch(model)
    return model, processor, Answers(model, processor, folder, identity=identity_of(model, processor), batch=batch)


def identity_of(model: Any, processor: Any) -> list[Any]:
    """What an answer depends on beside the setting and the question."""
    core = core_model(model)
    return [sample_base(core, SUBMODULE).metadata(), dtype_of(core), processor_of(processor), code_fingerprint()]


def dtype_of(core: Any) -> str:
    """The name of the weights' dtype."""
    return str(next(iter(core.parameters())).dtype).removeprefix("torch.")


def processor_of(processor: Any) -> str:
    """Identifies a processor by its settings and its chat template."""
    text = json.dumps([processor.to_dict(), processor.chat_template], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _as_text(folder: Path) -> str:
    return str(folder) if folder.is_absolute() or len(folder.parts) > 1 else f"./{folder}"


def _pruners(config: AgreementConfig) -> list[Pruner]:
    """The methods to try, at the largest level; raises InputError for one that cannot be calibrated."""
    keeps = sorted(config.keeps, key=lambda keep: (isinstance(keep, int), keep))
    if len({type(keep) for keep in keeps}) > 1:
        raise InputError("keeps: give counts of tokens or fractions, not both: levels have to rise for every image")
    for keep in keeps:
        checked_keep(keep, "keeps")
        if keep == 1.0 and isinstance(keep, float):
            raise InputError("keeps: 1.0 is the whole model, which is always the last level; leave it out")
    if not keeps or not config.methods:
        raise InputError("methods and keeps: give at least one of each")
    found = []
    for text in config.methods:
        try:
            (pruner,) = resolve(text)
        except ValueError as error:
            raise InputError(f"methods: {text}: {first_line(error)}") from error
        if pruner.keep is not None:
            raise InputError(f"methods: {text} says its keep, and levels are what is tried; leave it out (--keeps)")
        reason = unfit(pruner)
        if reason:
            raise InputError(f"methods: {pruner.name} {reason}; name others")
        found.append(replace(pruner, keep=keeps[-1]))
    return found


def _check_split(split: Split, config: AgreementConfig) -> None:
    level, delta = 1 - config.agreement, None if config.confidence is None else 1 - config.confidence
    if not split.tuning:
        raise InputError("samples: none are left to choose a method on; give more")
    for task in sorted({one.task for one in split.calibration}) or [""]:
        pictures = len({one.picture for one in split.calibration if one.task == task})
        check_level(level, delta, pictures, f" of {task}" if task else "")


class _Run:
    """One calibration: answers are asked for level by level."""

    def __init__(
        self, config: AgreementConfig, model: Any, answers: Answers, split: Split, *, console: Console
    ) -> None:
        self.config, self.model, self.answers, self.split, self.console = config, model, answers, split, console
        self.keeps = sorted(config.keeps)

    def choose(self, pruners: Sequence[Pruner]) -> Candidate:
        """The method whose best setting is the cheapest on the samples for that."""
        level, asked = 1 - self.config.agreement, self.split.tuning
        found, refused = [], {}
        with Steps(self.console, "settings", len(pruners) * len(self.keeps) + 1, parts="answers") as steps:
            whole = self._ask(steps, None, asked)
            for pruner in pruners:
                reason = self._refused(pruner)
                if reason:
                    if self.config.methods != METHODS:
                        raise InputError(f"methods: {reason}")
                    refused[pruner.name] = reason
                    steps.total -= len(self.keeps)
                    continue
                found.append(self._candidate(steps, pruner, whole, level))
        if not found:
            raise InputError(f"methods: this model takes none of them ({'; '.join(refused.values())})")
        tell_candidates(found, self.console)
        return min(found, key=lambda one: one.cost)

    def _refused(self, pruner: Pruner) -> str:
        try:
            with vtprune.wrapped(self.model, pruner):
                return ""
        except VTPruneError as error:
            return f"{pruner.name}: {first_line(error)}"

    def _candidate(self, steps: Steps, pruner: Pruner, whole: Sequence[Heard], level: float) -> Candidate:
        levels = [self._ask(steps, replace(pruner, keep=keep), self.split.tuning, whole) for keep in self.keeps]
        table = table_of(self.split.tuning, levels, whole, self.config.loss)
        shared = not encoder_layers(pruner.bind(adapter_for(self.model).facts()))
        _, cost = best_ladder(table, level, shared=shared)
        return Candidate(pruner, tuple(self.keeps), table, shared=shared, cost=cost)

    def calibrate(self, chosen: Candidate, processor: Any) -> CalibrationFile:
        """The chosen method at every level on the other samples, and all that is known of it."""
        asked = self.split.calibration
        with Steps(self.console, "settings", len(self.keeps) + 1, parts="answers") as steps:
            whole = self._ask(steps, None, asked)
            levels = [self._ask(steps, replace(chosen.pruner, keep=keep), asked, whole) for keep in self.keeps]
        table = table_of(asked, levels, whole, self.config.loss)
        method = chosen.pruner.to_dict()
        del method["keep"]
        core = core_model(self.model)
        return CalibrationFile(
            format=FORMAT,
            version=VERSION,
            model=title_of(self.config.model),
            base=sample_base(core, SUBMODULE).metadata(),
            dtype=dtype_of(core),
            processor=processor_of(processor),
            generation=_generation(asked),
            loss=self.config.loss,
            source=self.split.source,
            seed=self.config.seed,
            method=method,
            keeps=list(self.keeps),
            shared=chosen.shared,
            tuning=to_file(chosen.table),
            calibration=to_file(table),
        )

    def _ask(
        self, steps: Steps, pruner: Pruner | None, asked: Sequence[Asked], whole: Sequence[Heard] | None = None
    ) -> list[Heard]:
        name = "the whole model" if pruner is None else f"{pruner.name} at {pruner.keep:g}"
        steps.begin(name, len(asked))
        forced = whole if self.config.loss == "tokens" else None
        found = self.answers.of(pruner, asked, lambda count: steps.part(count), forced=forced)
        if whole is not None:
            pairs = list(zip(found, whole, strict=True))
            if not any(one["kv"] < other["kv"] or one["flops"] < other["flops"] for one, other in pairs):
                raise RunError(
                    f"{name} cuts none of these pictures: it ignores its budget, or that is above their tokens"
                )
        steps.end(name)
        return found


def _generation(asked: Sequence[Asked]) -> dict[str, Any]:
    """How the questions were answered: where their tasks differ, up to the longest."""
    arguments = [one.generation.arguments for one in asked]
    found: dict[str, Any] = dict(arguments[0])
    for one in arguments:
        found = {name: value for name, value in found.items() if one.get(name) == value}
    found["max_new_tokens"] = max(one["max_new_tokens"] for one in arguments)
    found["until"] = sorted({stop for one in asked for stop in one.generation.stops})
    return found
