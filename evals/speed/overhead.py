"""What wrapping costs and what pruning saves, in seconds: ``python -m vtprune.evals.speed.overhead``.

A LLaVA of random weights with 576 vision tokens runs unwrapped and wrapped in turns, so that what slows the
machine down for a while slows both; each pair gives one ratio, and the medians of the ratios are printed.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import vtprune
from vtprune.cache.adopting import with_cache
from vtprune.console.output import one_line_errors
from vtprune.files import check_new_file, write_json

# At keep=1.0 the wrapper may add this share of the prefill time; pruning is to deliver that share of the
# speed-up that the FLOPs promise.
OVERHEAD_TARGET = 0.03
DELIVERED_TARGET = 0.8


@dataclass(frozen=True)
class ModelSize:
    """Sizes of the LLaVA that is built: layers and widths of tower and decoder, pixels and tokens; head: width of the
    decoder's heads."""

    vision_width: int
    vision_layers: int
    width: int
    layers: int
    mlp_width: int
    vocabulary: int
    image_size: int = 336
    patch_size: int = 14
    text_tokens: int = 64
    head: int = 64

    @property
    def image_tokens(self) -> int:
        """Vision tokens of one image."""
        return (self.image_size // self.patch_size) ** 2


class Size(StrEnum):
    """The models that the command line offers."""

    base = "base"
    small = "small"
    full = "full"


# base has 269 million parameters, and the decoder is 89% of its prefill FLOPs; full is LLaVA-1.5-7B's shape, for an
# accelerator.
SIZES = {
    Size.full: ModelSize(
        vision_width=1024, vision_layers=24, width=4096, layers=32, mlp_width=11008, vocabulary=32064, head=128
    ),
    Size.base: ModelSize(vision_width=384, vision_layers=12, width=1024, layers=14, mlp_width=2816, vocabulary=32000),
    Size.small: ModelSize(vision_width=192, vision_layers=6, width=384, layers=8, mlp_width=1024, vocabulary=4000),
}


@dataclass(frozen=True)
class Pairs:
    """Seconds of the unwrapped and the wrapped model, measured in turns."""

    plain: list[float]
    wrapped: list[float]

    @property
    def ratios(self) -> list[float]:
        """Seconds wrapped / seconds unwrapped, one a pair."""
        return [w / p for p, w in zip(self.plain, self.wrapped, strict=True)]

    @property
    def ratio(self) -> float:
        """The median of `ratios`."""
        return statistics.median(self.ratios)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and third quartile of `ratios`; the only value twice for one pair."""
        if len(self.ratios) == 1:
            return self.ratios[0], self.ratios[0]
        first, _, third = statistics.quantiles(self.ratios, n=4, method="inclusive")
        return first, third

    def to_dict(self) -> dict[str, Any]:
        """The seconds and their summary as plain JSON."""
        return {**asdict(self), "ratios": self.ratios, "ratio": self.ratio, "quartiles": list(self.quartiles)}


@dataclass(frozen=True)
class Measurement:
    """One setting of the pruner against the unwrapped model.

    keep: as asked; prefill, decode: seconds of a prefill and of one decode step; promised: the speed-up of
    the prefill by FLOPs, scoring included.
    """

    keep: int | float
    prefill: Pairs
    decode: Pairs
    promised: float

    @property
    def speedup(self) -> float:
        """Median of seconds unwrapped / seconds wrapped, for the prefill."""
        return statistics.median(1 / ratio for ratio in self.prefill.ratios)

    @property
    def delivered(self) -> float:
        """The measured speed-up as a share of the promised one."""
        return self.speedup / self.promised

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON."""
        return {
            "keep": self.keep,
            "prefill": self.prefill.to_dict(),
            "decode": self.decode.to_dict(),
            "speedup": self.speedup,
            "promised": self.promised,
            "delivered": self.delivered,
        }


def build_model(
    size: ModelSize, device: torch.device, dtype: torch.dtype, *, attention: str = "sdpa"
) -> LlavaForConditionalGeneration:
    """A LLaVA of random weights; attention: the implementation that transformers is to use."""
    vision = CLIPVisionConfig(
        hidden_size=size.vision_width,
        intermediate_size=4 * size.vision_width,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=max(1, size.vision_width // 64),
        image_size=size.image_size,
        patch_size=size.patch_size,
    )
    heads = max(1, size.width // size.head)
    text = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.mlp_width,
        num_hidden_layers=size.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=size.vocabulary - 1)
    torch.manual_seed(0)
    with device:
        model = LlavaForConditionalGeneration._from_config(config, attn_implementation=attention, dtype=dtype)
    return model.eval()


def build_inputs(
    size: ModelSize, device: torch.device, dtype: torch.dtype, images: int = 1, *, batch: int = 1
) -> dict[str, Tensor]:
    """Prompts of one length, `batch` of them: a few words, images of noise with a word after each, and the rest of the
    words."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, size.vocabulary - 1, (batch, size.text_tokens), generator=generator)
    image = torch.full((size.image_tokens,), size.vocabulary - 1)
    pixels = torch.randn(batch * images, 3, size.image_size, size.image_size, generator=generator)
    ids = []
    for text in rows:
        parts = [part for place in range(4, 4 + images) for part in (image, text[place : place + 1])]
        ids.append(torch.cat([text[:4], *parts, text[4 + images :]]))
    return {"input_ids": torch.stack(ids).to(device), "pixel_values": pixels.to(device, dtype)}


def seconds(device: torch.device, run: Callable[[], Any]) -> tuple[float, Any]:
    """How long `run` takes, the device's queue included, and what it returns."""
    _synchronise(device)
    start = time.perf_counter()
    result = run()
    _synchronise(device)
    return time.perf_counter() - start, result


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run_once(model: Any, inputs: dict[str, Tensor], steps: int) -> tuple[float, float]:
    """Seconds of one prefill, and the median seconds of a decode step after it."""
    device = model.device
    prefill, out = seconds(device, partial(model, **inputs, use_cache=True, logits_to_keep=1))
    cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
    decode = []
    for _ in range(steps):
        step = partial(model, **with_cache(model.forward, {"input_ids": token, "use_cache": True}, cache))
        taken, out = seconds(device, step)
        token = out.logits[:, -1:].argmax(-1)
        decode.append(taken)
    return prefill, statistics.median(decode)


@torch.inference_mode()
def measure(
    model: Any,
    inputs: dict[str, Tensor],
    method: str | None,
    keep: int | float,
    *,
    pairs: int = 7,
    steps: int = 8,
) -> Measurement:
    """Times `pairs` pairs of the unwrapped and the wrapped model in turns, after a warm-up of both.

    method: a registry name, or None to compare the unwrapped model with itself (how noisy the machine is);
    keep: as in `vtprune.wrap`; steps: decode steps after each prefill.
    Raises VTPruneError for what `vtprune.wrap` refuses.
    """

    def pruned() -> Any:
        return nullcontext() if method is None else vtprune.wrapped(model, method, keep=keep)

    promised = 1.0
    run_once(model, inputs, steps)
    with pruned():
        # The promise is the prefill's own, so it is read before any decode step.
        model(**inputs, use_cache=True, logits_to_keep=1)
        if method is not None:
            report = vtprune.report(model)
            promised = report.flops_full / report.flops
        run_once(model, inputs, steps)
    plain, wrapped = [], []
    for _ in range(pairs):
        plain.append(run_once(model, inputs, steps))
        with pruned():
            wrapped.append(run_once(model, inputs, steps))
    prefill, decode = (Pairs([p[i] for p in plain], [w[i] for w in wrapped]) for i in (0, 1))
    return Measurement(keep, prefill, decode, promised)


def table(noise: Measurement, whole: Measurement, pruned: Measurement) -> Table:
    """Median milliseconds and paired ratios of every comparison, the unwrapped model with itself first."""
    shown = Table(title=f"medians of {len(whole.prefill.plain)} pairs")
    for heading in ("", "unwrapped ms", "wrapped ms", "ratio", "quartiles"):
        shown.add_column(heading, justify="right" if heading else "left", no_wrap=True)

    def add(name: str, pairs: Pairs) -> None:
        plain, wrapped = (f"{1e3 * statistics.median(values):.2f}" for values in (pairs.plain, pairs.wrapped))
        low, high = pairs.quartiles
        ratios = f"{pairs.ratio:.3f}", f"{low:.3f} to {high:.3f}"
        shown.add_row(name, plain, wrapped, *ratios)

    add("prefill, never wrapped", noise.prefill)
    add("prefill, keep=1.0", whole.prefill)
    add(f"prefill, keep={pruned.keep}", pruned.prefill)
    add("decode, never wrapped", noise.decode)
    add("decode, keep=1.0", whole.decode)
    add(f"decode, keep={pruned.keep}", pruned.decode)
    return shown


def verdicts(whole: Measurement, pruned: Measurement) -> str:
    """The two figures that have a target, beside it."""
    overhead = whole.prefill.ratio - 1
    return (
        f"the wrapper adds {overhead:+.1%} to the prefill (target: at most {OVERHEAD_TARGET:.0%})\n"
        f"keep={pruned.keep} is {pruned.speedup:.2f}x as fast of {pruned.promised:.2f}x by FLOPs: "
        f"{pruned.delivered:.2f} of the promise (target: at least {DELIVERED_TARGET:.2f})"
    )


def place_and_dtype(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """The device and dtype that the command line names."""
    place = torch.device(device)
    kind = getattr(torch, dtype or ("float32" if place.type == "cpu" else "bfloat16"), None)
    if not isinstance(kind, torch.dtype):
        raise typer.BadParameter(f"{dtype!r} is no torch dtype; try float32, bfloat16 or float16")
    return place, kind


def facts_of(model: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """What the seconds depend on: sizes, machine, dtype, threads."""
    vision = int((inputs["input_ids"] == model.config.image_token_id).sum())
    cuda = model.device.type == "cuda"
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "vision_tokens": vision,
        "text_tokens": inputs["input_ids"].numel() - vision,
        "rows": len(inputs["input_ids"]),
        "attention": model.config._attn_implementation,
        "device": torch.cuda.get_device_name(model.device) if cuda else platform.machine(),
        "dtype": str(model.dtype),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


Steps = Annotated[int, typer.Option(min=1, help="Decode steps after each prefill.")]
Device = Annotated[str, typer.Option(help="Torch device.")]
Sized = Annotated[Size, typer.Option(help="base: 269M parameters; small: a quick look; full: 7B.")]
Dtype = Annotated[str, typer.Option(help="Torch dtype; default float32 on cpu, else bfloat16.")]
Output = Annotated[Path | None, typer.Option(help="JSON file for all that was measured.")]


def main(
    method: Annotated[str, typer.Option(help="Registry name of the pruner.")] = "fopru",
    keep: Annotated[int, typer.Option(min=1, help="Vision tokens to keep per image.")] = 64,
    pairs: Annotated[int, typer.Option(min=1, help="Timed pairs of unwrapped and wrapped runs.")] = 7,
    steps: Steps = 8,
    device: Device = "cpu",
    size: Sized = Size.base,
    dtype: Dtype = "",
    output: Output = None,
) -> None:
    """Measure what the wrapper costs at keep=1.0 and how much of the promised speed-up pruning delivers."""
    if output is not None:
        with one_line_errors(traceback=False):
            check_new_file(output)
    place, kind = place_and_dtype(device, dtype)
    model, inputs = build_model(SIZES[size], place, kind), build_inputs(SIZES[size], place, kind)
    console, facts = Console(), {"method": method, **facts_of(model, inputs)}
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()))
    noise = measure(model, inputs, None, 1.0, pairs=pairs, steps=steps)
    whole = measure(model, inputs, method, 1.0, pairs=pairs, steps=steps)
    pruned = measure(model, inputs, method, keep, pairs=pairs, steps=steps)
    console.print(table(noise, whole, pruned), verdicts(whole, pruned), sep="\n")
    if output is not None:
        settings = {"noise": noise.to_dict(), "whole": whole.to_dict(), "pruned": pruned.to_dict()}
        write_json(output, {**facts, **settings})


if __name__ == "__main__":
    typer.run(main)
