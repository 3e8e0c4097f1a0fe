"""Where a method's seconds go beside what its FLOPs promise: ``python -m vtprune.evals.speed.profiling``.

Every operation of a prefill is timed, unpruned and under the method, in turns: the model's own by part (tower,
decoder) and kind (matrix products, attention, the rest), vtprune's by the file that asked for them. What lies between
two operations, Python, is counted beside them. Timing each operation slows all of them a little and both alike.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import vtprune
from vtprune.adapters import adapter_for
from vtprune.console.output import one_line_errors
from vtprune.evals.settings import build_settings, measurable
from vtprune.evals.speed.launches import place_in_code
from vtprune.evals.speed.overhead import SIZES, Output, Size, Sized, build_inputs, build_model, facts_of
from vtprune.files import check_new_file, write_json
from vtprune.method.pruner import Pruner
from vtprune.method.texts import parse_keep, split_entries
from vtprune.report.costs import flops
from vtprune.report.report import Report

PRODUCTS, ATTENTION = ("linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "convolution"), "scaled_dot_product"
TOWER, DECODER, PYTHON = "tower", "decoder", "Python between operations"


class _Clock(TorchDispatchMode):
    """Adds up the seconds of operations, by what they belong to."""

    def __init__(self) -> None:
        super().__init__()
        self.part = DECODER
        self.spent = Counter[str]()
        self._before = time.perf_counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.perf_counter()
        self.spent[PYTHON] += start - self._before  # type: ignore[assignment]
        result = func(*args, **(kwargs or {}))
        taken = time.perf_counter() - start
        self.spent[self._owner(func.overloadpacket.__name__)] += taken  # type: ignore[assignment]
        self._before = time.perf_counter()
        return result

    def _owner(self, name: str) -> str:
        asked = place_in_code()
        if asked:
            return asked.partition(":")[0]
        kind = "matrix products" if name in PRODUCTS else "attention" if ATTENTION in name else "the rest"
        return f"{self.part}: {kind}"


@contextmanager
def _timing(tower: nn.Module) -> Iterator[_Clock]:
    """The clock runs in the block, and knows when the tower does."""
    clock = _Clock()

    def enter(*_: Any) -> None:
        clock.part = TOWER

    def leave(*_: Any) -> None:
        clock.part = DECODER

    handles = [tower.register_forward_pre_hook(enter), tower.register_forward_hook(leave)]
    try:
        with clock:
            yield clock
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Line:
    """Seconds of one part of a prefill: unpruned, under the method, and as its FLOPs promise."""

    name: str
    plain: float
    pruned: float
    promised: float

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return {"part": self.name, "plain": self.plain, "pruned": self.pruned, "promised": self.promised}


@torch.inference_mode()
def profile(model: Any, inputs: dict[str, Tensor], pruner: Pruner, rounds: int) -> list[Line]:
    """A line a part, the costliest above its promise first; the last is the sum. Medians over `rounds`.

    The promise of the model's own parts is the unpruned seconds times the FLOPs left to them; Python's is what it took
    before, and what vtprune does itself is promised to take no time. The sum's is that of all FLOPs, scoring included.
    """
    tower = adapter_for(model).vision_tower

    def read() -> Any:
        return model(**inputs, use_cache=True, logits_to_keep=1)

    def measured(method: Pruner | None) -> Counter[str]:
        with vtprune.wrapped(model, method) if method else nullcontext(), _timing(tower) as clock:
            read()
        return clock.spent

    with vtprune.wrapped(model, pruner):
        read()
        report = vtprune.report(model)
    pairs = [(measured(None), measured(pruner)) for _ in range(rounds)]
    plain, pruned = (_medians([pair[turn] for pair in pairs]) for turn in (0, 1))
    shares = _shares(model, report)
    lines = []
    for name in plain | pruned:
        before = plain.get(name, 0.0)
        lines.append(Line(name, before, pruned.get(name, 0.0), before * shares.get(name.partition(":")[0], 1.0)))
    lines.sort(key=lambda line: line.promised - line.pruned)
    whole = sum(plain.values())
    return [*lines, Line("all", whole, sum(pruned.values()), whole * report.flops / report.flops_full)]


def _medians(found: Sequence[Counter[str]]) -> dict[str, float]:
    names = {name for one in found for name in one}
    return {name: statistics.median(one[name] for one in found) for name in names}


def _shares(model: Any, report: Report) -> dict[str, float]:
    """The share of its FLOPs that is left to each part of the model."""
    images = [image for sample in report.samples for image in sample.images]
    whole = flops(model.config, sum(image.tokens for image in images), text_tokens=1, images=len(images))
    before = whole.vision_tower + whole.projector
    own = report.flops_breakdown
    return {
        TOWER: (own.vision_tower + own.projector) / before,
        DECODER: (own.decoder + own.head) / (report.flops_full - before),
    }


def table(method: str, lines: Sequence[Line]) -> Table:
    """Milliseconds of each part, and what lies above the promise; parts of less than 0.05 ms are left out."""
    shown = Table("", title=f"{method}: milliseconds of a prefill", title_justify="left")
    for heading in ("unpruned", "pruned", "by FLOPs", "above"):
        shown.add_column(heading, justify="right")
    for line in lines:
        spent = (line.plain, line.pruned, line.promised, line.pruned - line.promised)
        if max(spent) >= 5e-5 or line is lines[-1]:
            shown.add_row(line.name, *(f"{1e3 * one:.1f}" for one in spent))
    return shown


def summary(found: Mapping[str, Sequence[Line]]) -> Table:
    """Of several methods: milliseconds of a prefill as the FLOPs promise them, and what takes more (or less):
    vtprune's own operations, Python between operations, and the model's own, which are promised the unpruned pace."""
    shown = Table(title="milliseconds of a prefill above what the FLOPs promise", title_justify="left")
    for heading in ("", "by FLOPs", "own operations", "Python", "the model's operations", "all"):
        shown.add_column(heading, justify="right" if heading else "left")
    for method, lines in found.items():
        above = {"own": 0.0, PYTHON: 0.0, "model": 0.0}
        for line in lines[:-1]:
            part = line.name.partition(":")[0]
            owner = "model" if part in (TOWER, DECODER) else part if part == PYTHON else "own"
            above[owner] += line.pruned - line.promised
        spent = (lines[-1].promised, above["own"], above[PYTHON], above["model"])
        shown.add_row(method, *(f"{1e3 * one:.1f}" for one in (*spent, lines[-1].pruned - lines[-1].promised)))
    return shown


def main(
    methods: Annotated[str, typer.Argument(help="Methods, separated by commas; all that ship by default.")] = "",
    keep: Annotated[str, typer.Option(help="A fraction (0.4), a percentage or a count an image.")] = "0.4",
    images: Annotated[int, typer.Option(min=1, help="Images of 576 tokens in the prompt.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Prefills of each, in turns.")] = 5,
    size: Sized = Size.base,
    output: Output = None,
) -> None:
    """Say where the seconds of methods go that their FLOPs do not promise, on a CPU."""
    with one_line_errors(traceback=False):
        if output is not None:
            check_new_file(output)
        pruners = [one.pruner() for one in build_settings(measurable(split_entries(methods)), [parse_keep(keep)])[1:]]
    place = torch.device("cpu")
    model = build_model(SIZES[size], place, torch.float32)
    inputs = build_inputs(SIZES[size], place, torch.float32, images)
    console, found = Console(width=140), {}
    for pruner in pruners:
        found[pruner.name] = profile(model, inputs, pruner, rounds)
        console.print(table(pruner.name, found[pruner.name]))
    if len(found) > 1:
        console.print("", summary(found))
    written = {name: [line.to_dict() for line in lines] for name, lines in found.items()}
    if output is not None:
        write_json(output, {**facts_of(model, inputs), "methods": written})


if __name__ == "__main__":
    typer.run(main)
