"""The `vtprune calibrate` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vtprune.cli.options import (
    SAMPLES,
    Attention,
    BatchSize,
    Device,
    Dtype,
    Frames,
    Model,
    Question,
    Traceback,
)
from vtprune.console.output import one_line_errors, open_console

PROMISE, TRIED, RULE = "Promise (auto)", "What is tried (auto)", "Heads (yopo)"


def calibrate(
    method: Annotated[str, typer.Argument(help="The method to calibrate: auto or yopo.")] = "auto",
    agreement: Annotated[
        float | None,
        typer.Option(
            help="The share of answers that are to be the whole model's.",
            show_default="0.98",
            rich_help_panel=PROMISE,
        ),
    ] = None,
    confidence: Annotated[
        float | None,
        typer.Option(
            help="With which probability over calibrations it is to hold, by learn-then-test.",
            show_default="in expectation, by conformal risk control",
            rich_help_panel=PROMISE,
        ),
    ] = None,
    adaptive: Annotated[
        bool | None,
        typer.Option(
            "--adaptive/--fixed",
            help="A budget by image, or one for all.",
            show_default="adaptive",
            rich_help_panel=PROMISE,
        ),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            help="What has to agree: the whole answer, or its tokens one by one, forced on the model (tokens).",
            show_default="answer",
            rich_help_panel=PROMISE,
        ),
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(
            help="A folder that an earlier calibration wrote: whether its promise holds on these samples.",
            rich_help_panel=PROMISE,
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Separated by commas.", show_default="grid,divprune,visionzip,turbo,flowcut", rich_help_panel=TRIED
        ),
    ] = None,
    keeps: Annotated[
        str | None,
        typer.Option(
            help="Levels below the whole image, separated by commas.",
            show_default="5%,11%,25%,50%,75%",
            rich_help_panel=TRIED,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="The folder for auto, the JSON file for yopo.", show_default="calibrated, heads.json"),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="A head reads vision in a sample where it gives it more than this times the rest.",
            show_default="0.077",
            rich_help_panel=RULE,
        ),
    ] = None,
    agree: Annotated[
        float | None,
        typer.Option(
            help="It is kept if it does in more than this share of the samples.",
            show_default="0.4",
            rich_help_panel=RULE,
        ),
    ] = None,
    model: Model = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="A folder of pictures and videos; metadata.jsonl in it may give a question for each as "
            '{"file_name": "a.jpg", "question": "…"}. For auto also tasks of lmms-eval, separated by commas: then the '
            "promise is kept for each. No answers are needed.",
            show_default="fresh drawings, for the bundled models",
            rich_help_panel=SAMPLES,
        ),
    ] = None,
    data_folder: Annotated[
        Path | None,
        typer.Option(
            help="A folder with TASK.parquet for tasks whose data cannot be fetched.", rich_help_panel=SAMPLES
        ),
    ] = None,
    question: Question = None,
    frames: Frames = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="To measure on.", show_default="500, for yopo 16", rich_help_panel=SAMPLES),
    ] = None,
    tuning_samples: Annotated[
        int | None,
        typer.Option(
            min=1, help="Others, to choose a method and its levels on.", show_default="200", rich_help_panel=SAMPLES
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the samples.", rich_help_panel=SAMPLES)] = 0,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Of an answer.", show_default="64, or as the task says", rich_help_panel=SAMPLES),
    ] = None,
    device: Device = None,
    dtype: Dtype = "auto",
    attn_implementation: Attention = None,
    batch_size: BatchSize = None,
    traceback: Traceback = False,
) -> None:
    """Measure a model on samples without labels: how few tokens answer as all do (auto), or which heads read vision.

    auto: every method is asked at every keep on some samples, the best one on others, and conformal risk control
    (arXiv 2208.02814) or learn-then-test (arXiv 2110.01052) says which setting keeps the agreement. An interrupted run
    goes on with the same command, and another --agreement asks little anew. Then: vtprune.wrap(model, FOLDER).

    yopo (arXiv 2410.06169) keeps a head for vision by the ratio of its attention to vision and to all else. Heads
    that share a key-value head are measured together; the first two layers keep all. No weights are trained. Then:
    vtprune.wrap(model, "yopo:head_file=heads.json").
    """
    with one_line_errors(traceback):
        from vtprune.errors import InputError
        from vtprune.evals.calibrate import AGREEMENT, HEADS

        promised: dict[str, Any] = {
            "agreement": agreement,
            "confidence": confidence,
            "adaptive": adaptive,
            "loss": loss,
        }
        tried = {"methods": methods, "keeps": keeps, "tuning-samples": tuning_samples}
        asked = {
            "data-folder": data_folder,
            "max-new-tokens": max_new_tokens,
            "attn-implementation": attn_implementation,
            "batch-size": batch_size,
        }
        heads = {"threshold": threshold, "agree": agree}
        console = open_console()

        def refuse(options: dict[str, Any], why: str) -> None:
            given = next((name for name, value in options.items() if value is not None), None)
            if given is not None:
                raise InputError(f"{given}: --{given} {why}; leave it out")

        if method == HEADS:
            from vtprune.evals.calibrate.head_file import HeadsConfig, run_heads

            refuse({**promised, **tried, **asked, "check": check}, f"goes with {AGREEMENT}")
            run_heads(
                HeadsConfig(
                    output=output or Path("heads.json"),
                    threshold=0.077 if threshold is None else threshold,
                    agree=0.4 if agree is None else agree,
                    model=model,
                    data=None if data is None else Path(data),
                    question=question,
                    frames=frames,
                    samples=samples or 16,
                    seed=seed,
                    device=device,
                    dtype=dtype,
                ),
                console,
            )
            return
        if method != AGREEMENT:
            raise InputError(f"method: {AGREEMENT} and {HEADS} are calibrated, got {method}")
        from vtprune.evals.calibrate.asked import Source

        refuse(heads, f"goes with {HEADS}")
        source = Source(
            data,
            question,
            model,
            frames=frames,
            max_new_tokens=max_new_tokens,
            tasks_from=data_folder,
        )
        where = {
            "model": model,
            "device": device,
            "dtype": dtype,
            "attn_implementation": attn_implementation,
            "batch_size": batch_size,
        }
        if check is not None:
            from vtprune.evals.calibrate.drift import CheckConfig, run_check

            refuse({**promised, **tried, "output": output}, "goes with a new calibration")
            holds = run_check(CheckConfig(check, source, samples or 500, seed, **where), console)
            raise typer.Exit(0 if holds else 1)
        from vtprune.evals.calibrate.agreement import KEEPS, METHODS, AgreementConfig, run_agreement
        from vtprune.method.texts import parse_keep, split_entries

        run_agreement(
            AgreementConfig(
                output=output or Path("calibrated"),
                source=source,
                agreement=0.98 if agreement is None else agreement,
                confidence=confidence,
                adaptive=adaptive is not False,
                loss=loss or "answer",
                methods=METHODS if methods is None else tuple(split_entries(methods)),
                keeps=KEEPS if keeps is None else tuple(parse_keep(keep) for keep in keeps.split(",")),
                tuning=tuning_samples or 200,
                samples=samples or 500,
                seed=seed,
                **where,
            ),
            console,
        )
