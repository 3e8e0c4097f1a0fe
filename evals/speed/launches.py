"""What a method adds in launches and waits, counted exactly: ``python -m vtprune.evals.speed.launches``.

A launch is an operation that computes something (a view computes nothing); a read-back is one whose answer Python
needs before it can go on, for which an accelerator's queue has to run dry. Both are the same on every machine. The
models are as deep as the published ones, with 576 vision tokens an image, and as narrow as can be.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

import vtprune
from vtprune import adapters
from vtprune.cache.adopting import cache_in, with_cache
from vtprune.console.output import one_line_errors
from vtprune.evals.settings import measurable
from vtprune.files import check_new_file, write_json
from vtprune.method.texts import split_entries

SIDE, TEXT, VOCABULARY, IMAGE = 24, 64, 128, 120
# A video's placeholder, its frames, and the tokens a side of each.
VIDEO, FRAMES, FRAME_SIDE = IMAGE + 3, 16, 6
KEEP = 0.25
# Methods that are counted at the setting that they have by themselves.
OWN_SETTING = ("none", "pmod", "gamma_mod", "mue", "random_ltd", "d2o")
# Lines of code that a detailed table shows for their launches.
PLACES = 12
# Where the models' code lies, and vtprune's own.
TRANSFORMERS = str(Path(transformers.__path__[0]))
FOLDERS = {name: str(Path(part.__path__[0])) for name, part in (("vtprune", vtprune), ("adapters", adapters))}
# Operations whose answer, or the size of whose answer, Python has to know.
ANSWERS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal")
# What computes nothing though its schema does not say so.
VIEWS = (
    "_unsafe_view", "lift_fresh", "detach", "alias", "promote_types", "empty", "empty_like", "new_empty",
    "empty_strided", "new_empty_strided",
)  # fmt: skip
# Marks a tensor that was fetched, and what was computed of it: the device is no longer asked for it.
FETCHED = "_vtprune_fetched"


@dataclass
class Counts:
    """launches, reads: how many, by operation and by the place in vtprune's code that asked for it ("" for the model's
    own)."""

    launches: Counter[tuple[str, str]] = field(default_factory=Counter)
    reads: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def launched(self) -> int:
        """All launches."""
        return self.launches.total()

    @property
    def read(self) -> int:
        """All read-backs."""
        return self.reads.total()


class _Launches(TorchDispatchMode):
    """Counts operations that are no views, and those that Python waits for."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self._counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if args and _is_fetched(args[0]):
            return tree_map_only(Tensor, _fetched, func(*args, **(kwargs or {})))
        if not func.is_view and name not in VIEWS:
            self._counts.launches[name, place_in_code()] += 1
        if name in ANSWERS or (name == "repeat_interleave" and (kwargs or {}).get("output_size") is None):
            self._counts.reads[name, place_in_code()] += 1
        elif name in ("index", "index_put", "index_put_"):
            masks = sum(isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8) for one in args[1])
            if masks:
                self._counts.reads["index by a mask", place_in_code()] += masks
        return func(*args, **(kwargs or {}))


class _Lists(TorchFunctionMode):
    """Counts what the dispatcher does not see: tensors made into lists, or fetched. What is fetched is copied and
    marked, since on this machine the device is the host."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self._counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and _is_fetched(args[0]):
            return _copied(args[0]) if func is Tensor.to else func(*args, **(kwargs or {}))
        if func in (Tensor.tolist, Tensor.cpu):
            self._counts.reads[func.__name__, place_in_code()] += 1
        return _fetched(_copied(args[0])) if func is Tensor.cpu else func(*args, **(kwargs or {}))


def _copied(tensor: Tensor) -> Tensor:
    with _disable_current_modes():
        return tensor.clone()


def _fetched(tensor: Tensor) -> Tensor:
    setattr(tensor, FETCHED, True)
    return tensor


def _is_fetched(value: Any) -> bool:
    return isinstance(value, Tensor) and hasattr(value, FETCHED)


def place_in_code() -> str:
    """The innermost line of vtprune's own code that is being run, "" for what the model itself does."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(TRANSFORMERS):
            return ""
        for name, folder in FOLDERS.items():
            if file.startswith(folder) and file != __file__:
                return f"{name}{file.removeprefix(folder)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


@contextmanager
def counting() -> Iterator[Counts]:
    """The launches and read-backs of the block."""
    counts = Counts()
    with _Lists(counts), _Launches(counts):
        yield counts


def llava(layers: tuple[int, int] = (24, 32)) -> Any:
    """LLaVA-1.5's shape: layers of tower and decoder; random weights, tiny widths."""
    config = LlavaConfig(
        vision_config={
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": layers[0], "num_attention_heads": 2,
            "image_size": 14 * SIDE, "patch_size": 14,
        },
        text_config={"model_type": "llama", **_decoder(layers[1])},
        image_token_index=IMAGE,
    )  # fmt: skip
    return _made(LlavaForConditionalGeneration, config)


def qwen(layers: tuple[int, int] = (32, 28)) -> Any:
    """Qwen2.5-VL's shape, with windows in all but every eighth block."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    config = Qwen2_5_VLConfig(
        vision_config={
            "hidden_size": 16, "intermediate_size": 16, "out_hidden_size": 16, "depth": layers[0], "num_heads": 2,
            "window_size": 112, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "fullatt_block_indexes": list(range(layers[0] - 1, 0, -8)),
        },
        text_config={**_decoder(layers[1]), "rope_parameters": rope},
        image_token_id=IMAGE, vision_start_token_id=IMAGE + 1, vision_end_token_id=IMAGE + 2, video_token_id=VIDEO,
    )  # fmt: skip
    return _made(Qwen2_5_VLForConditionalGeneration, config)


def qwen3(layers: tuple[int, int] = (24, 28)) -> Any:
    """Qwen3-VL-2B's shape, with three planes."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 5e6}
    config = Qwen3VLConfig(
        vision_config={
            "hidden_size": 16, "intermediate_size": 16, "out_hidden_size": 16, "depth": layers[0], "num_heads": 2,
            "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 64,
            "deepstack_visual_indexes": [layers[0] * part // 4 - 1 for part in (1, 2, 3)],
        },
        text_config={**_decoder(layers[1]), "head_dim": 8, "rope_parameters": rope},
        image_token_id=IMAGE, vision_start_token_id=IMAGE + 1, vision_end_token_id=IMAGE + 2, video_token_id=VIDEO,
    )  # fmt: skip
    return _made(Qwen3VLForConditionalGeneration, config)


def _decoder(layers: int) -> dict[str, Any]:
    return {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": VOCABULARY, "pad_token_id": 0, "max_position_embeddings": 4096,
    }  # fmt: skip


def _made(kind: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return kind._from_config(config, attn_implementation="sdpa", dtype=torch.float32).eval()


def inputs_of(model: Any, batch: int, *, video: bool = False) -> dict[str, Tensor]:
    """`batch` rows of one image each, or of one video with as many tokens; of several rows each has one token of text
    less than the one before it."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, IMAGE, (batch, TEXT), generator=generator)
    mask = (torch.arange(TEXT) >= torch.arange(batch)[:, None]).long()
    picture = torch.full((batch, SIDE * SIDE), VIDEO if video else IMAGE)
    middle = TEXT // 2
    ids = torch.cat([ids[:, :middle].masked_fill(mask[:, :middle] == 0, 0), picture, ids[:, middle:]], dim=1)
    mask = torch.cat([mask[:, :middle], torch.ones_like(picture), mask[:, middle:]], dim=1)
    found = {"input_ids": ids, "attention_mask": mask}
    if hasattr(model.config, "vision_start_token_id"):
        pixels = torch.randn(4 * SIDE * SIDE * batch, 3 * 2 * 14 * 14, generator=generator)
        frames, side = (FRAMES, FRAME_SIDE) if video else (1, SIDE)
        found["pixel_values_videos" if video else "pixel_values"] = pixels
        found["video_grid_thw" if video else "image_grid_thw"] = torch.tensor([[frames, 2 * side, 2 * side]] * batch)
        found["mm_token_type_ids"] = (ids == IMAGE).long() + 2 * (ids == VIDEO)
    else:
        found["pixel_values"] = torch.randn(batch, 3, 14 * SIDE, 14 * SIDE, generator=generator)
    return found


@dataclass(frozen=True)
class Steps:
    """The counts of a prefill, of the decode step after it, and of the one after that."""

    prefill: Counts
    first: Counts
    later: Counts

    def to_dict(self) -> dict[str, Any]:
        """Launches and read-backs of each as plain JSON."""
        parts = {"prefill": self.prefill, "first_step": self.first, "later_step": self.later}
        return {name: {"launches": one.launched, "read_backs": one.read} for name, one in parts.items()}


@torch.no_grad()
def count(model: Any, inputs: dict[str, Tensor]) -> Steps:
    """A prompt is read, and two tokens after it."""
    with counting() as prefill:
        out = model(**inputs, use_cache=True, logits_to_keep=1)
    steps = []
    mask = inputs["attention_mask"]
    for _ in range(2):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        token = {"input_ids": torch.full_like(mask[:, :1], 5), "attention_mask": mask}
        if "mm_token_type_ids" in inputs:
            # Which positions these are does not change how many operations turn keys by them.
            token["position_ids"] = mask.sum(dim=1, keepdim=True).expand(3, -1, -1)
        given = with_cache(model.forward, token, cache_in(out))
        with counting() as step:
            out = model(**given, use_cache=True, logits_to_keep=1)
        steps.append(step)
    return Steps(prefill, *steps)


MODELS: dict[str, Callable[[], Any]] = {"llava": llava, "qwen": qwen, "qwen3": qwen3, "video": qwen}


@torch.inference_mode()
def _warm_up(model: Any, inputs: dict[str, Tensor]) -> None:
    """Reads a prompt, so that what is made once for images of one size is made."""
    model(**inputs, use_cache=True, logits_to_keep=1)


def count_all(kind: str, batch: int, methods: list[str]) -> dict[str, Steps]:
    """The counts of the unpruned model, under "", and of each method, at 25% where it has no setting of its own that
    is for other depths."""
    model = MODELS[kind]()
    inputs = inputs_of(model, batch, video=kind == "video")
    _warm_up(model, inputs)
    found = {"": count(model, inputs)}
    with vtprune.wrapped(model, "none"):
        _warm_up(model, inputs)
    for method in methods:
        given: dict[str, Any] = {} if ":" in method or method in OWN_SETTING else {"keep": KEEP}
        with vtprune.wrapped(model, method, **given):
            found[method] = count(model, inputs)
    return found


def table(kind: str, batch: int, counts: dict[str, Steps]) -> Table:
    """One line a method, beside the unpruned model."""
    shown = Table(title=f"{kind}, batch {batch}: launches (ratio) and read-backs")
    shown.add_column("method")
    for heading in ("prefill", "read-backs", "first step", "read-backs", "later step", "read-backs"):
        shown.add_column(heading, justify="right")
    plain = counts[""]
    for method, own in counts.items():
        pairs = zip((own.prefill, own.first, own.later), (plain.prefill, plain.first, plain.later), strict=True)
        cells = [
            cell
            for one, base in pairs
            for cell in (f"{one.launched} ({one.launched / base.launched:.2f})", str(one.read))
        ]
        shown.add_row(method or "unpruned", *cells)
    return shown


def places(method: str, counts: Counts) -> Table:
    """The places in vtprune's code that launch most in a prefill, and all that read back."""
    shown = Table("where", "launches", "read-backs", title=f"{method}: a prefill")
    launches, reads = (Counter[str]() for _ in range(2))
    for found, total in ((counts.launches, launches), (counts.reads, reads)):
        for (_, place), number in found.items():
            total[place] += number
    most = {place for place, _ in launches.most_common(PLACES)} | set(reads)
    for place in sorted(most, key=lambda one: -launches[one]):
        shown.add_row(place or "the model", str(launches[place]), str(reads[place] or ""))
    return shown


def main(
    methods: Annotated[str, typer.Option(help="Methods, separated by commas; all that ship by default.")] = "",
    model: Annotated[str, typer.Option(help="llava, qwen (Qwen2.5-VL), qwen3, or video (the second one).")] = "llava",
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    detail: Annotated[bool, typer.Option("--detail", help="Also where in the code they are.")] = False,
    output: Annotated[Path | None, typer.Option(help="A JSON file for the counts.")] = None,
) -> None:
    """Count the launches and read-backs of methods beside the unpruned model's."""
    with one_line_errors(traceback=False):
        if output is not None:
            check_new_file(output)
        if model not in MODELS:
            raise vtprune.VTPruneError(f"model is one of {', '.join(MODELS)}, got {model!r}")
        chosen = measurable(split_entries(methods), videos=model == "video")
        counts = count_all(model, batch, chosen)
        console = Console(width=140)
        console.print(table(model, batch, counts))
        for method, steps in counts.items() if detail else ():
            console.print(places(method or "unpruned", steps.prefill))
        if output is not None:
            write_json(output, {method or "unpruned": steps.to_dict() for method, steps in counts.items()})


if __name__ == "__main__":
    typer.run(main)
