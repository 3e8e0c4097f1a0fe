"""The `vtprune bench` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vtprune.cli.options import Attention, BatchSize, Device, Dtype, Model, Traceback
from vtprune.console.output import one_line_errors, open_console
from vtprune.errors import VTPruneError

PANEL = "What to run"
Tasks = Annotated[str, typer.Option(help="lmms-eval tasks, separated by commas.", rich_help_panel=PANEL)]
Methods = Annotated[
    str | None,
    typer.Option(
        help="Separated by commas; with options as fastv:keep=0.5,layers=(2,5): a comma goes on with a method's "
        "options where a name and = follow. Stages joined by + are one method (visionzip:keep=64+fastv). A folder "
        "with vtprune_config.json is one too, at its own keep; downscale is the same pictures with fewer pixels. See "
        "`vtprune list`.",
        show_default="a short list; --all for every one; what the model cannot take is left out and named",
        rich_help_panel=PANEL,
    ),
]
Keeps = Annotated[
    str | None,
    typer.Option(
        help="Separated by commas: counts of tokens (64), fractions (0.25) or percentages (11%); for methods that "
        "bring none of their own, and the last one of those joined by +.",
        show_default="0.25",
        rich_help_panel=PANEL,
    ),
]
Everything = Annotated[
    bool,
    typer.Option(
        "--all",
        help="Instead of the short list, every method at 0.5, 0.25, 0.11 and 0.05 on every question, and those that "
        "merge also with their merging off, at 0.11.",
        rich_help_panel=PANEL,
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(
        help="Questions per task: a stratified sample of the bundled task, the first ones of others; 0 for all.",
        show_default="500 of the bundled task, all of others",
        rich_help_panel=PANEL,
    ),
]
IncludePath = Annotated[
    Path | None, typer.Option(help="A folder with lmms-eval task files of your own.", rich_help_panel=PANEL)
]
Seed = Annotated[int, typer.Option(help="Of the sample of questions.", rich_help_panel=PANEL)]
Resume = Annotated[bool, typer.Option(help="Go on with the results in the output folder, or start afresh.")]


def bench(
    model: Model = None,
    tasks: Tasks = "vtprune_shapes",
    methods: Methods = None,
    keep: Keeps = None,
    everything: Everything = False,
    limit: Limit = None,
    include_path: IncludePath = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    attn_implementation: Attention = None,
    batch_size: BatchSize = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Where a task sets none.")] = 128,
    frames: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Of each video, evenly spread over it, where a task shows videos and the model takes them.",
            show_default="16",
            rich_help_panel=PANEL,
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for results.json, table.md and pareto.png.")] = Path("bench"),
    resume: Resume = True,
    traceback: Traceback = False,
) -> None:
    """Compare methods: accuracy with standard errors, tokens, FLOPs, KV cache and prefill time.

    A run that was interrupted goes on where it stopped when the same command is given again.
    """
    with one_line_errors(traceback):
        from vtprune.evals.bench.bench import BenchConfig, run_bench

        config = BenchConfig(
            **what_to_run(tasks, methods, keep, everything=everything, limit=limit, model=model),
            output=output,
            model=model,
            device=device,
            dtype=dtype,
            attn_implementation=attn_implementation,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            frames=frames,
            include_path=include_path,
            seed=seed,
            resume=resume,
        )
        run_bench(config, open_console())


def what_to_run(
    tasks: str, methods: str | None, keep: str | None, *, everything: bool, limit: int | None, model: str | None
) -> dict[str, Any]:
    """The settings and questions that the options stand for, as fields of a BenchConfig."""
    from vtprune.evals import settings
    from vtprune.evals.bench.bench import DEFAULT_LIMIT, SHORT_KEEPS, SHORT_METHODS
    from vtprune.evals.bench.suite import BUNDLED_TASK
    from vtprune.method.texts import folder_text, parse_keep, split_entries

    names = _split(tasks, "tasks")
    if methods is not None and everything:
        raise VTPruneError("methods: --all runs every method; give it or --methods, not both")
    if methods is not None:
        chosen = split_entries(methods)
        if not chosen:
            raise VTPruneError("methods: give at least one")
    else:
        chosen = settings.all_methods() + settings.ablations() if everything else list(SHORT_METHODS)
        if model is None:
            chosen += settings.trained_folders()
        elif settings.holds_method(model):
            chosen.append(folder_text(model))
    if keep is not None:
        keeps = tuple(parse_keep(part) for part in _split(keep, "keep"))
        if not any(settings.takes_keep(method) for method in chosen):
            raise VTPruneError(
                f"keep: none of {', '.join(chosen)} takes {keep!r}; they say how much they keep themselves"
            )
    else:
        keeps = settings.ALL_KEEPS if everything else SHORT_KEEPS
    if limit is None and not everything and names == [BUNDLED_TASK]:
        limit = DEFAULT_LIMIT
    return {
        "tasks": tuple(names),
        "methods": tuple(chosen),
        "keeps": keeps,
        "limit": limit or None,
        "lenient": methods is None,
    }


def _split(text: str, name: str) -> list[str]:
    """The parts between commas; raises VTPruneError if there are none."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise VTPruneError(f"{name}: give at least one")
    return parts
