"""Files as users have them on disk, written by an earlier version, and what the bundled model answers with them.

configs/: `vtprune_config.json` of every method; trained/: what `vtprune.save` leaves; bench_run/: the folder of an
interrupted `vtprune bench`; tune_run/: that of a `vtprune tune`; pictures/: what is asked about; answers.json: the
answers. `python -m tests.saved` writes them anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vtprune
from vtprune.assets import TINY_LLAVA

SAVED = Path(__file__).parent
CONFIGS, TRAINED, PICTURES = SAVED / "configs", SAVED / "trained", SAVED / "pictures"
BENCH_RUN, TUNE_RUN, ANSWERS = SAVED / "bench_run", SAVED / "tune_run", SAVED / "answers.json"
CONFIG, WEIGHTS = "vtprune_config.json", "vtprune_weights.safetensors"

# Rows of one batch, of different lengths: the pictures of each and its question.
QUESTIONS = [((0,), "what color is the circle?"), ((1, 0), "how many shapes are there in all of this?")]
NEW_TOKENS = 6
# The digits that answers.json has of numbers that are no integers.
DIGITS = 6

BENCH = ("--keep", "0.25", "--limit", "4", "--batch-size", "1", "--device", "cpu", "--output", "bench_run")
BENCH_FINISHED, BENCH_CUT = "grid", "visionzip:keep=64+fastv"
BENCH_ANSWERS = "cells/*/answers.jsonl"
TUNE = ("holov", "--keep", "15%", "--samples", "3", "--check-samples", "2", "--device", "cpu", "--output", "tune_run")
TUNE_TRIALS = 3


def load_model() -> tuple[Any, dict[str, Any]]:
    """The bundled model in fp32 on the CPU, and what it is asked, as its inputs."""
    model = AutoModelForImageTextToText.from_pretrained(TINY_LLAVA, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(TINY_LLAVA)
    pictures = [Image.open(path).convert("RGB") for path in sorted(PICTURES.glob("*.png"))]
    rows = [
        [{"role": "user", "content": [*({"type": "image", "image": pictures[place]} for place in places),
                                      {"type": "text", "text": question}]}]
        for places, question in QUESTIONS
    ]  # fmt: skip
    inputs = processor.apply_chat_template(
        rows,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    return model, dict(inputs)


@torch.inference_mode()
def answer(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """What a wrapped model answers and reports, as plain JSON types.

    tokens: (B, NEW_TOKENS) greedy; logits: (B,) the largest one of each row's first token; the rest is of the report.
    """
    found = model.generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    told = vtprune.report(model).to_dict()
    names = (
        "tokens_per_layer",
        "kv_tokens_per_layer",
        "kept_tokens",
        "achieved_keep",
        "flops",
        "flops_full",
        "flops_breakdown",
        "kv_bytes",
    )
    stages = [{name: stage[name] for name in ("method", "asked_keep", "tokens_left")} for stage in told["stages"]]
    answers = {
        "tokens": found.sequences[:, inputs["input_ids"].shape[1] :].tolist(),
        "logits": found.logits[0].amax(dim=-1).tolist(),
        **{name: told[name] for name in names},
        "stages": stages,
    }
    return json.loads(json.dumps(_rounded(answers)))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return round(value, DIGITS) if isinstance(value, float) else value
