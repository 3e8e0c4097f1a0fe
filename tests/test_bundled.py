"""The bundled LLaVA: it sees, through every door that users come in by."""

from __future__ import annotations

import io
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

import vtprune
from vtprune.assets import (
    EXAMPLE_IMAGE,
    SHAPES_EVAL,
    TINY_LLAVA,
    TRAINED,
)


@pytest.fixture(scope="module")
def bundled() -> tuple[Any, Any]:
    """The model and its processor."""
    return AutoModelForImageTextToText.from_pretrained(TINY_LLAVA), AutoProcessor.from_pretrained(TINY_LLAVA)


def _rows(count: int | None) -> list[dict[str, Any]]:
    table = pq.read_table(SHAPES_EVAL)
    return (table if count is None else table.slice(0, count)).to_pylist()


def _messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    image = Image.open(io.BytesIO(row["image"]["bytes"]))
    return [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": row["question"]}]}
    ]


@torch.inference_mode()
def _answers(model: Any, processor: Any, rows: list[dict[str, Any]], batch: int = 50) -> list[str]:
    found: list[str] = []
    for start in range(0, len(rows), batch):
        inputs = processor.apply_chat_template(
            [_messages(row) for row in rows[start : start + batch]],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        tokens = model.generate(**inputs, max_new_tokens=8)
        texts = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found += [text.strip().lower() for text in texts]
    return found


def _accuracy(rows: list[dict[str, Any]], answers: list[str]) -> float:
    return sum(row["answer"] == answer for row, answer in zip(rows, answers, strict=True)) / len(rows)


def test_the_set_is_frozen_balanced_and_large_enough() -> None:
    rows = _rows(None)
    assert len(rows) >= 1000
    sizes: dict[str, int] = defaultdict(int)
    for row in rows:
        sizes[row["category"]] += 1
    assert len(sizes) >= 5
    assert max(sizes.values()) - min(sizes.values()) <= 1


def test_the_unpruned_model_answers_and_pruning_by_attention_beats_chance(bundled: tuple[Any, Any]) -> None:
    model, processor = bundled
    rows = _rows(150)
    full = _accuracy(rows, _answers(model, processor, rows))
    scores = {}
    for name in ("random", "flowcut"):
        with vtprune.wrapped(model, name, keep=0.25):
            scores[name] = _accuracy(rows, _answers(model, processor, rows))
            assert vtprune.report(model).achieved_keep == 0.25
    assert full > 0.8
    assert full >= scores["flowcut"] > scores["random"]


def test_the_pipeline_works_on_a_wrapped_model(bundled: tuple[Any, Any]) -> None:
    model, processor = bundled
    row = _rows(1)[0]
    with vtprune.wrapped(model, "flowcut", keep=0.5):
        pipe = pipeline("image-text-to-text", model=model, processor=processor)
        text = pipe(text=_messages(row), return_full_text=False, max_new_tokens=8)[0]["generated_text"]
        assert text.strip().lower() == _answers(model, processor, [row])[0]
        assert vtprune.report(model).samples[0].images[0].tokens == 144


def test_the_pipeline_batches_rows_of_different_lengths(bundled: tuple[Any, Any]) -> None:
    model, processor = bundled
    rows = _rows(6)
    with vtprune.wrapped(model, "holov", keep=20):
        together = _answers(model, processor, rows)
        assert together == [_answers(model, processor, [row])[0] for row in rows]


def test_a_conversation_goes_on_about_the_same_image(bundled: tuple[Any, Any]) -> None:
    model, processor = bundled
    row = _rows(1)[0]
    turns = _messages(row)
    with vtprune.wrapped(model, "flowcut", keep=0.5):
        turns.append(
            {"role": "assistant", "content": [{"type": "text", "text": _answers(model, processor, [row])[0]}]}
        )
        turns.append({"role": "user", "content": [{"type": "text", "text": "how many shapes are there?"}]})
        inputs = processor.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        tokens = model.generate(**inputs, max_new_tokens=8)
    answer = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert answer in set("123456")


def test_the_example_image_is_answered(bundled: tuple[Any, Any]) -> None:
    model, processor = bundled
    row = {"image": {"bytes": EXAMPLE_IMAGE.read_bytes()}, "question": "how many shapes are there?"}
    assert _answers(model, processor, [row])[0] in set("123456")


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (2000, 10)])
def test_images_of_any_size_are_taken(bundled: tuple[Any, Any], size: tuple[int, int]) -> None:
    model, processor = bundled
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(buffer, "PNG")
    with vtprune.wrapped(model, "flowcut", keep=10):
        answers = _answers(model, processor, [{"image": {"bytes": buffer.getvalue()}, "question": "what is this?"}])
    assert len(answers) == 1


@pytest.mark.slow
def test_the_unpruned_model_answers_ninety_percent_and_eighty_in_each_category(bundled: tuple[Any, Any]) -> None:
    model, processor = bundled
    rows = _rows(None)
    answers = _answers(model, processor, rows)
    right: dict[str, list[bool]] = defaultdict(list)
    for row, answer in zip(rows, answers, strict=True):
        right[row["category"]].append(row["answer"] == answer)
    shares = {category: sum(found) / len(found) for category, found in right.items()}
    assert sum(map(sum, right.values())) / len(rows) >= 0.9
    assert min(shares.values()) >= 0.8, shares


def test_the_model_trained_with_routers_answers_at_half_of_the_decoder(bundled: tuple[Any, Any]) -> None:
    _, processor = bundled
    (folder,) = TRAINED
    rows = _rows(150)
    model = vtprune.wrap(AutoModelForImageTextToText.from_pretrained(folder), str(folder))
    assert _accuracy(rows, _answers(model, processor, rows)) > 0.9
    report = vtprune.report(model)
    assert report.achieved_keep < 0.55
    assert report.kv_bytes_prefill < 0.6 * report.kv_bytes_prefill_full
    with pytest.raises(vtprune.VTPruneError, match="does not fit"):
        vtprune.load_weights(vtprune.wrap(vtprune.unwrap(model), "pmod", keep=40), folder)
    with pytest.raises(vtprune.VTPruneError, match="trained on another base model"):
        vtprune.wrap(AutoModelForImageTextToText.from_pretrained(TINY_LLAVA), str(folder))


def test_ask_and_the_lmms_eval_model_take_the_trained_weights(tmp_path: Path) -> None:
    from vtprune.evals.ask.ask import run_ask
    from vtprune.evals.lmms.model import VTPrune

    (folder,) = TRAINED
    asked = run_ask(
        EXAMPLE_IMAGE,
        "how many shapes are there?",
        Console(quiet=True),
        method=str(folder),
        output=tmp_path / "ask.png",
    )
    assert [layer[0] for layer in asked.report.tokens_per_layer] == [144, 144, 94, 49, 21, 21]
    assert asked.report.samples[0].images[0].kept_per_layer[-2] != list(range(21))
    served = VTPrune(str(folder), config=str(folder)).model
    learnt = [float(weight.abs().sum()) > 0 for weight in served.vtprune_weights["0"]["3"].parameters()]
    assert learnt == [True, True]


def test_a_folder_that_lacks_the_weights_of_its_method_is_refused(tmp_path: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(TINY_LLAVA)
    vtprune.save_config(vtprune.PMoD(), tmp_path)
    with pytest.raises(vtprune.VTPruneError, match=r"no vtprune_weights.safetensors in"):
        vtprune.wrap(model, str(tmp_path))
    assert not any("vtprune" in name for name, _ in model.named_parameters())
