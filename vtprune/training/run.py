"""Training from Python (`train`) and from the command line (`run_train`)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from vtprune.adapters import core_model
from vtprune.assets import folder_of, title_of
from vtprune.console.output import notice
from vtprune.errors import InputError, UntrainedWarning
from vtprune.files import held, refuse_foreign
from vtprune.hooks.weights import read_weights
from vtprune.loading.environment import prepare_environment
from vtprune.loading.model import is_local, load_model
from vtprune.loading.prompts import check_text, check_videos
from vtprune.loading.videos import FRAMES
from vtprune.method.config import CONFIG_NAME, WEIGHTS_NAME, load_config
from vtprune.method.registry import read_options
from vtprune.method.resolving import resolve
from vtprune.method.texts import parse_entry, parse_options
from vtprune.provenance import model_fingerprint
from vtprune.training.config import TrainConfig
from vtprune.training.data import TrainingData, hold_out, shows_videos, texts_of
from vtprune.training.llava import LlavaData
from vtprune.training.loop import Run
from vtprune.training.output import (
    ADAPTER,
    FINISHED,
    LOG,
    LOSS_PLOT,
    ROUTED_PLOT,
    drop_checkpoint,
    read_log,
    write_log,
    write_outputs,
)
from vtprune.training.progress import Display
from vtprune.training.shapes import ShapesData
from vtprune.training.state import Progress
from vtprune.wrap import ATTRIBUTE, wrap

# Files that a run would overwrite, were they not its own.
FOREIGN = ("config.json", "model.safetensors", CONFIG_NAME, WEIGHTS_NAME, ADAPTER, LOSS_PLOT, ROUTED_PLOT)
# About each drawn picture.
QUESTIONS = 6


@dataclass(frozen=True)
class Source:
    """What `vtprune train` is to train, and on what.

    method: what vtprune/method/texts.py reads, as pmod:scale=0.3 or a folder with vtprune_config.json; options:
    "name=value"; data: LLaVA-format JSON or JSON lines, None for drawn shapes; frames: of each video (None: 16).
    """

    method: str
    model: str | None = None
    keep: int | float | None = None
    options: tuple[str, ...] = ()
    data: Path | None = None
    images: Path | None = None
    skip_missing: bool = False
    questions: int | None = None
    frames: int | None = None


def train(
    model: Any,
    processor: Any,
    data: TrainingData,
    config: TrainConfig,
    *,
    validation: TrainingData | None = None,
    console: Console | None = None,
    identity: dict[str, Any] | None = None,
) -> Progress:
    """Trains a wrapped model, in place, and writes what came of it to `config.output`.

    Goes on from the checkpoint in there if there is one, and returns at once where the run has ended already. LoRA
    adapters stay on the model. identity: what else a run must share with the one that it goes on from. Raises
    VTPruneError for what cannot be trained and for the folder of another run, RunError for what goes wrong on the way.
    """
    with _held(config.output):
        return _train(model, processor, data, config, validation=validation, console=console, identity=identity or {})


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Holds the output folder in the main process, and refuses one that holds something else."""
    with held(folder) if _is_main() else nullcontext():
        refuse_foreign(folder, LOG, FOREIGN, "a model or a method already: ")
        yield


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _train(
    model: Any,
    processor: Any,
    data: TrainingData,
    config: TrainConfig,
    *,
    validation: TrainingData | None,
    console: Console | None,
    identity: dict[str, Any],
) -> Progress:
    """The run itself, once the folder is held."""
    old = read_log(config.output)
    if shows_videos(data):
        check_videos(processor, "data")
    for name, text in texts_of(data):
        check_text(processor, text, f"data: {name}")
    base_dtype = next(weight.dtype for weight in model.parameters() if weight.is_floating_point())
    run = Run(model, processor, data, config, validation=validation, identity=identity)
    with Display(console or Console(quiet=True), run.steps, shown=run.main) as display:
        if old is not None:
            run.check_same(old["settings"])
            if old["state"] == FINISHED:
                display.say(f"{config.output} holds this run, finished")
                return Progress(
                    old["steps"], old["samples"], old["answer_tokens"], seconds=old["seconds"], curve=old["curve"]
                )
        if run.resumed:
            display.say(f"going on from step {run.progress.step} of {config.output}")
        if run.main:
            write_log(config.output, run.settings, run.progress, run.model)
        progress = run.run(display)
        if run.main:
            shares = run.shares()
            write_outputs(run.model, processor, config, base_dtype=base_dtype, progress=progress, shares=shares)
            write_log(config.output, run.settings, progress, run.model, shares=shares)
            drop_checkpoint(config.output)
        run.accelerator.wait_for_everyone()
        display.say(f"trained {progress.step} steps; the results are in {config.output}")
    return progress


def run_train(source: Source, config: TrainConfig, console: Console) -> Progress:
    """`vtprune train`: loads the model, wraps it with the method, and trains it."""
    given, options = _method(source)
    pretrained = folder_of(source.model)
    prepare_environment(offline=is_local(pretrained))
    data, validation = _data(source, config, _teller(console))
    with _held(config.output):
        # Whether it can be read is known before a model is loaded.
        read_log(config.output)
        model, processor = load_model(pretrained, device="cpu")
        with warnings.catch_warnings():
            # It is about to be trained.
            warnings.simplefilter("ignore", UntrainedWarning)
            _wrapped(model, given, options)
        identity = {
            "model": "bundled" if source.model is None else title_of(source.model),
            "model_files": model_fingerprint(pretrained),
        }
        if options:
            identity["starts_from"] = model_fingerprint(str(given))
        return _train(model, processor, data, config, validation=validation, console=console, identity=identity)


def _teller(console: Console) -> Callable[[str], None]:
    """Prints in the main process alone."""
    shown = _is_main()
    return lambda text: notice(console, text) if shown else None


def _wrapped(model: Any, given: Any, options: dict[str, Any]) -> None:
    """Wraps the model; a folder's method may have some options set anew, and then starts from the folder's weights."""
    if not options:
        wrap(model, given)
        return
    found = load_config(given)
    if isinstance(found, list):
        raise InputError(f"{given} holds a list of methods; --keep and --set go with one")
    wrap(model, replace(found, **read_options(found.name, options)))
    core: Any = core_model(model)
    modules = getattr(core, ATTRIBUTE).modules
    if modules:
        read_weights(modules, given, core)


def _method(source: Source) -> tuple[Any, dict[str, Any]]:
    """The pruners, or the folder that holds them and the options that are to be other ones; raises InputError for an
    option that is given twice."""
    options: dict[str, Any] = {}
    for text in source.options:
        try:
            given = dict(parse_options(text))
        except InputError as error:
            raise InputError(f"set: {error}") from error
        twice = options.keys() & given.keys()
        if twice:
            raise InputError(f"set: {', '.join(sorted(twice))} is given twice")
        options.update(given)
    stages = parse_entry(source.method)
    folder = stages[0].name if stages[0].folder else ""
    if source.keep is not None:
        if "keep" in options:
            raise InputError("keep: given twice, as --keep and as --set")
        options["keep"] = source.keep
    if len(stages) == 1 and folder:
        return Path(folder), options
    if len(stages) == 1:
        options = read_options(stages[0].name, options)
    return resolve(source.method, **options), {}


def _data(
    source: Source, config: TrainConfig, tell: Callable[[str], None]
) -> tuple[TrainingData, TrainingData | None]:
    """What to train on, and what to validate on."""
    if source.data is not None:
        if source.questions is not None:
            raise InputError("questions: --questions is for drawn pictures; --data brings its own")
        found = LlavaData(
            source.data,
            source.images,
            skip_missing=source.skip_missing,
            frames=FRAMES if source.frames is None else source.frames,
            tell=tell,
        )
        held_out = config.eval_limit * config.batch_size
        return hold_out(found, held_out, config.seed) if held_out else (found, None)
    if source.images is not None or source.skip_missing or source.frames is not None:
        raise InputError("images: --images, --skip-missing and --frames go with --data")
    if not is_local(folder_of(source.model)):
        raise InputError("data: drawn shapes are for the bundled models; give --data and --images")
    questions = QUESTIONS if source.questions is None else source.questions
    return ShapesData(config.seed, questions=questions), ShapesData(config.seed, "val", questions)
