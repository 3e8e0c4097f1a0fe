"""What dropping tokens between decoder layers saves, in seconds: ``python -m vtprune.evals.speed``.

A LLaVA of random weights runs in turns unpruned, under vtprune, under vtprune with the choices made beforehand (what
scoring costs), and as research code is written (`research.py`), all keeping the same tokens. Every run is
paired with the unpruned one of its round; medians of the ratios stand beside what the FLOPs promise.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import vtprune
from vtprune.adapters import model_cost
from vtprune.console.output import one_line_errors
from vtprune.evals.settings import build_settings
from vtprune.evals.speed.overhead import (
    SIZES,
    Device,
    Dtype,
    Output,
    Pairs,
    Size,
    Sized,
    Steps,
    build_inputs,
    build_model,
    facts_of,
    place_and_dtype,
    run_once,
    seconds,
)
from vtprune.evals.speed.replay import Recorded, record
from vtprune.evals.speed.research import ResearchModel
from vtprune.files import check_new_file, write_json
from vtprune.method.pruner import Pruner
from vtprune.method.stages import BetweenLayers, Query
from vtprune.method.texts import parse_keep, split_entries
from vtprune.report.costs import flops
from vtprune.report.report import Report

# Rounds that are measured however long they take, and at the most.
FEWEST, MOST = 3, 15
# The wrapper alone, and what is added to a method's name for the two other ways to run it.
WHOLE, GIVEN, RESEARCH = "keep=1.0", ", without scoring", ", research way"

Run = Callable[[], tuple[float, float]]


@dataclass(frozen=True)
class Timing:
    """One way to run against the unpruned model: paired seconds, and the speed-ups that its FLOPs promise."""

    name: str
    prefill: Pairs
    decode: Pairs
    promised_prefill: float = 1.0
    promised_decode: float = 1.0

    def phases(self) -> dict[str, tuple[Pairs, float]]:
        """Prefill and decode step: seconds and the promise."""
        return {"prefill": (self.prefill, self.promised_prefill), "decode": (self.decode, self.promised_decode)}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON."""
        phases = {
            name: {**pairs.to_dict(), "speedup": speedups(pairs)[1], "promised": promised,
                   "delivered": speedups(pairs)[1] / promised}
            for name, (pairs, promised) in self.phases().items()
        }  # fmt: skip
        return {"name": self.name, **phases}


def speedups(pairs: Pairs) -> tuple[float, float, float]:
    """First quartile, median and third quartile of seconds plain / seconds of the other."""
    turned = Pairs(pairs.wrapped, pairs.plain)
    low, high = turned.quartiles
    return low, turned.ratio, high


def decode_flops(config: Any, entries: list[int]) -> int:
    """FLOPs of one decode step of one row, from the entries that each layer attends to."""
    one = flops(config, 0, text_tokens=1, images=0)
    return one.total + 4 * model_cost(config).decoder.query_width * sum(count - 1 for count in entries)


def promised_decode(model: Any, report: Report, steps: int) -> float:
    """The speed-up of a decode step by FLOPs, half-way through `steps`."""
    kept = [layer[0] + (steps + 1) // 2 for layer in report.history[0].kv_tokens_per_layer]
    whole = sum(image.tokens for image in report.samples[0].images) - report.tokens_per_layer[0][0] + kept[0]
    config = model.config
    return decode_flops(config, [whole] * model_cost(config).decoder.layers) / decode_flops(config, kept)


def _research(model: Any, inputs: dict[str, Tensor], recorded: Recorded, steps: int) -> Run:
    plain = ResearchModel(
        model,
        recorded.plan,
        ahead=isinstance(recorded.pruner, BetweenLayers) and recorded.pruner.query is Query.NEXT_LAYER,
    )
    device = inputs["input_ids"].device

    def run() -> tuple[float, float]:
        prefill, logits = seconds(device, lambda: plain.prefill(**inputs))
        decode = []
        for _ in range(steps):
            token = logits[:, -1:].argmax(-1)
            taken, logits = seconds(device, lambda token=token: plain.step(token))
            decode.append(taken)
        return prefill, statistics.median(decode)

    return run


def _wrapped(model: Any, inputs: dict[str, Tensor], pruner: Pruner, steps: int) -> Run:
    def run() -> tuple[float, float]:
        with vtprune.wrapped(model, pruner):
            return run_once(model, inputs, steps)

    return run


@torch.inference_mode()
def measure(
    model: Any, inputs: dict[str, Tensor], methods: Sequence[Pruner], *, steps: int = 8, budget: float = 80.0
) -> list[Timing]:
    """Times every method in every way, in rounds until `budget` seconds are over (at least FEWEST, at most MOST).

    The first answer is the wrapper alone: the first method at keep=1.0. Raises VTPruneError as `record` does.
    """
    start = time.perf_counter()
    whole = replace(methods[0], keep=1.0)
    runs: dict[str, tuple[Run, float, float]] = {WHOLE: (_wrapped(model, inputs, whole, steps), 1.0, 1.0)}
    for pruner in methods:
        one = record(model, inputs, pruner)
        decode = promised_decode(model, one.report, steps)
        scored, given = one.promised, one.promised_unscored
        runs[pruner.name] = _wrapped(model, inputs, pruner, steps), scored, decode
        runs[pruner.name + GIVEN] = _wrapped(model, inputs, one.replay, steps), given, decode
        runs[pruner.name + RESEARCH] = _research(model, inputs, one, steps), scored, decode
    # The prefills that were written down have warmed up the rest.
    run_once(model, inputs, steps)
    plain: list[tuple[float, float]] = []
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    while len(plain) < FEWEST or (len(plain) < MOST and time.perf_counter() - start < budget):
        plain.append(run_once(model, inputs, steps))
        for name, (run, _, _) in runs.items():
            taken[name].append(run())
    return [
        Timing(name, *(_pairs(plain, taken[name], phase) for phase in (0, 1)), *promised)
        for name, (_, *promised) in runs.items()
    ]


def _pairs(plain: list[tuple[float, float]], other: list[tuple[float, float]], phase: int) -> Pairs:
    return Pairs([one[phase] for one in plain], [one[phase] for one in other])


def against_research(timings: Sequence[Timing]) -> dict[str, Pairs]:
    """For each method, the prefill of the research way (as the plain one) paired with vtprune's."""
    found = {timing.name: timing.prefill for timing in timings}
    return {
        name: Pairs(found[name + RESEARCH].wrapped, pairs.wrapped)
        for name, pairs in found.items()
        if name + RESEARCH in found
    }


def table(timings: Sequence[Timing], tokens: int) -> Table:
    """Milliseconds, speed-ups with quartiles, and the share that was delivered of what the FLOPs promise."""
    rounds = len(timings[0].prefill.plain)
    shown = Table(title=f"{tokens:,} vision tokens, medians of {rounds} rounds", title_justify="left")
    shown.add_column("", no_wrap=True)
    for phase in ("prefill", "decode"):
        for heading in (f"{phase} ms", "speed-up", "quartiles", "by FLOPs", "delivered"):
            shown.add_column(heading, justify="right", no_wrap=True)
    prefill, decode = (f"{1e3 * statistics.median(pairs.plain):.1f}" for pairs, _ in timings[0].phases().values())
    shown.add_row("unpruned", prefill, *[""] * 4, decode, end_section=True)
    for timing in timings:
        cells = []
        for pairs, promised in timing.phases().values():
            low, middle, high = speedups(pairs)
            cells += [f"{1e3 * statistics.median(pairs.wrapped):.1f}", f"{middle:.2f}x", f"{low:.2f} to {high:.2f}"]
            cells += [f"{promised:.2f}x", f"{middle / promised:.0%}"]
        shown.add_row(timing.name, *cells, end_section=timing.name == WHOLE or timing.name.endswith(RESEARCH))
    return shown


def verdicts(timings: Sequence[Timing]) -> str:
    """What the wrapper adds, and how vtprune stands to the research way."""
    lines = [f"the wrapper adds {timings[0].prefill.ratio - 1:+.1%} to the prefill, "
             f"{timings[0].decode.ratio - 1:+.1%} to a decode step"]  # fmt: skip
    for name, pairs in against_research(timings).items():
        low, middle, high = speedups(pairs)
        lines.append(f"{name} prefills {middle:.2f}x ({low:.2f} to {high:.2f}) as fast as written the research way")
    return "\n".join(lines)


def main(
    methods: Annotated[str, typer.Option(help="Decoder-stage methods, separated by commas.")] = "fastv,pyramid_drop",
    keep: Annotated[str, typer.Option(help="A fraction (0.4), a percentage or a count an image.")] = "0.4",
    tokens: Annotated[str, typer.Option(help="Vision tokens, separated by commas: images of 576.")] = "576,2880",
    steps: Steps = 8,
    budget: Annotated[float, typer.Option(help="Seconds for each number of tokens, at least three rounds.")] = 80.0,
    device: Device = "cpu",
    size: Sized = Size.base,
    dtype: Dtype = "",
    output: Output = None,
) -> None:
    """Time methods that drop tokens between decoder layers against their promise and against research code."""
    if output is not None:
        with one_line_errors(traceback=False):
            check_new_file(output)
    place, kind = place_and_dtype(device, dtype)
    own = SIZES[size].image_tokens
    counts = [int(part) for part in tokens.split(",") if part.strip().isdigit()]
    if not counts or any(count < own or count % own for count in counts):
        raise typer.BadParameter(f"tokens: multiples of {own} (one image), separated by commas, got {tokens!r}")
    pruners = [one.pruner() for one in build_settings(split_entries(methods), [parse_keep(keep)])[1:]]
    model, console, written = build_model(SIZES[size], place, kind), Console(width=170), []
    for count in counts:
        inputs = build_inputs(SIZES[size], place, kind, count // own)
        timings = measure(model, inputs, pruners, steps=steps, budget=budget)
        console.print(table(timings, count), verdicts(timings), "", sep="\n")
        written.append(
            {
                **facts_of(model, inputs),
                "runs": [timing.to_dict() for timing in timings],
                "against_research": {name: pairs.to_dict() for name, pairs in against_research(timings).items()},
            }
        )
    if output is not None:
        settings = {"methods": [pruner.to_dict() for pruner in pruners], "steps": steps, "measured": written}
        write_json(output, settings)
