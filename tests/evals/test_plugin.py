"""lmms-eval finds the model, and its evaluator gets the right answers and costs out of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager

import vtprune
from tests.checkpoint import png, random_checkpoint, random_qwen_checkpoint, write_task
from vtprune.errors import SampleError
from vtprune.evals.bench.suite import BUNDLED_TASK, open_suite, stratified
from vtprune.evals.lmms.generation import StopAtText, cut
from vtprune.evals.lmms.model import VTPrune
from vtprune.loading.model import load_model
from vtprune.loading.prompts import encode, place, question

SIZES = [(96, 96), (1, 1), (20000, 10), (10, 3000), (640, 480)]


@pytest.fixture
def pictures(tmp_path: Path) -> TaskManager:
    """A task over images of very different sizes."""
    write_task(tmp_path, "vtprune_pictures", [png(*size) for size in SIZES])
    return TaskManager("ERROR", include_path=str(tmp_path), include_defaults=False)


def evaluate(model: Any, manager: TaskManager, task: str = "vtprune_pictures", **options: Any) -> dict[str, Any]:
    return simple_evaluate(
        model=model, tasks=[task], task_manager=manager, bootstrap_iters=0, log_samples=True, **options
    )


def answers(result: dict[str, Any], task: str = "vtprune_pictures") -> list[str]:
    return [sample["filtered_resps"][0] for sample in result["samples"][task]]


def test_lmms_eval_knows_the_model() -> None:
    assert get_model("vtprune") is VTPrune


def test_a_method_and_its_options_come_from_model_args(pictures: TaskManager) -> None:
    arguments = f"pretrained={random_checkpoint()},method=flowcut,keep=25%,variant=released,batch_size=2"
    result = evaluate("vtprune", pictures, model_args=arguments, batch_size=1)
    assert len(answers(result)) == len(SIZES)
    for sample in result["samples"]["vtprune_pictures"]:
        counts = sample["token_counts"][0]
        assert (counts["visual_tokens"], counts["kept_tokens"]) == (144, 36)
        assert counts["input_tokens"] > 144
        assert 1 <= counts["output_tokens"] <= 4
        assert 0 < counts["flops"] < counts["flops_full"]
        assert 0 < counts["kv_bytes"] < counts["kv_bytes_full"]
        assert 0 < counts["scoring_flops"] < counts["flops"]
        assert counts["prefill_ms"] > 0
    assert result["throughput"]["avg_kept_tokens"] == pytest.approx(36)


def test_the_answers_are_those_of_generate(pictures: TaskManager) -> None:
    result = evaluate("vtprune", pictures, model_args=f"pretrained={random_checkpoint()},method=grid,keep=16")
    model, processor = load_model(random_checkpoint())
    documents = pictures.load_task_or_group(["vtprune_pictures"], "chat")["vtprune_pictures"].eval_docs
    expected = []
    with vtprune.wrapped(model, "grid", keep=16):
        for document in documents:
            inputs = encode(processor, [question(document["image"], document["question"])])
            prompt = inputs["input_ids"].shape[1]
            ids = model.generate(**place(inputs, model), do_sample=False, max_new_tokens=4)
            expected.append(processor.decode(ids[0, prompt:], skip_special_tokens=True).strip())
    assert answers(result) == expected


def test_batches_change_no_answer(pictures: TaskManager) -> None:
    found = [
        answers(
            evaluate("vtprune", pictures, model_args=f"pretrained={random_checkpoint()},method=fopru,batch_size={n}")
        )
        for n in (1, 3, 16)
    ]
    assert found[0] == found[1] == found[2]


def test_a_saved_config_says_it_all(tmp_path: Path, pictures: TaskManager) -> None:
    vtprune.save_config(vtprune.Grid(keep=16), tmp_path / "config")
    arguments = f"pretrained={random_checkpoint()},config={tmp_path / 'config'}"
    result = evaluate("vtprune", pictures, model_args=arguments)
    assert result["samples"]["vtprune_pictures"][0]["token_counts"][0]["kept_tokens"] == 16
    with pytest.raises(vtprune.VTPruneError, match="give no others"):
        VTPrune(random_checkpoint(), config=str(tmp_path / "config"), keep=4)


def test_one_object_serves_several_evaluations(pictures: TaskManager) -> None:
    lm = VTPrune(random_checkpoint(), batch_size=4)
    assert answers(evaluate(lm, pictures)) == answers(evaluate(lm, pictures))


def test_errors_of_generation_are_raised(pictures: TaskManager, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = VTPrune(random_checkpoint())

    def broken(**inputs: Any) -> None:
        raise torch.OutOfMemoryError("on purpose")

    monkeypatch.setattr(lm.model, "generate", broken)
    with pytest.raises(torch.OutOfMemoryError):
        evaluate(lm, pictures)


def test_a_truncated_picture_is_named(tmp_path: Path) -> None:
    whole = png(200, 200, "blue")
    write_task(tmp_path, "vtprune_broken", [png(96, 96), whole[: len(whole) // 2]])
    manager = TaskManager("ERROR", include_path=str(tmp_path), include_defaults=False)
    with pytest.raises(SampleError, match=r"vtprune_broken, sample 1 \(picture-1\): cannot be read"):
        evaluate(VTPrune(random_checkpoint()), manager, "vtprune_broken")


def test_a_picture_that_the_processor_refuses_is_named(pictures: TaskManager) -> None:
    with pytest.raises(SampleError, match=r"sample 2 \(picture-2\).*20000x10.*aspect ratio"):
        evaluate(VTPrune(random_qwen_checkpoint(), batch_size=8), pictures)


@pytest.mark.parametrize("method", ["none", "flowcut", "pool"])
def test_pictures_of_many_sizes_share_a_batch(tmp_path: Path, method: str) -> None:
    sizes = [(96, 96), (1, 1), (300, 100), (200, 410), (640, 480)]
    write_task(tmp_path, "vtprune_sizes", [png(*size) for size in sizes])
    manager = TaskManager("ERROR", include_path=str(tmp_path), include_defaults=False)
    found = []
    for batch in (1, 5):
        keep = None if method == "none" else 8
        lm = VTPrune(random_qwen_checkpoint(), method=method, keep=keep, batch_size=batch)
        samples = evaluate(lm, manager, "vtprune_sizes")["samples"]["vtprune_sizes"]
        counts = [sample["token_counts"][0] for sample in samples]
        found.append(
            [(s["filtered_resps"], c["visual_tokens"], c["kept_tokens"]) for s, c in zip(samples, counts, strict=True)]
        )
    assert found[0] == found[1]
    assert len({visual for _, visual, _ in found[0]}) > 2
    assert all(kept == visual if method == "none" else kept <= min(8, visual) for _, visual, kept in found[0])


def test_until_and_max_new_tokens_are_respected(tmp_path: Path) -> None:
    write_task(tmp_path, "vtprune_long", [png(96, 96)], max_new_tokens=12)
    manager = TaskManager("ERROR", include_path=str(tmp_path), include_defaults=False)
    lm = VTPrune(random_checkpoint())
    result = evaluate(lm, manager, "vtprune_long")
    text = answers(result, "vtprune_long")[0]
    longest = result["samples"]["vtprune_long"][0]["token_counts"][0]["output_tokens"]
    assert longest == 12
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    result = evaluate(lm, manager, "vtprune_long", gen_kwargs=f"max_new_tokens=12,until={stop}")
    assert answers(result, "vtprune_long")[0] == text[: text.index(stop)].strip()
    assert result["samples"]["vtprune_long"][0]["token_counts"][0]["output_tokens"] < longest


def test_stop_texts() -> None:
    assert cut("red. blue", [".", "!"]) == "red"
    assert cut("red", ["."]) == "red"
    _, processor = load_model(random_checkpoint())
    tokenizer = processor.tokenizer
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in ("how many shapes", "how many circles")]
    ids = torch.tensor([[7] * 3 + row for row in rows])
    assert StopAtText(tokenizer, ["shapes"], prompt=3)(ids, None).tolist() == [True, False]
    assert StopAtText(tokenizer, ["many"], prompt=5)(ids, None).tolist() == [False, False]


def test_a_process_without_a_request_of_a_kind_answers_nothing() -> None:
    lm = VTPrune(random_checkpoint())
    assert lm.generate_until([]) == lm.loglikelihood([]) == lm.generate_until_multi_round([]) == []


def test_a_sample_is_balanced_and_seeded() -> None:
    categories = ["a"] * 50 + ["b"] * 30 + ["c"] * 3
    rows = stratified(categories, 20, seed=0)
    counts = [sum(categories[i] == name for i in rows) for name in "abc"]
    assert counts == [9, 8, 3]
    assert rows == sorted(set(rows)) == stratified(categories, 20, seed=0) != stratified(categories, 20, seed=1)
    assert stratified(categories, 1000, seed=0) == list(range(83))


def test_the_bundled_task_is_sampled_by_category() -> None:
    with open_suite([BUNDLED_TASK], 25, seed=3) as suite:
        task = suite.manager.load_task_or_group([BUNDLED_TASK], "chat")[BUNDLED_TASK]
        categories = list(task.eval_docs["category"])
    assert len(categories) == 25
    assert {categories.count(name) for name in set(categories)} == {5}


@pytest.mark.slow
def test_the_command_line_of_lmms_eval(tmp_path: Path) -> None:
    """As a user types it; lmms-eval exits 0 even after an error, so the results file is what counts."""
    write_task(tmp_path, "vtprune_pictures", [png(96, 96)])
    arguments = {
        "--model": "vtprune",
        "--model_args": f"pretrained={random_checkpoint()},method=holov,keep=0.25",
        "--include_path": str(tmp_path),
        "--tasks": "vtprune_pictures",
        "--output_path": str(tmp_path / "out"),
    }
    flags = [word for pair in arguments.items() for word in pair]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, "-m", "lmms_eval", "eval", *flags, "--log_samples"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert list((tmp_path / "out").rglob("*_results.json"))
    samples = next((tmp_path / "out").rglob("*_samples_*.jsonl")).read_text()
    assert '"kept_tokens": 36' in samples
