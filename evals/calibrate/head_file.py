"""`vtprune calibrate yopo`: the file that says which heads of a model read vision."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from vtprune.adapters import adapter_for
from vtprune.assets import folder_of, title_of
from vtprune.console.output import notice
from vtprune.console.progress import Steps
from vtprune.errors import FileError, InputError
from vtprune.evals.calibrate.heads import measure, reading_heads
from vtprune.evals.samples import Wanted, batches, gather
from vtprune.files import held, write_json
from vtprune.json_files import read_json
from vtprune.loading.environment import prepare_environment
from vtprune.loading.model import is_local, load_model
from vtprune.loading.prompts import check_text
from vtprune.method.texts import show
from vtprune.pruners import YOPO
from vtprune.pruners.yopo import HEADS


@dataclass(frozen=True)
class HeadsConfig:
    """What to measure, and by which rule heads stay."""

    output: Path
    threshold: float = 0.077
    agree: float = 0.4
    model: str | None = None
    data: Path | None = None
    question: str | None = None
    samples: int = 16
    frames: int | None = None
    seed: int = 0
    device: str | None = None
    dtype: str = "auto"


def run_heads(config: HeadsConfig, console: Console) -> dict[str, Any]:
    """Measures the heads, and returns the content of the file that it writes.

    Raises VTPruneError for a request that cannot be carried out.
    """
    if config.threshold < 0 or not 0 <= config.agree < 1:
        raise InputError(
            f"threshold is at least 0 and agree a share from 0 to below 1, got {config.threshold} and {config.agree}"
        )
    if config.output.is_dir():
        raise InputError(f"output: the heads go to a JSON file such as heads.json, got {config.output}")
    wanted = Wanted(config.samples, 0, config.seed, config.frames)
    gathered = gather(wanted, data=config.data, question=config.question, model=config.model)
    with held(config.output.parent):
        try:
            if config.output.exists():
                read_json(HEADS, config.output, "a file of heads, so it is not replaced", "; give another --output")
        except FileError as error:
            raise InputError(f"output: {error}") from error
        prepare_environment(offline=is_local(folder_of(config.model)))
        model, processor = load_model(config.model, device=config.device, dtype=config.dtype)
        samples = gathered.search
        for sample in samples:
            check_text(processor, sample.question, f"data: {sample.name}")
        with Steps(console, "attention", len(samples)) as steps:

            def measured(count: int) -> None:
                steps.end(f"attention on {samples[steps.made].name}")
                steps.begin("attention")

            ratios = measure(model, batches(model, processor, samples), measured)
        kept = reading_heads(ratios, threshold=config.threshold, agree=config.agree)
        facts = adapter_for(model).facts()
        data = {
            "kv_heads": facts.decoder_kv_heads,
            "depth": facts.decoder_depth,
            "kept": {str(layer): heads for layer, heads in kept.items()},
            "model": title_of(config.model),
            "source": gathered.source,
            "samples": len(samples),
            "seed": config.seed,
            "threshold": config.threshold,
            "agree": config.agree,
        }
        write_json(config.output, data)
    for layer, heads in kept.items():
        console.print(
            f"layer {layer}: {len(heads)} of {facts.decoder_kv_heads} key-value heads read vision", highlight=False
        )
    text = show(YOPO(head_file=str(config.output)))
    console.print(f'vtprune.wrap(model, "{text}")', style="dim", highlight=False)
    notice(console, f"wrote {config.output}")
    return data
