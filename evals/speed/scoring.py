"""What a method's own scoring costs beside a prefill: ``python -m vtprune.evals.speed.scoring --method divprune``.

A method scores random vectors of a 7B decoder's width. Its matrix products are counted against the prefill of
that decoder, and its seconds are measured beside those of a few of its layers with random weights.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from vtprune.cost.sizes import TransformerCost
from vtprune.errors import VTPruneError
from vtprune.method.answers import EncoderSelection
from vtprune.method.facts import ModelFacts, Work
from vtprune.method.plan import Plan
from vtprune.method.pruner import Pruner
from vtprune.method.resolving import resolve
from vtprune.method.stages import BeforeDecoder, BetweenLayers, InEncoder, drop_layers, encoder_layers
from vtprune.method.texts import parse_method
from vtprune.method.views import EncoderLayer, LayerSignals, VisionStream

# The decoder of Llama-7B, and the tower of CLIP ViT-L/14 up to the layer that feeds it.
DECODER = TransformerCost(
    width=4096, heads=32, query_width=4096, kv_width=4096, mlp_width=11008, mlp_matrices=3, layers=32
)  # fmt: skip
ENCODER_HEADS, ENCODER_WIDTH, ENCODER_DEPTH = 16, 1024, 23
TEXT = 64
PATCH = 14
# What scoring may take of the prefill's FLOPs, and of the seconds of the layers that are timed.
FLOPS_TARGET, SECONDS_TARGET = 0.02, 0.05


@dataclass(frozen=True)
class Cost:
    """What one method's scoring costs for one image of `tokens`, `kept` of which stay.

    flops, prefill_flops: of the scoring, and of the unpruned prefill of the whole decoder; seconds: of the
    scoring; layer_seconds: of the unpruned prefill of the decoder layers that were timed.
    """

    tokens: int
    kept: int
    flops: int
    prefill_flops: int
    seconds: float
    layer_seconds: float

    @property
    def flops_share(self) -> float:
        """FLOPs of the scoring over those of the prefill."""
        return self.flops / self.prefill_flops

    @property
    def seconds_share(self) -> float:
        """Seconds of the scoring over those of the layers that were timed."""
        return self.seconds / self.layer_seconds


def grid_of(tokens: int) -> tuple[int, int, int]:
    """(1, h, w) with h * w == tokens, as square as that allows."""
    height = next(h for h in range(int(tokens**0.5), 0, -1) if tokens % h == 0)
    return 1, height, tokens // height


def random_signals(tokens: int, generator: torch.Generator) -> LayerSignals:
    """q, k and v of a CLIP layer with a CLS token."""
    width = ENCODER_WIDTH // ENCODER_HEADS
    query, key, value = torch.randn(3, ENCODER_HEADS, 1 + tokens, width, generator=generator)
    return LayerSignals(query, key, value, scale=width**-0.5, prefix=1, group=1)


def random_stream(tokens: int, budget: int) -> VisionStream:
    """An image of random vectors, pixels and attention, with a question of random embeddings."""
    generator = torch.Generator().manual_seed(0)
    grid = grid_of(tokens)
    signals = random_signals(tokens, generator)
    picture = torch.rand(1, 3, PATCH * grid[1], PATCH * grid[2], generator=generator)
    return VisionStream(
        features=torch.randn(tokens, DECODER.width, generator=generator),
        grid=grid,
        indices=torch.arange(tokens),
        total=tokens,
        budget=budget,
        signals=signals,
        pixels=picture[0],
        text=torch.randn(TEXT, DECODER.width, generator=generator),
        last_signals=signals,
        picture=picture,
    )


def random_layer(stream: VisionStream, index: int, budget: int, memory: dict[str, Tensor]) -> EncoderLayer:
    """One encoder layer of the stream's image, whole."""
    signals = stream.signals
    assert signals is not None
    return EncoderLayer(
        query=signals.query[None], key=signals.key[None], value=signals.value[None],
        valid=torch.ones(1, stream.total, dtype=torch.bool), total=torch.tensor([stream.total]),
        budget=torch.tensor([budget]), index=index, depth=ENCODER_DEPTH, scale=signals.scale,
        prefix=signals.prefix, group=signals.group, memory=memory, sizes=torch.ones(1, stream.total),
        grids=(stream.grid,), hidden=torch.randn(1, 1 + stream.total, ENCODER_WIDTH),
    )  # fmt: skip


def shortened(layer: EncoderLayer, tokens: int) -> EncoderLayer:
    """The layer with its first `tokens` tokens."""
    end = layer.prefix + tokens * layer.group
    assert layer.hidden is not None
    return replace(
        layer, query=layer.query[:, :, :end], key=layer.key[:, :, :end], value=layer.value[:, :, :end],
        valid=layer.valid[:, :tokens], sizes=layer.sizes[:, :tokens], hidden=layer.hidden[:, :end],
    )  # fmt: skip


def check_stage(pruner: Pruner) -> None:
    """Raises VTPruneError for a method that does nothing before the decoder."""
    if not isinstance(pruner, InEncoder | BeforeDecoder):
        raise VTPruneError(f"{pruner.name} does not act before the decoder; only methods that do are timed")


def pruner_of(text: str, keep: int) -> Pruner:
    """The method of "name" or "name:option=value"."""
    parse_method(text)
    facts = ModelFacts(True, ENCODER_DEPTH, DECODER.layers, 1)
    return resolve(text, keep=keep)[0].bind(facts)


def entering(plan: Plan) -> int:
    """Tokens that enter the decoder, all of them where the method decides."""
    found = plan.entering(0)
    return plan.in_encoder(0) if found is None else min(found, plan.in_encoder(0))


def scoring_run(pruner: Pruner, tokens: int) -> Callable[[], None]:
    """Runs all that `pruner` does to an image of `tokens` before the decoder; an encoder layer is shown as many tokens
    as the method left before it. Raises VTPruneError for a method that does nothing there."""
    check_stage(pruner)
    plan = Plan((pruner,), tokens)
    stream = random_stream(tokens, entering(plan))
    memory: dict[str, Tensor] = {}
    encoder = [random_layer(stream, index, plan.in_encoder(0), memory) for index in encoder_layers(pruner)]

    def run() -> None:
        memory.clear()
        alive = tokens
        for layer in encoder:
            assert isinstance(pruner, InEncoder)
            answer = pruner.prune_encoder(shortened(layer, alive))
            keep = answer.keep if isinstance(answer, EncoderSelection) else answer
            alive = alive if keep is None else int(keep.sum())
            memory.update({name: values[:, :alive] for name, values in memory.items() if values.ndim > 1})
        if isinstance(pruner, BeforeDecoder):
            memory_of = pruner.remember(stream) if isinstance(pruner, BetweenLayers) else {}
            pruner.select(replace(stream, memory=memory_of))

    return run


def scoring_work(pruner: Pruner, tokens: int) -> Work:
    """The sizes of the same image, for the count."""
    return Work(
        patches=tokens, tokens=tokens, shown=tokens, kept=entering(Plan((pruner,), tokens)),
        encoder_width=ENCODER_WIDTH, encoder_heads=ENCODER_HEADS, decoder_width=DECODER.width,
        decoder_heads=DECODER.heads, prompt=tokens + TEXT, text=TEXT, encoder_patches=(tokens,) * ENCODER_DEPTH,
        encoder_layers=encoder_layers(pruner), decoder_layers=drop_layers(pruner),
        text_after=TEXT, decoder_kv_width=DECODER.kv_width,
    )  # fmt: skip


def build_layers(layers: int) -> Any:
    """Decoder layers of a 7B model with random weights, in fp32."""
    config = LlamaConfig(
        vocab_size=8, hidden_size=DECODER.width, intermediate_size=DECODER.mlp_width, num_hidden_layers=layers,
        num_attention_heads=DECODER.heads, num_key_value_heads=DECODER.heads, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    kind: Any = LlamaModel
    return kind._from_config(config, attn_implementation="sdpa", dtype=torch.float32).eval()


@torch.inference_mode()
def seconds(run: Callable[[], Any], repeats: int) -> float:
    """The median over `repeats` runs, after one to warm up."""
    taken = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def prefill_seconds(model: Any, tokens: int) -> float:
    """The unpruned prefill of an image of `tokens` and its question, after one to warm up."""
    prompt = torch.randn(1, tokens + TEXT, DECODER.width)
    return seconds(lambda: model(inputs_embeds=prompt, use_cache=False), 1)


def measure(pruner: Pruner, tokens: int, layer_seconds: float, repeats: int = 3) -> Cost:
    """Counts and times the scoring of one image of `tokens`; layer_seconds: as in `Cost`.

    Raises VTPruneError for a method that does nothing before the decoder.
    """
    run, work = scoring_run(pruner, tokens), scoring_work(pruner, tokens)
    return Cost(
        tokens=tokens,
        kept=work.kept,
        flops=pruner.flops(work),
        prefill_flops=2 * DECODER.layers * DECODER.layer_macs((work.prompt,)),
        seconds=seconds(run, repeats),
        layer_seconds=layer_seconds,
    )


def table(name: str, layers: int, costs: list[Cost]) -> Table:
    """One line an image size, the targets in the headings."""
    shown = Table(title=f"{name}, beside a decoder of width {DECODER.width}, {torch.get_num_threads()} threads")
    headings = (
        "tokens", "kept", "GFLOPs", f"of a {DECODER.layers}-layer prefill (target {FLOPS_TARGET:.0%})", "ms",
        f"{layers}-layer prefill ms", f"of it (target {SECONDS_TARGET:.0%})",
    )  # fmt: skip
    for heading in headings:
        shown.add_column(heading, justify="right")
    for cost in costs:
        counted = f"{cost.flops / 1e9:.2f}", f"{cost.flops_share:.3%}"
        timed = f"{1e3 * cost.seconds:.1f}", f"{1e3 * cost.layer_seconds:.0f}", f"{cost.seconds_share:.2%}"
        shown.add_row(str(cost.tokens), str(cost.kept), *counted, *timed)
    return shown


def numbers(text: str, option: str) -> list[int]:
    """The counts in "576,2880" or "64/320"; raises BadParameter for anything else."""
    parts = text.replace("/", ",").split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise typer.BadParameter(f"{option} takes counts such as 576,2880, got {text!r}")
    return [int(part) for part in parts]


def main(
    method: Annotated[list[str], typer.Option(help="As name or name:option=value; give it again for more.")],
    tokens: Annotated[str, typer.Option(help="Vision tokens of the images, separated by commas.")] = "576,2880",
    keep: Annotated[str, typer.Option(help="Tokens to keep of each, separated by slashes.")] = "64/320",
    layers: Annotated[int, typer.Option(min=1, help="Decoder layers to time.")] = 4,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of the scoring.")] = 3,
) -> None:
    """Count and time what methods add to a prefill of a 7B decoder, on the CPU in float32."""
    sizes, kept = numbers(tokens, "--tokens"), numbers(keep, "--keep")
    if len(kept) != len(sizes):
        raise typer.BadParameter(f"{len(sizes)} sizes need as many counts to keep, got {len(kept)}")
    try:
        pruners = {text: [pruner_of(text, count) for count in kept] for text in method}
        for pruner in (one for given in pruners.values() for one in given[:1]):
            check_stage(pruner)
        model = build_layers(layers)
        prefills = [prefill_seconds(model, size) for size in sizes]
        for text, given in pruners.items():
            costs = [measure(*each, repeats) for each in zip(given, sizes, prefills, strict=True)]
            Console(width=140).print(table(text, layers, costs))
    except VTPruneError as error:
        raise typer.BadParameter(str(error)) from error


if __name__ == "__main__":
    typer.run(main)
