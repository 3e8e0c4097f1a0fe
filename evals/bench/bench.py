"""`vtprune bench`: accuracy and cost of methods side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from vtprune.assets import folder_of, title_of
from vtprune.console.output import notice
from vtprune.console.progress import Estimate, Steps
from vtprune.errors import InputError, RunError
from vtprune.evals.bench.cells import FOLDER as CELLS
from vtprune.evals.bench.grid import Listener, beside, rank, work_through
from vtprune.evals.bench.results import FILE, MERGING, PLOT, TABLE, Results, other_machine
from vtprune.evals.bench.suite import BUNDLED_TASK, BUNDLED_TASKS, data_fingerprint, open_suite
from vtprune.evals.bench.tables import main_scores, show_score
from vtprune.evals.settings import Setting, build_settings
from vtprune.evals.untrained import quiet_untrained
from vtprune.files import check_writable, held, write_bytes, write_text
from vtprune.loading.environment import prepare_environment
from vtprune.loading.model import is_local
from vtprune.loading.videos import FRAMES
from vtprune.method.texts import show_keep
from vtprune.provenance import code_fingerprint, machine, model_fingerprint, versions

# Enough for a standard error of at most 2.3 points, whatever the accuracy.
DEFAULT_LIMIT = 500
# What runs where neither methods nor everything are asked for: the baselines that show what dull pruning does, and one
# or two methods of each place to prune in (before the decoder, in the encoder, in the decoder, in the cache).
SHORT_METHODS = ("random", "grid", "divprune", "flowcut", "visionzip", "fastv", "pyramid_drop", "d2o", "auto")
SHORT_KEEPS: tuple[int | float, ...] = (0.25,)


@dataclass(frozen=True)
class BenchConfig:
    """What to run. limit None: every question; batch_size None: 16 in float32 on a CPU, else 1; frames: of each video
    (None: 16).

    lenient: a method that this model cannot take is left out and named, instead of ending the run; metrics: of tasks
    (task, metric), the ones that tables show; a task's first one where it is not named; data: a folder with
    TASK.parquet for tasks whose data sets cannot be reached; prompts: the model whose prompts tasks take, where they
    have them; device_map: as `load_model` takes it; worst: whether pictures that are hard to prune are measured, too.
    """

    methods: tuple[str, ...]
    keeps: tuple[int | float, ...]
    output: Path
    model: str | None = None
    tasks: tuple[str, ...] = (BUNDLED_TASK,)
    limit: int | None = DEFAULT_LIMIT
    device: str | None = None
    dtype: str = "auto"
    attn_implementation: str | None = None
    batch_size: int | None = None
    max_new_tokens: int = 128
    frames: int | None = None
    include_path: Path | None = None
    seed: int = 0
    resume: bool = True
    lenient: bool = False
    metrics: tuple[tuple[str, str], ...] = ()
    data: Path | None = None
    prompts: str | None = None
    device_map: str | None = None
    worst: bool = False

    @property
    def pretrained(self) -> str:
        """The id or folder that the model is loaded from."""
        return folder_of(self.model)


def run_bench(config: BenchConfig, console: Console) -> dict[str, Any]:
    """Runs the sweep, prints its tables, and returns the content of results.json.

    Of a launcher's processes the first one alone prints and writes tables. Raises VTPruneError for a request that
    cannot be carried out, before anything is computed, and RunError for what goes wrong later; for settings that could
    cut no image when all others are there and written.
    """
    if rank():
        console = Console(quiet=True)
    if beside() and not config.resume:
        raise InputError("no-resume: several processes share the results; begin afresh with another --output")
    settings = build_settings(config.methods, config.keeps)
    if config.limit is not None and config.limit < 1:
        raise InputError(f"limit: at least one question, got {config.limit}")
    check_writable(config.output)
    prepare_environment(offline=set(config.tasks) <= set(BUNDLED_TASKS) and is_local(config.pretrained))
    _require_lmms_eval()
    from vtprune.evals.bench.suite import silence_loggers

    silence_loggers()
    results = Results(config.output, _identity(config), resume=config.resume)
    if results.moved is not None:
        why = "results of other code" if config.resume else "the earlier results"
        notice(console, f"{why} are now in {results.moved}; starting afresh")
    opened = open_suite(
        config.tasks,
        config.limit,
        config.seed,
        config.include_path,
        data=config.data,
        prompts=config.prompts,
        metrics=dict(config.metrics),
    )
    with opened as suite, quiet_untrained():
        uncut = _run(config, suite, results, settings=settings, console=console)
    if rank() == 0:
        _write_outputs(config, results, console)
    if uncut and not config.lenient:
        raise RunError("; ".join(f"{name}: {reason}" for name, reason in uncut.items()))
    return results.data


def _require_lmms_eval() -> None:
    try:
        import lmms_eval  # noqa: F401
    except ImportError as error:
        raise InputError(f"lmms-eval cannot be imported ({error}); pip install 'vtprune[eval]'") from error


def _identity(config: BenchConfig) -> dict[str, Any]:
    """What a number depends on beside its setting; a resumed run must agree in all of it."""
    same = {
        "model": title_of(config.model),
        "model_files": model_fingerprint(config.pretrained),
        "tasks": list(config.tasks),
        "data": data_fingerprint(config.tasks, config.data),
        "limit": config.limit,
        "seed": config.seed,
        "dtype": config.dtype,
        "device": config.device,
        "attn_implementation": config.attn_implementation,
        "batch_size": config.batch_size,
        "max_new_tokens": config.max_new_tokens,
        "code": code_fingerprint(),
    }
    # What was not there in earlier versions is left out where it says nothing.
    later = {
        "frames": config.frames,
        "metrics": dict(config.metrics) or None,
        "prompts": config.prompts,
        "device_map": config.device_map,
        "worst": config.worst or None,
    }
    return {**same, **{name: value for name, value in later.items() if value is not None}}


def _run(
    config: BenchConfig, suite: Any, results: Results, *, settings: Sequence[Setting], console: Console
) -> dict[str, str]:
    """Runs what is missing; answers which settings could cut no image, and why."""
    from vtprune.evals.bench.sweep import NothingCut, Sweep, check_settings
    from vtprune.evals.lmms.model import VTPrune
    from vtprune.evals.lmms.simple_model import VTPruneSimple
    from vtprune.loading.model import default_batch, load_model

    model, processor = load_model(
        config.pretrained,
        device=config.device,
        dtype=config.dtype,
        attn_implementation=config.attn_implementation,
        device_map=config.device_map,
    )
    uncut: dict[str, str] = {}
    settings, left_out = check_settings(model, processor, settings, lenient=config.lenient)
    untold = {setting.label: setting.untrained for setting in settings if setting.untrained}
    here = {**machine(model), **beside()}
    _check_machine(results, here)
    results.data.update(versions=versions(), machine=here, left_out=left_out, untrained=untold)
    for text in untold.values():
        notice(console, text)
    batch = config.batch_size or default_batch(model)
    lm = (VTPruneSimple if suite.simple else VTPrune)(
        model=model,
        processor=processor,
        batch_size=batch,
        max_new_tokens=config.max_new_tokens,
        frames=FRAMES if config.frames is None else config.frames,
    )
    results.order = [setting.key() for setting in settings]
    recovered = results.recover(settings, here)
    if recovered:
        notice(
            console,
            f"{recovered} of {len(settings)} settings are in {results.folder / CELLS}, not yet in {results.path}",
        )
    missing = [setting for setting in settings if setting.key() not in results.settings]
    done = len(settings) - len(missing)
    if done:
        notice(console, f"{done} of {len(settings)} settings are in {results.path} already")
    with Steps(console, "settings", len(settings), done, parts="answers") as steps:
        steps.say(_announcement(config, missing))
        estimate = Estimate(len(missing), steps.say)
        sweep = Sweep(
            lm, suite, results, seed=config.seed, tell=steps.say, metrics=dict(config.metrics), worst=config.worst
        )

        def answered(count: int) -> None:
            steps.part(count, len(lm.requests))
            estimate.answered(count, len(lm.requests))

        lm.on_answers = answered

        def ended(setting: Setting, record: dict[str, Any] | None) -> None:
            steps.end(f"{_name(setting)}: {'made by another run' if record is None else _summary(record)}")

        def run(setting: Setting) -> dict[str, Any] | None:
            try:
                return sweep.run(setting)
            except NothingCut as error:
                uncut[_name(setting)] = str(error)
                steps.end(f"{_name(setting)}: left out: {error}")
                return None

        listener = Listener(lambda setting: steps.begin(_name(setting)), ended, steps.say)
        work_through(settings, results, run, listener)
    results.data["left_out"] = {**results.data["left_out"], **uncut}
    # Written even if nothing was missing, so that the file tells of this run's versions and machine.
    results.save()
    return uncut


def _check_machine(results: Results, here: dict[str, Any]) -> None:
    """Raises InputError where the results so far were computed in another precision, or on another kind of device."""
    odd = other_machine(results.data.get("machine", {}), here) if results.settings else []
    if odd:
        raise InputError(f"output: {results.path} is of another machine ({'; '.join(odd)}); give another --output")


def _announcement(config: BenchConfig, missing: Sequence[Setting]) -> str:
    """What is going to be run."""
    count = "every question" if config.limit is None else f"{config.limit} questions"
    model = "the bundled model" if config.model is None else title_of(config.model)
    return f"running {len(missing)} settings on {model}, each on {count} of {', '.join(config.tasks)}"


def _name(setting: Setting) -> str:
    return setting.label if setting.keep is None else f"{setting.label} at {show_keep(setting.keep)}"


def _summary(record: dict[str, Any]) -> str:
    scores = ", ".join(f"{score['metric']} {show_score(score)}" for score in main_scores(record))
    return f"{scores}, {record['tokens']['kept']:.1f} of {record['tokens']['before']:.1f} tokens"


def _write_outputs(config: BenchConfig, results: Results, console: Console) -> None:
    from vtprune.evals.bench.plots import pareto_png
    from vtprune.evals.bench.tables import (
        cost_columns,
        markdown,
        notes,
        quality_columns,
        rich_table,
    )

    records = list(results.settings.values())
    console.print(rich_table("Accuracy", quality_columns(records), records))
    console.print(rich_table("Cost", cost_columns(records), records))
    for line in notes(results.data):
        console.print(line, style="dim", highlight=False)
    title = f"{results.config['model']}: {', '.join(config.tasks)}, {len(results.data['questions'])} questions"
    picture = pareto_png(records, title)
    with held(config.output, MERGING):
        write_text(config.output / TABLE, markdown(results.data, records))
        write_bytes(config.output / PLOT, picture)
    notice(console, "wrote " + ", ".join(str(config.output / name) for name in (FILE, TABLE, PLOT)))
