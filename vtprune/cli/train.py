"""The `vtprune train` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vtprune.cli.options import Model, Traceback
from vtprune.console.output import one_line_errors, open_console
from vtprune.errors import VTPruneError

METHOD, DATA, HOW, RUN = "Method", "Data", "How to train", "The run"


def train(
    method: Annotated[
        str,
        typer.Argument(
            help="A method, with options as gamma_mod:layers=(2,3), or a folder with vtprune_config.json. See "
            "`vtprune list`."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder for what was trained, and for the checkpoint on the way.")],
    model: Model = None,
    keep: Annotated[
        str | None,
        typer.Option(
            help="A count of tokens (64), a fraction (0.55) or a percentage (55%).",
            show_default="the method's own",
            rich_help_panel=METHOD,
        ),
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="A further option of the method, as scale=0.3 or layers=(2,3).", rich_help_panel=METHOD
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Conversations in LLaVA's format, as JSON or JSON lines.",
            show_default="drawn shapes",
            rich_help_panel=DATA,
        ),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="The folder that image and video paths start from.", rich_help_panel=DATA)
    ] = None,
    skip_missing: Annotated[
        bool,
        typer.Option(
            "--skip-missing", help="Leave out what has missing or broken images or videos.", rich_help_panel=DATA
        ),
    ] = False,
    frames: Annotated[
        int | None,
        typer.Option(min=1, help="Of each video, evenly spread over it.", show_default="16", rich_help_panel=DATA),
    ] = None,
    questions: Annotated[
        int | None, typer.Option(min=1, help="About each drawn picture.", show_default="6", rich_help_panel=DATA)
    ] = None,
    trained: Annotated[
        str,
        typer.Option(
            "--train",
            help="all, decoder (all but the vision tower), routers (the method's weights alone) or lora.",
            rich_help_panel=HOW,
        ),
    ] = "decoder",
    lora_rank: Annotated[int | None, typer.Option(show_default="16", rich_help_panel=HOW)] = None,
    steps: Annotated[int | None, typer.Option(rich_help_panel=HOW, show_default="one epoch; 1000 of shapes")] = None,
    epochs: Annotated[float | None, typer.Option(rich_help_panel=HOW)] = None,
    batch_size: Annotated[int, typer.Option(help="Samples a process and micro-batch.", rich_help_panel=HOW)] = 16,
    accumulate: Annotated[int, typer.Option(help="Micro-batches a step.", rich_help_panel=HOW)] = 1,
    lr: Annotated[
        float | None, typer.Option(help="Highest rate.", show_default="2e-5; 2e-4 for lora", rich_help_panel=HOW)
    ] = None,
    router_lr: Annotated[
        float | None, typer.Option(help="Of the method's own weights.", show_default="lr", rich_help_panel=HOW)
    ] = None,
    warmup: Annotated[float, typer.Option(help="Share of the steps.", rich_help_panel=HOW)] = 0.03,
    weight_decay: Annotated[float, typer.Option(rich_help_panel=HOW)] = 0.0,
    gradient_checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing", rich_help_panel=HOW)] = False,
    dtype: Annotated[
        str, typer.Option(help="auto, float32 or bfloat16; weights stay in float32.", rich_help_panel=HOW)
    ] = "auto",
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda or cuda:1.", show_default="a GPU if there is one", rich_help_panel=RUN),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the data's order and of dropout.", rich_help_panel=RUN)] = 0,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.", rich_help_panel=RUN)] = 500,
    log_every: Annotated[int, typer.Option(help="Steps between lines.", rich_help_panel=RUN)] = 10,
    eval_limit: Annotated[
        int, typer.Option(help="Validation batches at each checkpoint, held out of --data.", rich_help_panel=RUN)
    ] = 0,
    traceback: Traceback = False,
) -> None:
    """Train the weights that a method brings to a model, alone or with the model's own.

    A run that was interrupted goes on where it stopped when the same command is given again. For several processes:
    accelerate launch -m vtprune.cli train ...

    Example: vtprune train pmod --output my-pmod --steps 1000 --lr 3e-4 --router-lr 3e-3

    Then: vtprune bench --model my-pmod --methods my-pmod, or vtprune.wrap(model, "my-pmod").
    """
    with one_line_errors(traceback):
        from vtprune.method.texts import parse_keep
        from vtprune.training.config import LORA_RANK, TrainConfig
        from vtprune.training.run import Source, run_train

        asked = None if keep is None else parse_keep(keep)
        if lora_rank is not None and trained != "lora":
            raise VTPruneError(f"lora-rank: it goes with --train lora, and this is --train {trained}")
        source = Source(
            method,
            model,
            keep=asked,
            options=tuple(options or ()),
            data=data,
            images=images,
            skip_missing=skip_missing,
            questions=questions,
            frames=frames,
        )
        config = TrainConfig(
            output=output,
            steps=steps,
            epochs=epochs,
            batch_size=batch_size,
            accumulate=accumulate,
            lr=lr,
            router_lr=router_lr,
            warmup=warmup,
            weight_decay=weight_decay,
            train=trained,
            lora_rank=LORA_RANK if lora_rank is None else lora_rank,
            save_every=save_every,
            log_every=log_every,
            eval_limit=eval_limit,
            seed=seed,
            device=device,
            dtype=dtype,
            gradient_checkpointing=gradient_checkpointing,
        )
        run_train(source, config, open_console())
