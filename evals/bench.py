"""`vtprune bench`: accuracy and cost of methods side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vtprune.assets import TINY_LLAVA

from .failures import InputError
from .loading import is_local
from .results import (
    Results,
    check_writable,
    code_fingerprint,
    machine,
    model_fingerprint,
    versions,
    write_atomically,
)
from .settings import Setting, build_settings
from .suite import BUNDLED_TASK, data_fingerprint, open_suite, prepare_environment
from .untrained import quiet_untrained

# Enough for a standard error of at most 2.3 points, whatever the accuracy.
DEFAULT_LIMIT = 500
CPU_BATCH = 16


@dataclass(frozen=True)
class BenchConfig:
    """What to run. limit None: every question; batch_size None: 16 in float32 on a CPU, else 1.

    lenient: a method that this model cannot take is left out and named, instead of ending the run.
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
    include_path: Path | None = None
    seed: int = 0
    resume: bool = True
    lenient: bool = False


def run_bench(config: BenchConfig, console: Console) -> dict[str, Any]:
    """Runs the sweep, prints its tables, and returns the content of results.json.

    Raises VTPruneError for a request that cannot be carried out, before anything is computed, and RunError
    for what goes wrong later.
    """
    settings = build_settings(config.methods, config.keeps)
    if config.limit is not None and config.limit < 1:
        raise InputError(f"limit: at least one question, got {config.limit}")
    check_writable(config.output)
    pretrained = str(TINY_LLAVA) if config.model is None else config.model
    prepare_environment(offline=set(config.tasks) == {BUNDLED_TASK} and is_local(pretrained))
    _require_lmms_eval()
    from .suite import silence_loggers

    silence_loggers()
    results = Results(config.output, _identity(config, pretrained), resume=config.resume)
    if results.moved is not None:
        console.print(f"results of other code are now in {results.moved}; starting afresh", highlight=False)
    with open_suite(config.tasks, config.limit, config.seed, config.include_path) as suite, quiet_untrained():
        _run(config, pretrained, suite, results, settings, console)
    _write_outputs(config, results, console)
    return results.data


def _require_lmms_eval() -> None:
    try:
        import lmms_eval  # noqa: F401
    except ImportError as error:
        raise InputError(f"lmms-eval cannot be imported ({error}); pip install 'vtprune[eval]'") from error


def _identity(config: BenchConfig, pretrained: str) -> dict[str, Any]:
    """What a number depends on beside its setting; a resumed run must agree in all of it."""
    return {
        "model": "bundled tiny-llava" if config.model is None else config.model,
        "model_files": model_fingerprint(pretrained),
        "tasks": list(config.tasks),
        "data": data_fingerprint(config.tasks),
        "limit": config.limit,
        "seed": config.seed,
        "dtype": config.dtype,
        "device": config.device,
        "attn_implementation": config.attn_implementation,
        "batch_size": config.batch_size,
        "max_new_tokens": config.max_new_tokens,
        "code": code_fingerprint(),
    }


def _run(
    config: BenchConfig,
    pretrained: str,
    suite: Any,
    results: Results,
    settings: Sequence[Setting],
    console: Console,
) -> None:
    from .lmms_model import VTPrune
    from .loading import load_model
    from .sweep import Sweep, check_settings

    model, processor = load_model(
        pretrained, device=config.device, dtype=config.dtype, attn_implementation=config.attn_implementation
    )
    settings, left_out = check_settings(model, settings, lenient=config.lenient)
    untold = {setting.label: setting.untrained for setting in settings if setting.untrained}
    results.data.update(versions=versions(), machine=machine(model), left_out=left_out, untrained=untold)
    for text in untold.values():
        console.print(text, highlight=False, soft_wrap=True)
    batch = config.batch_size or default_batch(model)
    lm = VTPrune(model=model, processor=processor, batch_size=batch, max_new_tokens=config.max_new_tokens)
    sweep = Sweep(lm, suite, results, config.seed)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    missing = [setting for setting in settings if setting.key() not in results.settings]
    if len(missing) < len(settings):
        console.print(f"{len(settings) - len(missing)} of {len(settings)} settings are in {results.path} already")
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("settings", total=len(settings), completed=len(settings) - len(missing))
        answers = progress.add_task("answers", total=None)
        lm.on_answers = lambda count: progress.advance(answers, count)
        for setting in missing:
            progress.update(bar, description=f"{setting.label} {setting.keep or ''}".strip())
            progress.reset(answers, total=_questions(results, config))
            sweep.run(setting)
            progress.advance(bar)
    # Written even if nothing was missing, so that the file tells of this run's versions and machine.
    results.save()


def default_batch(model: Any) -> int:
    """Rows together where answers do not depend on what else is in the batch (float32 on a CPU), else one."""
    return CPU_BATCH if model.device.type == "cpu" and str(model.dtype) == "torch.float32" else 1


def _questions(results: Results, config: BenchConfig) -> int | None:
    return len(results.data["questions"]) or config.limit


def _write_outputs(config: BenchConfig, results: Results, console: Console) -> None:
    from .plots import pareto_png
    from .tables import cost_columns, markdown, notes, quality_columns, rich_table

    records = list(results.settings.values())
    console.print(rich_table("Accuracy", quality_columns(records), records))
    console.print(rich_table("Cost", cost_columns(), records))
    for line in notes(results.data):
        console.print(line, style="dim", highlight=False)
    title = f"{results.config['model']}: {', '.join(config.tasks)}, {len(results.data['questions'])} questions"
    write_atomically(config.output / "table.md", markdown(results.data, records).encode())
    write_atomically(config.output / "pareto.png", pareto_png(records, title))
    names = ("results.json", "table.md", "pareto.png")
    console.print("wrote " + ", ".join(str(config.output / name) for name in names), highlight=False)
