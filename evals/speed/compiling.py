"""Whether compiled layers stay compiled from prompt to prompt: ``python -m vtprune.evals.speed.compiling``.

A method that keeps a fixed count gives its layers the same shapes for every prompt of one length and images of one
size. The layers of a wrapped model are compiled, prompts run through it, and torch's own counters say how many graphs
there were after the first ones, how many more later prompts made, and how often a graph broke.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._dynamo import config as dynamo
from torch._dynamo.utils import counters
from transformers.modeling_layers import GradientCheckpointingLayer

import vtprune
from vtprune.console.output import one_line_errors
from vtprune.evals.speed.overhead import SIZES, ModelSize, Size, Sized, build_inputs, build_model
from vtprune.method.texts import parse_keep, split_entries

METHODS = "grid,fopru,divprune,fastv"
CPU = torch.device("cpu")
# A second shape makes torch compile once more, for shapes that vary; from then on nothing is new.
SETTLED = 2


@dataclass(frozen=True)
class Compiled:
    """What prompts made of compiled layers: graphs after the first ones, graphs that later prompts added, breaks, and
    the greatest difference of a logit to those without compilation."""

    graphs: int
    added: int
    breaks: int
    difference: float


def prompts(size: ModelSize, count: int) -> Iterator[dict[str, Tensor]]:
    """Prompts of one length with an image each: other words, other pixels."""
    generator = torch.Generator().manual_seed(0)
    whole = build_inputs(size, CPU, torch.float32)
    for _ in range(count):
        ids = whole["input_ids"].clone()
        text = ids != size.vocabulary - 1
        ids[text] = torch.randint(3, size.vocabulary - 1, (int(text.sum()),), generator=generator)
        yield {"input_ids": ids, "pixel_values": torch.randn(whole["pixel_values"].shape, generator=generator)}


@contextmanager
def compiled_layers(model: Any, backend: str) -> Iterator[None]:
    """Every layer of the tower and the decoder compiled; torch tells layers with hooks from those without."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    torch.compiler.reset()
    # A cache knows its layers by their numbers, so that each of them is a graph of its own, pruned or not.
    with dynamo.patch(skip_nnmodule_hook_guards=False, recompile_limit=len(layers) * SETTLED + 8):
        for layer in layers:
            layer.compile(backend=backend)
        try:
            yield
        finally:
            for layer in layers:
                layer._compiled_call_impl = None
            torch.compiler.reset()


@torch.inference_mode()
def measure(
    model: Any, given: list[dict[str, Tensor]], method: str, keep: int | float, *, cached: bool, backend: str
) -> Compiled:
    """Runs the prompts under a method ("" for none) and counts what they compile."""
    with vtprune.wrapped(model, method, keep=keep) if method else nullcontext():
        expected = [model(**one, use_cache=cached, logits_to_keep=1).logits for one in given]
        with compiled_layers(model, backend):
            counters.clear()
            difference, graphs = 0.0, 0
            for turn, (one, known) in enumerate(zip(given, expected, strict=True), 1):
                logits = model(**one, use_cache=cached, logits_to_keep=1).logits
                difference = max(difference, float((logits - known).abs().max()))
                graphs = counters["stats"]["unique_graphs"] if turn <= SETTLED else graphs
            added = counters["stats"]["unique_graphs"] - graphs
            return Compiled(graphs, added, sum(counters["graph_break"].values()), difference)


def main(
    methods: Annotated[str, typer.Option(help="Methods, separated by commas.")] = METHODS,
    keep: Annotated[str, typer.Option(help="A fraction (0.5), a percentage or a count an image.")] = "0.5",
    count: Annotated[int, typer.Option("--prompts", min=SETTLED + 1, help="Prompts of one length.")] = 20,
    cached: Annotated[bool, typer.Option("--cache/--no-cache", help="Whether a KV cache is filled.")] = True,
    backend: Annotated[str, typer.Option(help="What torch compiles with; eager captures graphs alone.")] = "eager",
    size: Sized = Size.small,
) -> None:
    """Count the graphs, breaks and recompilations of compiled layers over prompts of one length."""
    with one_line_errors(traceback=False):
        model, given = build_model(SIZES[size], CPU, torch.float32), list(prompts(SIZES[size], count))
        shown = Table(title=f"{count} prompts, {'with' if cached else 'without'} a cache: compiled layers")
        for heading in ("", f"graphs after {SETTLED}", "added later", "breaks", "logits differ by"):
            shown.add_column(heading, justify="right" if heading else "left")
        for method in ["", *split_entries(methods)]:
            found = measure(model, given, method, parse_keep(keep), cached=cached, backend=backend)
            numbers = (found.graphs, found.added, found.breaks)
            shown.add_row(method or "unpruned", *map(str, numbers), f"{found.difference:.1e}")
        Console(width=100).print(shown)


if __name__ == "__main__":
    typer.run(main)
