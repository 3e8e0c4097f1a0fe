"""The `vtprune` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from vtprune.cli.arank import arank
from vtprune.cli.options import (
    Device,
    Dtype,
    Model,
    Traceback,
)
from vtprune.cli.train import train
from vtprune.console.output import one_line_errors, open_console
from vtprune.errors import VTPruneError

app = typer.Typer(
    help="Prune, merge and route the vision tokens of vision-language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _split(text: str, name: str) -> list[str]:
    """The parts between commas; raises VTPruneError if there are none."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise VTPruneError(f"{name}: give at least one")
    return parts


def _show_version(value: bool) -> None:
    if value:
        from vtprune.provenance import __version__

        typer.echo(f"vtprune {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


PANEL, BUDGET, SAMPLES = "What to run", "Budget (one of them)", "Samples"
Attention = Annotated[str | None, typer.Option(help="sdpa, eager, flash_attention_2, …")]
Tasks = Annotated[str, typer.Option(help="lmms-eval tasks, separated by commas.", rich_help_panel=PANEL)]
Methods = Annotated[
    str | None,
    typer.Option(
        help="Separated by commas; with options as fastv:keep=0.5,layers=(2,5): a comma goes on with a method's "
        "options where a name and = follow. Stages joined by + are one method (visionzip:keep=64+fastv). A folder "
        "with vtprune_config.json is one too, at its own keep. See `vtprune list`.",
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
BatchSize = Annotated[
    int | None,
    typer.Option(min=1, help="Rows that are answered together.", show_default="16 in float32 on a CPU, else 1"),
]
Resume = Annotated[bool, typer.Option(help="Go on with the results in the output folder, or start afresh.")]


@app.command()
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
            **_what_to_run(tasks, methods, keep, everything, limit, model),
            output=output,
            model=model,
            device=device,
            dtype=dtype,
            attn_implementation=attn_implementation,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            include_path=include_path,
            seed=seed,
            resume=resume,
        )
        run_bench(config, open_console())


def _what_to_run(
    tasks: str, methods: str | None, keep: str | None, everything: bool, limit: int | None, model: str | None
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


@app.command()
def ask(
    image: Annotated[Path, typer.Argument(help="A picture.")],
    question: Annotated[str, typer.Argument(help="A question about it.")],
    method: Annotated[
        str | None,
        typer.Option(
            help="A method, with options as fastv:layers=(2,5); several joined by +, as visionzip:keep=64+fastv; or a "
            "folder with vtprune_config.json. See `vtprune list`.",
            show_default="flowcut; what a --model folder was trained with",
        ),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            help="A count of tokens (64), a fraction (0.25) or a percentage (25%).",
            show_default="0.25, unless the method says its own",
        ),
    ] = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of an answer at the most.")] = 128,
    output: Annotated[Path, typer.Option(help="Where the picture of the kept patches goes.")] = Path("ask.png"),
    traceback: Traceback = False,
) -> None:
    """Ask about a picture with and without pruning, and see which patches were kept.

    The written picture shows the image as the model saw it beside what was kept of it: patches that never entered
    the decoder are dimmed, those that dropped out inside it have the colour and the number of the first decoder
    layer without them; patches that were merged share a tint, and the token that they flowed into has a frame.
    Below are the vision tokens and the KV entries of every decoder layer.
    """
    with one_line_errors(traceback):
        from vtprune.evals.ask.ask import run_ask
        from vtprune.method.texts import parse_keep

        run_ask(
            image,
            question,
            open_console(),
            method=method,
            keep=None if keep is None else parse_keep(keep),
            output=output,
            model_name=model,
            device=device,
            dtype=dtype,
            max_new_tokens=max_new_tokens,
        )


@app.command()
def tune(
    method: Annotated[
        str,
        typer.Argument(
            help="A method; options that are given stay fixed, as holov:tau=1 or fastv:layers=(2,5). See "
            "`vtprune list`."
        ),
    ],
    keep: Annotated[
        str | None,
        typer.Option(
            help="Budget: a count of tokens (64), a fraction (0.15) or a percentage (15%).", rich_help_panel=BUDGET
        ),
    ] = None,
    flops: Annotated[
        str | None,
        typer.Option(
            help="Budget: prefill FLOPs (vision tower included) as a share of the unpruned model's (40% or 0.4); "
            "every setting then keeps as many tokens as fit.",
            rich_help_panel=BUDGET,
        ),
    ] = None,
    model: Model = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="A folder of pictures; metadata.jsonl in it may give a question for each as "
            '{"file_name": "a.jpg", "question": "…"}. No answers are needed.',
            show_default="fresh drawings, for the bundled model",
            rich_help_panel=SAMPLES,
        ),
    ] = None,
    question: Annotated[
        str | None,
        typer.Option(
            help="Of pictures that come without one.", show_default="Describe the image.", rich_help_panel=SAMPLES
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="To search on.", rich_help_panel=SAMPLES)] = 30,
    check_samples: Annotated[
        int,
        typer.Option(
            min=0,
            help="Held out: the search never sees them; the defaults and what was found are compared on them.",
            rich_help_panel=SAMPLES,
        ),
    ] = 30,
    trials: Annotated[int, typer.Option(min=1, help="Settings to try; the first one is the method's defaults.")] = 60,
    seed: Annotated[int, typer.Option(help="Of the samples and of the search.")] = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    attn_implementation: Attention = None,
    batch_size: BatchSize = None,
    output: Annotated[
        Path, typer.Option(help="Folder for vtprune_config.json (the best setting), search.json and search.png.")
    ] = Path("tune"),
    restart: Annotated[
        bool, typer.Option("--restart", help="Start afresh; the earlier search is kept in a folder beside.")
    ] = False,
    traceback: Traceback = False,
) -> None:
    """Search a method's hyper-parameters for a model at a budget, without answers or training.

    Looks for the setting under which the last prompt token's final hidden state stays nearest to the unpruned
    model's (the search of VFlowOpt, for any method with a search space), and compares it with the defaults on
    samples that the search did not see. A search that was interrupted goes on where it stopped when the same
    command is given again; more --trials go on from a finished one.

    Example: vtprune tune holov --keep 15% --output my-tune

    Then: vtprune bench --methods holov,my-tune --keep 15%, or vtprune.wrap(model, "my-tune").
    """
    with one_line_errors(traceback):
        from vtprune.evals.settings import parse_flops
        from vtprune.evals.tune.tune import TuneConfig, run_tune
        from vtprune.method.texts import parse_keep

        config = TuneConfig(
            method=method,
            output=output,
            keep=None if keep is None else parse_keep(keep),
            flops=None if flops is None else parse_flops(flops),
            model=model,
            data=data,
            question=question,
            samples=samples,
            check_samples=check_samples,
            trials=trials,
            seed=seed,
            device=device,
            dtype=dtype,
            attn_implementation=attn_implementation,
            batch_size=batch_size,
            restart=restart,
        )
        run_tune(config, open_console())


@app.command(name="list")
def list_methods(traceback: Traceback = False) -> None:
    """List the methods and the model families."""
    with one_line_errors(traceback):
        from vtprune.evals.bench.suite import TASK_FOLDER
        from vtprune.method.catalogue import families, methods

        shown = Table(title="Methods", title_justify="left", title_style="bold", show_lines=True)
        for heading in ("name", "stage", "paper", "arXiv", "licence of the reference", "needs", "variants"):
            shown.add_column(heading, no_wrap=heading in ("name", "arXiv"))
        for info in methods().values():
            variants = ", ".join(info.variants)
            shown.add_row(info.name, info.stage, info.paper, info.arxiv, info.licence, info.needs, variants)
        models = Table(title="Models", title_justify="left", title_style="bold", show_lines=True)
        for heading in ("adapter", "models", "notes"):
            models.add_column(heading)
        for name, classes, notes in families():
            models.add_row(name, ", ".join(classes), notes)
        console = open_console()
        console.print(shown)
        console.print(models)
        console.print(
            f"With lmms-eval: python -m lmms_eval eval --model vtprune --include_path {TASK_FOLDER} "
            "--tasks vtprune_shapes --model_args method=flowcut,keep=0.25",
            soft_wrap=True,
            highlight=False,
        )


app.command()(arank)
app.command()(train)


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
