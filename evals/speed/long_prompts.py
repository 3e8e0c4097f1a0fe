"""What methods save where vision makes a prompt long: ``python -m vtprune.evals.speed.long_prompts``.

A Qwen3-VL of random weights reads a video of many frames, and many images in one prompt, unpruned and under each
method: seconds of the prefill beside what the FLOPs promise, the most memory held at once, and the bytes of the cache
beside those that the accounting says.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import vtprune
from vtprune.console.output import one_line_errors
from vtprune.evals.settings import build_settings, measurable
from vtprune.evals.speed.memory import peak_bytes
from vtprune.evals.speed.overhead import Device, Dtype, Output, place_and_dtype, seconds
from vtprune.files import check_new_file, write_json
from vtprune.method.pruner import Pruner
from vtprune.method.texts import parse_keep, split_entries

METHODS = "random,visionzip,fastv,evs,frame_skip"
IMAGE, VIDEO, START, END = 151, 152, 153, 154
PATCH, MERGE, DEPTH_IN_TIME = 16, 2, 2
TEXT = 32


@dataclass(frozen=True)
class Run:
    """One way to read one prompt: median seconds of the prefill, the speed-up that its FLOPs promise, the most bytes
    held at once beyond the weights, vision tokens kept of all, and the cache's bytes, as counted and as they are."""

    prompt: str
    method: str
    seconds: float
    promised: float
    peak: int
    kept: int
    tokens: int
    counted: int
    held: int


def build_model(place: torch.device, dtype: torch.dtype, *, width: int, layers: int) -> Any:
    """A Qwen3-VL with a decoder of `layers` of `width`, and a tower of half of both; weights are random."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    depth = max(4, layers // 2)
    config = Qwen3VLConfig(
        vision_config={
            "hidden_size": width // 2, "depth": depth, "num_heads": max(1, width // 128), "patch_size": PATCH,
            "intermediate_size": 2 * width, "out_hidden_size": width, "spatial_merge_size": MERGE,
            "temporal_patch_size": DEPTH_IN_TIME, "deepstack_visual_indexes": [1, depth // 2, depth - 1],
            "num_position_embeddings": 2304,
        },
        text_config={
            "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers, "head_dim": 64,
            "num_attention_heads": width // 64, "num_key_value_heads": max(1, width // 256), "vocab_size": 160,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [12, 10, 10]},
        },
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = Qwen3VLForConditionalGeneration(config)
    return model.to(place, dtype).eval()


def a_video(frames: int, side: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A video of `frames` pictures, two of which make one frame of side x side tokens, with a question."""
    seen = frames // DEPTH_IN_TIME
    ids: list[int] = []
    for frame in range(seen):
        ids += [100 + frame % 40, START, *[VIDEO] * side**2, END]
    return _inputs("video", ids, [[seen, MERGE * side, MERGE * side]], dtype)


def many_images(count: int, side: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """`count` images of side x side tokens and a question."""
    ids: list[int] = []
    for number in range(count):
        ids += [100 + number % 40, START, *[IMAGE] * side**2, END]
    return _inputs("image", ids, [[1, MERGE * side, MERGE * side]] * count, dtype)


def _inputs(kind: str, ids: list[int], grids: list[list[int]], dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    every = torch.tensor([[*ids, *range(TEXT)]])
    sizes = torch.tensor(grids)
    patches = torch.randn(int(sizes.prod(dim=1).sum()), 3 * DEPTH_IN_TIME * PATCH**2, generator=generator, dtype=dtype)
    return {
        "input_ids": every,
        "mm_token_type_ids": (every == IMAGE).long() + 2 * (every == VIDEO),
        "pixel_values" if kind == "image" else "pixel_values_videos": patches,
        f"{kind}_grid_thw": sizes,
    }


def measure(name: str, model: Any, inputs: dict[str, Tensor], pruners: Sequence[Pruner], *, rounds: int) -> list[Run]:
    """The unpruned model and each method on one prompt, in turns."""
    ways: list[Pruner] = [vtprune.NoPruning(), *pruners]
    inputs = {key: value.to(model.device) for key, value in inputs.items()}
    taken: list[list[float]] = [[] for _ in ways]
    found: list[Any] = [None] * len(ways)
    peaks = [0] * len(ways)

    def prefill() -> Any:
        return model(**inputs, use_cache=True, logits_to_keep=1)

    with torch.inference_mode():
        for number in range(rounds):
            for place, way in enumerate(ways):
                with vtprune.wrapped(model, way):
                    spent, out = seconds(model.device, prefill)
                    taken[place].append(spent)
                    if number == 0:
                        report = vtprune.report(out.past_key_values)
                        held = sum(
                            part.numel() * part.element_size()
                            for layer in out.past_key_values.layers
                            for part in (layer.keys, layer.values)
                        )
                        found[place] = report, held
                        del out
                        peaks[place] = peak_bytes(model.device, prefill)
    runs = []
    whole = found[0][0].flops
    for way, spent_of, (report, held), peak in zip(ways, taken, found, peaks, strict=True):
        images = report.samples[0].images
        runs.append(
            Run(
                prompt=name,
                method=way.name,
                seconds=statistics.median(spent_of),
                promised=whole / report.flops,
                peak=peak,
                kept=round(sum(image.achieved_tokens for image in images)),
                tokens=sum(image.tokens for image in images),
                counted=report.kv_bytes,
                held=held,
            )
        )
    return runs


def table(runs: Sequence[Run]) -> Table:
    """The runs of one prompt."""
    plain = runs[0]
    result = Table(title=f"{plain.prompt}: {plain.tokens:,} vision tokens")
    result.add_column("method")
    for heading in ("kept", "prefill s", "speed-up", "promised", "peak MiB", "of unpruned", "cache MiB", "as counted"):
        result.add_column(heading, justify="right")
    for run in runs:
        cells = (
            run.method if run.method != "none" else "unpruned",
            f"{run.kept:,}",
            f"{run.seconds:.2f}",
            f"{plain.seconds / run.seconds:.2f}x",
            f"{run.promised:.2f}x",
            f"{run.peak / 2**20:,.0f}",
            f"{run.peak / plain.peak:.0%}",
            f"{run.held / 2**20:.1f}",
            "yes" if run.counted == run.held else f"{run.counted / 2**20:.1f}",
        )
        result.add_row(*cells)
    return result


def main(
    methods: Annotated[str, typer.Option(help="Methods, separated by commas.")] = METHODS,
    keep: Annotated[str, typer.Option(help="A fraction (0.11), a percentage or a count an image or video.")] = "0.11",
    frames: Annotated[int, typer.Option(min=2, help="Pictures of the video.")] = 64,
    images: Annotated[int, typer.Option(min=1, help="Images of the other prompt.")] = 20,
    side: Annotated[int, typer.Option(min=2, help="Vision tokens a side of a frame and of an image.")] = 14,
    width: Annotated[int, typer.Option(min=128, help="Of the decoder's hidden states, a multiple of 128.")] = 512,
    layers: Annotated[int, typer.Option(min=4, help="Of the decoder.")] = 12,
    rounds: Annotated[int, typer.Option(min=1, help="Timed prefills of each.")] = 3,
    device: Device = "cpu",
    dtype: Dtype = "",
    output: Output = None,
) -> None:
    """Time prompts with a long video and with many images, and see what they hold."""
    with one_line_errors(traceback=False):
        if output is not None:
            check_new_file(output)
        place, kind = place_and_dtype(device, dtype)
        pruners = [one.pruner() for one in build_settings(measurable(split_entries(methods)), [parse_keep(keep)])[1:]]
        model, console, found = build_model(place, kind, width=width, layers=layers), Console(width=120), []
        for name, inputs in (
            (f"a video of {frames} frames", a_video(frames, side, kind)),
            (f"{images} images", many_images(images, side, kind)),
        ):
            runs = measure(name, model, inputs, pruners, rounds=rounds)
            console.print(table(runs))
            found += [asdict(run) for run in runs]
        if output is not None:
            sizes = {"width": width, "layers": layers, "dtype": str(kind), "device": device}
            write_json(output, {"model": sizes, "methods": [one.to_dict() for one in pruners], "runs": found})


if __name__ == "__main__":
    typer.run(main)
