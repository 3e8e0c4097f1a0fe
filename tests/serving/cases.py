"""What is asked of an engine, and what transformers and `vtprune.wrap` answer to the same."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

import vtprune
from tests.checkpoint import qwen_processor
from vtprune.method.views import LayerSignals

ASSETS = Path(__file__).parents[2] / "assets"
LLAVA = ASSETS / "tiny-llava"
KEEP = 36
# Every method that is served, with the keep that the requests ask for.
METHODS = (
    "none", "random", "grid", "pool", "divprune", "fopru", "holov", "cdpruner", "visionzip", "vispruner",
)  # fmt: skip
STEPS = 8
# How often `unsteady` tries, with more noise each time.
NOISES = 12
# Of the folder that `write_covipal` writes.
COVIPAL: dict[str, Any] = {"keep": KEEP, "width": 32, "heads": 2, "blocks": 1}


def asked(name: str, keep: int = KEEP, **options: Any) -> dict[str, Any]:
    """A method as a request names it."""
    return {"method": name} if name == "none" else {"method": name, "keep": keep, **options}


def write_pictures(folder: Path, count: int) -> list[dict[str, Any]]:
    """The example and every so many of the bundled questions, each with the path of its picture."""
    rows = pq.read_table(ASSETS / "shapes_eval.parquet").to_pylist()
    # Scaled here, as the two environments' torchvision scale unlike each other.
    example = folder / "example.png"
    Image.open(ASSETS / "example.png").convert("RGB").resize((96, 96), Image.Resampling.BICUBIC).save(example)
    found = [{"question": "what is written on the yellow square?", "picture": str(example)}]
    for number, row in enumerate(rows[:: len(rows) // count][: count - 1]):
        path = folder / f"{number}.png"
        Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB").save(path)
        found.append({"question": row["question"], "picture": str(path)})
    return found


def llava_prompt(question: str, images: int = 1) -> str:
    """A turn of the bundled model's chat."""
    return f"<s><|user|>{'<image>' * images}{question}<|assistant|>"


def llava_requests(rows: Iterable[dict[str, Any]], method: dict[str, Any]) -> list[dict[str, Any]]:
    """A request with one picture each."""
    return [{"prompt": llava_prompt(row["question"]), "images": [row["picture"]], "method": method} for row in rows]


def llava_pairs(rows: list[dict[str, Any]], method: dict[str, Any]) -> list[dict[str, Any]]:
    """Requests with two adjacent pictures; the first and the last have one in common."""
    return [
        {
            "prompt": llava_prompt(rows[first]["question"], images=2),
            "images": [rows[first]["picture"], rows[second]["picture"]],
            "method": method,
        }
        for first, second in ((0, 1), (2, 3), (4, 5), (0, 5))
    ]


def qwen_requests(folder: Path, method: dict[str, Any]) -> list[dict[str, Any]]:
    """A wide picture, a tall one, two with text between them, and two of which one follows the other; their sides are
    multiples of 28, so that no processor has to scale them."""
    example = Image.open(ASSETS / "example.png").convert("RGB")
    one = "<|vision_start|><|image_pad|><|vision_end|>"
    shown = {
        "wide": (f"{one}what is written?", [(224, 140)]),
        "tall": (f"{one}what is written?", [(112, 252)]),
        "two": (f"first {one}then {one}which?", [(168, 168), (252, 84)]),
        "adjacent": (f"{one}{one}alike?", [(112, 168), (84, 140)]),
    }
    found = []
    for name, (text, sizes) in shown.items():
        paths = [folder / f"qwen-{name}-{number}.png" for number in range(len(sizes))]
        for path, size in zip(paths, sizes, strict=True):
            example.resize(size).save(path)
        prompt = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        found.append({"prompt": prompt, "images": [str(path) for path in paths], "method": method})
    return found


def write_qwen(folder: Path) -> Path:
    """A random Qwen2.5-VL whose decoder's heads are as wide as vLLM's kernels want them."""
    processor = qwen_processor()
    config = Qwen2_5_VLConfig(
        vision_config={
            "hidden_size": 64, "intermediate_size": 96, "depth": 4, "num_heads": 2, "patch_size": 14,
            "window_size": 112, "fullatt_block_indexes": [1, 3], "out_hidden_size": 128,
        },
        text_config={
            "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": len(processor.tokenizer), "pad_token_id": 0, "bos_token_id": 1,
            "eos_token_id": 2, "initializer_range": 0.2, "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
        },
        vision_start_token_id=3, vision_end_token_id=4, image_token_id=5, video_token_id=6,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_covipal(folder: Path) -> Path:
    """A folder with CoViPAL and weights for the bundled LLaVA, which nothing has trained."""
    model = AutoModelForImageTextToText.from_pretrained(LLAVA)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", vtprune.UntrainedWarning)
        vtprune.wrap(model, vtprune.CoViPAL(**COVIPAL))
    vtprune.save(model, folder)
    return folder


def write_stock_llava(folder: Path) -> Path:
    """The bundled LLaVA under the names that vLLM's own class reads."""
    folder.mkdir(exist_ok=True)
    for path in LLAVA.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(LLAVA / "model.safetensors")
    tower = "vision_tower."
    named = {
        name.replace(tower, f"{tower}vision_model.", 1) if tower in name else name: one
        for name, one in weights.items()
    }
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


class Reference:
    """transformers' answers of one model, wrapped as each request asks; each is computed once."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa").eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        self._answer = cache(self._computed)

    def answer(self, request: dict[str, Any], positions: str) -> dict[str, Any]:
        """ids, the log-probabilities of the best tokens at each step, and the kept places of each image."""
        method = tuple(sorted(request["method"].items()))
        return self._answer(request["prompt"], tuple(request["images"]), method, positions)

    def _computed(
        self, prompt: str, images: tuple[str, ...], method: tuple[tuple[str, Any], ...], positions: str
    ) -> dict[str, Any]:
        pictures = [Image.open(path).convert("RGB") for path in images]
        inputs = self.processor(images=pictures, text=prompt, return_tensors="pt", add_special_tokens=False)
        given: Any = dict(method)
        # A trained method is a folder: a request that says nothing gets the server's own.
        given = Path(given["folder"]) if "folder" in given else given
        with vtprune.wrapped(self.model, given, positions=positions), torch.no_grad():
            told = self.model.generate(
                **inputs,
                max_new_tokens=STEPS,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
            shown = vtprune.report(self.model).samples[0].images
        best = [step[0].log_softmax(-1).topk(5) for step in told.logits]
        return {
            "ids": told.sequences[0, inputs["input_ids"].shape[1] :].tolist(),
            "logprobs": [{str(int(token)): float(value) for value, token in zip(*step, strict=True)} for step in best],
            "kept": [list(image.kept) for image in shown],
        }


def unsteady(reference: Reference, request: dict[str, Any]) -> bool:
    """Whether rounding decides what a method in the encoder keeps of a request's one picture: states that differ in
    the sixth digit make it keep other tokens. Two engines never add up alike."""
    layers: list[Any] = []
    method = vtprune.method.registry.create(request["method"]["method"])
    own = type(method).prune_encoder

    def watched(self: Any, layer: Any) -> Any:
        layers.append(layer)
        return own(self, layer)

    picture = Image.open(request["images"][0]).convert("RGB")
    inputs = reference.processor(
        images=[picture], text=request["prompt"], return_tensors="pt", add_special_tokens=False
    )
    with (
        patch.object(type(method), "prune_encoder", watched),
        torch.no_grad(),
        vtprune.wrapped(reference.model, dict(request["method"])),
    ):
        reference.model(**inputs)
    (layer,) = layers
    signals = LayerSignals(
        layer.query[0], layer.key[0], layer.value[0], scale=layer.scale, prefix=layer.prefix, group=layer.group
    )
    found = set()
    for seed in range(NOISES):
        noise = torch.randn(layer.hidden[0].shape, generator=torch.Generator().manual_seed(seed))
        states = layer.hidden[0] + seed * 0.25e-6 * layer.hidden[0].abs().mean() * noise
        chosen = vtprune.select_encoded(states, dict(request["method"]), grid=layer.grids[0][1:], signals=signals)
        found.add(tuple(chosen.kept.tolist()))
    return len(found) > 1


def distance(answer: dict[str, Any], wanted: dict[str, Any]) -> float:
    """The largest difference of log-probabilities, of the tokens that both name; infinite where tokens differ."""
    if answer["ids"] != wanted["ids"]:
        return float("inf")
    pairs = zip(answer["logprobs"], wanted["logprobs"], strict=True)
    return max(abs(one[token] - two[token]) for one, two in pairs for token in one.keys() & two.keys())
