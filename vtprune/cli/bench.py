"""The `vtprune bench` command."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vtprune.cli.options import Attention, BatchSize, Device, Dtype, Traceback
from vtprune.console.output import one_line_errors, open_console
from vtprune.errors import VTPruneError

PANEL = "What to run"
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        help="A model id, a folder with a checkpoint, or tiny-qwen, the other bundled model. Of several each has a "
        "folder of its own inside --output.",
        show_default="the bundled tiny LLaVA",
    ),
]
Tasks = Annotated[
    str | None,
    typer.Option(
        help="lmms-eval tasks, separated by commas.", show_default="vtprune_shapes, or --suite", rich_help_panel=PANEL
    ),
]
Suite = Annotated[
    list[str] | None,
    typer.Option(
        help="Tasks that are reported together: llava, ocr, video or bundled; may be given several times, and beside "
        "--tasks.",
        rich_help_panel=PANEL,
    ),
]
Metric = Annotated[
    list[str] | None,
    typer.Option(
        help="The metric that tables show, of every task, or of one as pope=pope_accuracy; may be given several "
        "times. results.json has all of them.",
        show_default="that of the suite, or a task's first one",
        rich_help_panel=PANEL,
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        help="A folder with TASK.parquet for tasks whose data sets cannot be reached, of the same columns.",
        rich_help_panel=PANEL,
    ),
]
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
Prompts = Annotated[
    str | None,
    typer.Option(
        help="The model whose prompts tasks take where they have some for it: llava, qwen_vl, qwen2_5_vl, qwen3_vl.",
        show_default="lmms-eval's default prompts",
        rich_help_panel=PANEL,
    ),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        help='Instead of --device, for a model that is too large for one: auto, or JSON as {"": "cpu"}.',
        show_default=False,
    ),
]
Worst = Annotated[
    bool,
    typer.Option(
        "--worst",
        help="Show what the dearest of four pictures costs that are hard to prune (noise, a checkerboard, a page of "
        "words, a crowd), beside the mean over the questions.",
        rich_help_panel=PANEL,
    ),
]
Seed = Annotated[int, typer.Option(help="Of the sample of questions.", rich_help_panel=PANEL)]
Resume = Annotated[bool, typer.Option(help="Go on with the results in the output folder, or start afresh.")]


def bench(
    model: Models = None,
    tasks: Tasks = None,
    suite: Suite = None,
    metric: Metric = None,
    methods: Methods = None,
    keep: Keeps = None,
    everything: Everything = False,
    limit: Limit = None,
    include_path: IncludePath = None,
    data: Data = None,
    prompts: Prompts = None,
    worst: Worst = False,
    seed: Seed = 0,
    device: Device = None,
    device_map: DeviceMap = None,
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
    output: Annotated[
        Path, typer.Option(help="Folder for results.json, table.md, pareto.png, and a folder a setting in cells/.")
    ] = Path("bench"),
    resume: Resume = True,
    traceback: Traceback = False,
) -> None:
    """Compare methods: accuracy with standard errors, tokens, FLOPs, KV cache and prefill time.

    A run that was interrupted goes on where it stopped when the same command is given again. Several processes and
    machines may work on one --output, each on other settings: give them the same command, or for the devices of one
    machine: torchrun --nproc-per-node 8 -m vtprune.cli bench ...
    """
    with one_line_errors(traceback):
        from vtprune.evals.bench.bench import BenchConfig, run_bench
        from vtprune.loading.model import check_model

        models: list[str | None] = [*dict.fromkeys(model or ())] or [None]
        names = [folder_name(one) for one in models]
        if len(set(names)) < len(names):
            raise VTPruneError(
                f"model: two of them would have one folder in --output ({', '.join(names)}); run them apart"
            )
        asked = which_questions(tasks, suite or [], metric or [])
        configs = [
            BenchConfig(
                **what_to_run(asked["tasks"], methods, keep, everything=everything, limit=limit, model=one),
                metrics=asked["metrics"],
                output=output / folder_name(one) if len(models) > 1 else output,
                model=one,
                device=device,
                dtype=dtype,
                attn_implementation=attn_implementation,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                frames=frames,
                include_path=include_path,
                data=data,
                prompts=prompts,
                device_map=device_map,
                worst=worst,
                seed=seed,
                resume=resume,
            )
            for one in models
        ]
        # One model is looked for when its turn comes, behind what is quicker to check.
        for one in models if len(models) > 1 else ():
            check_model(one)
        for config in configs:
            run_bench(config, open_console())


def folder_name(model: str | None) -> str:
    """What the folder of one of several models is called."""
    from vtprune.assets import folder_of

    return (Path(folder_of(model)).name if Path(folder_of(model)).is_dir() else folder_of(model)).replace("/", "__")


def which_questions(tasks: str | None, suites: list[str], metrics: list[str]) -> dict[str, Any]:
    """Tasks, and the metrics of those that say one, from the options."""
    from vtprune.evals.bench.suite import BUNDLED_TASK
    from vtprune.evals.bench.suites import read_metrics, tasks_of

    names = [] if tasks is None and suites else _split(BUNDLED_TASK if tasks is None else tasks, "tasks")
    found = {**dict.fromkeys(names, ""), **tasks_of(suites)}
    chosen = {**found, **read_metrics(metrics, list(found))}
    return {"tasks": tuple(found), "metrics": tuple((task, metric) for task, metric in chosen.items() if metric)}


def what_to_run(
    names: Sequence[str],
    methods: str | None,
    keep: str | None,
    *,
    everything: bool,
    limit: int | None,
    model: str | None,
) -> dict[str, Any]:
    """The settings and questions that the options stand for, as fields of a BenchConfig."""
    from vtprune.evals import settings
    from vtprune.evals.bench.bench import DEFAULT_LIMIT, SHORT_KEEPS, SHORT_METHODS
    from vtprune.evals.bench.suite import BUNDLED_TASK
    from vtprune.method.texts import folder_text, parse_keep, split_entries

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
    if limit is None and not everything and tuple(names) == (BUNDLED_TASK,):
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
