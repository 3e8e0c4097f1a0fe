"""`vtprune arank`: which decoder layers of a model have attention maps of low rank, and are therefore to be routed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from pydantic import FiniteFloat, TypeAdapter
from rich.console import Console
from rich.table import Table
from typing_extensions import TypedDict

from vtprune.adapters import adapter_for
from vtprune.assets import folder_of, title_of
from vtprune.console.figures import COLOURS, figure_png
from vtprune.console.output import notice
from vtprune.console.progress import Steps
from vtprune.errors import FileError, InputError
from vtprune.evals.arank.ranks import choose, rank_layers
from vtprune.evals.samples import Calibration, Wanted, batches, gather
from vtprune.files import (
    held,
    refuse_foreign,
    write_bytes,
    write_json,
)
from vtprune.json_files import read_json
from vtprune.loading.environment import prepare_environment
from vtprune.loading.model import is_local, load_model
from vtprune.loading.prompts import check_text
from vtprune.method.texts import show
from vtprune.pruners import GammaMoD

FORMAT = "vtprune-arank"


class Ranks(TypedDict):
    """The file that `vtprune arank` writes."""

    format: Literal["vtprune-arank"]
    arank: list[FiniteFloat]
    layers: list[int]


RANKS = TypeAdapter(Ranks)


@dataclass(frozen=True)
class ARankConfig:
    """What to rank. At most one of count and share says how many layers to route; neither: as many as gamma-MoD routes
    at the model's depth."""

    output: Path
    count: int | None = None
    share: float | None = None
    model: str | None = None
    data: Path | None = None
    question: str | None = None
    samples: int = 16
    frames: int | None = None
    seed: int = 0
    device: str | None = None
    dtype: str = "auto"


def run_arank(config: ARankConfig, console: Console) -> dict[str, Any]:
    """Ranks the layers, prints them with the choice, and returns the content of the file that it writes.

    Raises VTPruneError for a request that cannot be carried out.
    """
    plot = config.output.with_suffix(".png")
    if config.output.suffix == ".png" or config.output.is_dir():
        raise InputError(f"output: the ranks go to a JSON file such as arank.json, got {config.output}")
    if config.count is not None and config.share is not None:
        raise InputError("layers: give --count or --share, one of them")
    samples = _samples(config, console)
    with held(config.output.parent):
        _check_output(config.output, plot)
        return _rank(config, plot, samples, console)


def _check_output(output: Path, plot: Path) -> None:
    """Raises InputError for files that are there and not of such a run; those of one are replaced."""
    try:
        if output.exists():
            read_json(RANKS, output, "a file of ranks, so it is not replaced", "; give another --output")
        refuse_foreign(output.parent, output.name, (plot.name,))
    except FileError as error:
        raise InputError(f"output: {error}") from error


def _rank(config: ARankConfig, plot: Path, gathered: Calibration, console: Console) -> dict[str, Any]:
    """The run itself, once the folder is held."""
    samples = gathered.search
    prepare_environment(offline=is_local(folder_of(config.model)))
    model, processor = load_model(config.model, device=config.device, dtype=config.dtype)
    for sample in samples:
        check_text(processor, sample.question, f"data: {sample.name}")
    depth = len(list(adapter_for(model).decoder_layers))
    count = config.count
    if count is None and config.share is None:
        count = len(GammaMoD().bind(adapter_for(model).facts()).routed_layers())
    # A number of layers that the model does not have is refused before anything is computed.
    choose([0.0] * depth, count=count, share=config.share)
    with Steps(console, "attention maps", len(samples)) as steps:

        def ranked(count: int) -> None:
            steps.end(f"attention maps of {samples[steps.made].name}")
            steps.begin("attention maps")

        ranks = rank_layers(model, batches(model, processor, samples), ranked)
    layers = choose(ranks, count=count, share=config.share)
    name = title_of(config.model)
    data = {
        "format": FORMAT,
        "model": name,
        "source": gathered.source,
        "samples": len(samples),
        "seed": config.seed,
        "arank": ranks,
        "layers": list(layers),
    }
    write_json(config.output, data)
    write_bytes(plot, arank_png(ranks, layers, f"{name}, {len(samples)} samples"))
    console.print(_table(ranks, layers))
    console.print(f"layers={layers}", style="bold", highlight=False)
    text = show(GammaMoD(layers=layers))
    console.print(f"vtprune.wrap(model, \"{text}\"), vtprune train '{text}'", style="dim", highlight=False)
    notice(console, f"wrote {config.output}, {plot}")
    return data


def _samples(config: ARankConfig, console: Console) -> Calibration:
    """Pictures and videos with a question each, and where they came from."""
    wanted = Wanted(config.samples, 0, config.seed, config.frames)
    found = gather(wanted, data=config.data, question=config.question, model=config.model)
    if len(found.search) < config.samples:
        notice(console, f"{config.data} holds {len(found.search)} of the {config.samples} samples")
    return found


def _table(ranks: Sequence[float], layers: Sequence[int]) -> Table:
    order = sorted(range(len(ranks)), key=lambda layer: (ranks[layer], layer))
    table = Table(title="Rank of attention maps by decoder layer", title_justify="left", title_style="bold")
    for heading in ("layer", "ARank", "lowest first"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for layer, rank in enumerate(ranks):
        ends = layer in (0, len(ranks) - 1)
        word = "routed" if layer in layers else "always computes everything" if ends else "computes everything"
        table.add_row(str(layer), f"{rank:.2f}", str(order.index(layer) + 1), word)
    return table


def arank_png(ranks: Sequence[float], layers: Sequence[int], title: str) -> bytes:
    """A bar a layer, in another colour and hatched where it is routed."""
    figure = Figure(figsize=(max(4.5, 1.5 + 0.25 * len(ranks)), 3.2), layout="constrained", dpi=150)
    axes = figure.subplots()
    for routed, label in ((True, "routed"), (False, "computes everything")):
        own = [layer for layer in range(len(ranks)) if (layer in layers) == routed]
        hatch = "//" if routed else None
        axes.bar(own, [ranks[layer] for layer in own], color=COLOURS[not routed], hatch=hatch, label=label)
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("ARank")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=10)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure_png(figure)
