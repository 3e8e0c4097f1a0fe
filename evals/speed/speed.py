"""What each method saves, in seconds: ``python -m vtprune.evals.speed``.

A LLaVA of random weights runs in turns unpruned and under every method; methods of the tower also run their tower
alone, and for the two whose research code is written down (`research.py`) that runs too, as does vtprune with their
choices made beforehand (what scoring costs), all keeping the same tokens. Every run is paired with an
unpruned one shortly before it; medians of the ratios stand beside what the FLOPs promise, and beside the most memory
held at once.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
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
from vtprune.evals.settings import build_settings, measurable
from vtprune.evals.speed.memory import peak_bytes
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
from vtprune.method.stages import BetweenLayers, InEncoder, Query
from vtprune.method.texts import parse_keep, split_entries
from vtprune.report.costs import flops
from vtprune.report.report import Report

# Rounds that are measured however long they take, and at the most.
FEWEST, MOST = 3, 15
# So many ways share one run of the unpruned model.
BESIDE = 3
# The wrapper alone, and what is added to a method's name for the other ways to run it.
WHOLE, GIVEN, RESEARCH, TOWER = "keep=1.0", ", without scoring", ", research way", ", the tower alone"
# Methods whose research code is written down.
RESEARCHED = ("fastv", "pyramid_drop")

# Seconds of a prefill (or of the tower alone), and of a decode step (0 for the tower).
Run = Callable[[], tuple[float, float]]


@dataclass(frozen=True)
class Way:
    """One way to run: what runs, the speed-ups that its FLOPs promise, the most bytes that a prefill holds, and
    whether it is the tower alone, which has no decode step and is measured against the tower."""

    run: Run
    prefill: float = 1.0
    decode: float = 1.0
    peak: int = 0
    tower: bool = False


@dataclass(frozen=True)
class Timing:
    """One way to run against the unpruned model: paired seconds, the speed-ups that its FLOPs promise, and the most
    bytes that a prefill holds of its own, unpruned and here (0: not measured). decode: None for the tower alone."""

    name: str
    prefill: Pairs
    decode: Pairs | None
    promised_prefill: float = 1.0
    promised_decode: float = 1.0
    peak: tuple[int, int] = (0, 0)

    def phases(self) -> dict[str, tuple[Pairs, float]]:
        """Prefill and decode step: seconds and the promise."""
        found = {"prefill": (self.prefill, self.promised_prefill)}
        return found if self.decode is None else {**found, "decode": (self.decode, self.promised_decode)}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON."""
        phases = {
            name: {**pairs.to_dict(), "speedup": speedups(pairs)[1], "promised": promised,
                   "delivered": speedups(pairs)[1] / promised}
            for name, (pairs, promised) in self.phases().items()
        }  # fmt: skip
        return {"name": self.name, **phases, "peak_bytes": {"plain": self.peak[0], "wrapped": self.peak[1]}}


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
    ways = {WHOLE: Way(_wrapped(model, inputs, whole, steps), peak=_peak(model, inputs, whole))}
    for pruner in methods:
        ways.update(_ways(model, inputs, pruner, steps))
    # The prefills whose memory was measured have warmed up the rest.
    held = _peak(model, inputs, None)
    run_once(model, inputs, steps)
    tower = _tower(model, inputs, None)
    pairs: dict[str, list[tuple[tuple[float, float], tuple[float, float]]]] = {name: [] for name in ways}
    rounds = 0
    while rounds < FEWEST or (rounds < MOST and time.perf_counter() - start < budget):
        rounds += 1
        plain = (0.0, 0.0)
        for turn, (name, way) in enumerate(ways.items()):
            # A machine that drifts is followed: what is measured is never far from the unpruned run beside it.
            if turn % BESIDE == 0:
                plain = run_once(model, inputs, steps)
            pairs[name].append((tower() if way.tower else plain, way.run()))
    return [
        Timing(
            name,
            _pairs(pairs[name], 0),
            None if way.tower else _pairs(pairs[name], 1),
            promised_prefill=way.prefill,
            promised_decode=way.decode,
            peak=(held, way.peak) if way.peak else (0, 0),
        )
        for name, way in ways.items()
    ]


def _ways(model: Any, inputs: dict[str, Tensor], pruner: Pruner, steps: int) -> dict[str, Way]:
    """All ways to run a method, by name."""
    report, name, peak = _report(model, inputs, pruner), pruner.name, _peak(model, inputs, pruner)
    scored, decode = report.flops_full / report.flops, promised_decode(model, report, steps)
    found = {name: Way(_wrapped(model, inputs, pruner, steps), scored, decode, peak)}
    if name in RESEARCHED and len(inputs["input_ids"]) == 1:
        one = record(model, inputs, pruner)
        found[name + GIVEN] = Way(_wrapped(model, inputs, one.replay, steps), one.promised_unscored, decode)
        found[name + RESEARCH] = Way(_research(model, inputs, one, steps), scored, decode)
    if isinstance(pruner, InEncoder) and report.tokens_per_layer[0] == report.tokens_per_layer[-1]:
        found[name + TOWER] = Way(_tower(model, inputs, pruner), promised_tower(model, report), tower=True)
    return found


def _report(model: Any, inputs: dict[str, Tensor], pruner: Pruner) -> Report:
    """Of a prefill under a method."""
    with vtprune.wrapped(model, pruner):
        model(**inputs, use_cache=True, logits_to_keep=1)
        return vtprune.report(model)


def _peak(model: Any, inputs: dict[str, Tensor], pruner: Pruner | None) -> int:
    """The most bytes that a prefill holds at once."""
    with vtprune.wrapped(model, pruner) if pruner else nullcontext():
        model(**inputs, use_cache=True, logits_to_keep=1)
        return peak_bytes(model.device, lambda: model(**inputs, use_cache=True, logits_to_keep=1))


def _tower(model: Any, inputs: dict[str, Tensor], pruner: Pruner | None) -> Run:
    """The tower and the projector by themselves."""

    def run() -> tuple[float, float]:
        with vtprune.wrapped(model, pruner) if pruner else nullcontext():
            return seconds(model.device, lambda: model.get_image_features(inputs["pixel_values"]))[0], 0.0

    return run


def promised_tower(model: Any, report: Report) -> float:
    """The speed-up of the tower and the projector by FLOPs, all of a method's scoring counted there."""
    images = [image for sample in report.samples for image in sample.images]
    whole = flops(model.config, sum(image.tokens for image in images), text_tokens=1, images=len(images))
    own = report.flops_breakdown
    return (whole.vision_tower + whole.projector) / (own.vision_tower + own.projector + own.scoring)


def _pairs(pairs: list[tuple[tuple[float, float], tuple[float, float]]], phase: int) -> Pairs:
    return Pairs([plain[phase] for plain, _ in pairs], [other[phase] for _, other in pairs])


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
    shown.add_column("peak MB", justify="right", no_wrap=True)
    prefill, decode = (f"{1e3 * statistics.median(pairs.plain):.1f}" for pairs, _ in timings[0].phases().values())
    unpruned = ["unpruned", prefill, *[""] * 4, decode, *[""] * 4, _megabytes(timings[0].peak[0])]
    shown.add_row(*unpruned, end_section=True)
    for timing in timings:
        cells = []
        for pairs, promised in timing.phases().values():
            low, middle, high = speedups(pairs)
            cells += [f"{1e3 * statistics.median(pairs.wrapped):.1f}", f"{middle:.2f}x", f"{low:.2f} to {high:.2f}"]
            cells += [f"{promised:.2f}x", f"{middle / promised:.0%}"]
        cells += [""] * (10 - len(cells))
        shown.add_row(timing.name, *cells, _megabytes(timing.peak[1]), end_section=timing.name == WHOLE)
    return shown


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f}" if count else ""


def verdicts(timings: Sequence[Timing]) -> str:
    """What the wrapper adds, and how vtprune stands to the research way."""
    added = [f"{pairs.ratio - 1:+.1%}" for pairs, _ in timings[0].phases().values()]
    lines = [f"the wrapper adds {added[0]} to the prefill, {added[1]} to a decode step"]
    for name, pairs in against_research(timings).items():
        low, middle, high = speedups(pairs)
        lines.append(f"{name} prefills {middle:.2f}x ({low:.2f} to {high:.2f}) as fast as written the research way")
    return "\n".join(lines)


def main(
    methods: Annotated[str, typer.Option(help="Methods, separated by commas; all that ship by default.")] = "",
    keep: Annotated[str, typer.Option(help="A fraction (0.4), a percentage or a count an image.")] = "0.4",
    tokens: Annotated[str, typer.Option(help="Vision tokens, separated by commas: images of 576.")] = "576,2880",
    steps: Steps = 8,
    budget: Annotated[float, typer.Option(help="Seconds for each number of tokens, at least three rounds.")] = 80.0,
    device: Device = "cpu",
    size: Sized = Size.base,
    dtype: Dtype = "",
    batch: Annotated[int, typer.Option(min=1, help="Rows; research code is timed for one alone.")] = 1,
    attention: Annotated[str, typer.Option(help="sdpa, flash_attention_2 or eager.")] = "sdpa",
    output: Output = None,
) -> None:
    """Time methods against what their FLOPs promise, and two of them against research code."""
    if output is not None:
        with one_line_errors(traceback=False):
            check_new_file(output)
    place, kind = place_and_dtype(device, dtype)
    own = SIZES[size].image_tokens
    counts = [int(part) for part in tokens.split(",") if part.strip().isdigit()]
    if not counts or any(count < own or count % own for count in counts):
        raise typer.BadParameter(f"tokens: multiples of {own} (one image), separated by commas, got {tokens!r}")
    with one_line_errors(traceback=False):
        pruners = [one.pruner() for one in build_settings(measurable(split_entries(methods)), [parse_keep(keep)])[1:]]
    console, written = Console(width=180), []
    with one_line_errors(traceback=False):
        try:
            model = build_model(SIZES[size], place, kind, attention=attention)
        except (ImportError, ValueError) as error:
            raise vtprune.VTPruneError(f"attention {attention!r} cannot be had here: {error}") from error
    for count in counts:
        inputs = build_inputs(SIZES[size], place, kind, count // own, batch=batch)
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
