"""How likely a pruned model finds given answers, as lmms-eval's multiple-choice tasks ask."""

from __future__ import annotations

import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import make_table
from torch import Tensor

import vtprune
from tests.checkpoint import png, random_checkpoint, random_qwen_checkpoint, write_task
from tests.evals.choices import NAME, write_choices
from vtprune.assets import SHAPES_EVAL, TINY_LLAVA, TINY_QWEN
from vtprune.errors import InputError, SampleError
from vtprune.evals.lmms.generation import Answer
from vtprune.evals.lmms.journal import Journal
from vtprune.evals.lmms.loglikelihood import continuation_ids, likelihoods, plain_generation
from vtprune.evals.lmms.model import VTPrune
from vtprune.evals.lmms.requests import as_chat
from vtprune.evals.lmms.simple_model import VTPruneSimple
from vtprune.evals.lmms.table import ROWS
from vtprune.loading.model import load_model
from vtprune.loading.prompts import encode, place, question
from vtprune.shapes.dataset import read_eval_rows

COLOURS = ("red", "green", "blue", "yellow")


def evaluate(model: Any, manager: TaskManager, **options: Any) -> dict[str, Any]:
    found: dict[str, Any] = simple_evaluate(
        model=model, tasks=[NAME], task_manager=manager, bootstrap_iters=0, log_samples=True, **options
    )
    return found


def losses(found: dict[str, Any]) -> list[list[float]]:
    return [[loss for loss, _ in sample["filtered_resps"]] for sample in found["samples"][NAME]]


def logprob(model: Any, inputs: Any, ids: list[int]) -> float:
    """By one forward of an unwrapped model."""
    inputs = place(inputs, model)
    prompt = inputs["input_ids"].shape[1]
    answer = torch.tensor([ids])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], dim=1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(answer)], dim=1)
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits[0, prompt - 1 : -1]
    return float(logits.log_softmax(-1).gather(1, answer.T).sum())


def test_lmms_eval_is_given_the_simple_model_where_it_asks_for_one() -> None:
    assert get_model("vtprune", force_simple=True) is VTPruneSimple
    assert get_model("vtprune") is VTPrune


def test_an_unpruned_model_is_as_sure_as_transformers_says(tmp_path: Path) -> None:
    manager = write_choices(tmp_path, 2)
    found = evaluate("vtprune", manager, force_simple=True, batch_size=1)
    model, processor = load_model(str(TINY_LLAVA))
    documents = manager.load_task_or_group([NAME], "simple")[NAME].eval_docs
    for document, mine in zip(documents, losses(found), strict=True):
        inputs = encode(processor, [question(document["image"], document["question"])])
        ids = [processor.tokenizer(f" {colour}", add_special_tokens=False)["input_ids"] for colour in COLOURS]
        assert mine == pytest.approx([-logprob(model, inputs, one) for one in ids], abs=1e-4)


def test_the_likeliest_choice_counts_as_the_answer(tmp_path: Path) -> None:
    found = evaluate(VTPruneSimple(batch_size=16), write_choices(tmp_path, 4))
    assert found["results"][NAME]["acc,none"] >= 0.75
    for sample in found["samples"][NAME]:
        best = min(range(4), key=lambda choice: sample["filtered_resps"][choice][0])
        greedy = [greedy for _, greedy in sample["filtered_resps"]]
        # Greedy decoding gives one answer, and the bundled model's is a colour here.
        assert greedy == [choice == best for choice in range(4)]


@pytest.mark.parametrize(
    ("folder", "method"),
    [(TINY_LLAVA, method) for method in ("none", "flowcut", "fastv", "lazyllm", "d2o")]
    + [(TINY_QWEN, method) for method in ("fastv", "lazyllm")],
    ids=lambda value: getattr(value, "name", value),
)
def test_what_was_generated_is_as_likely_as_its_steps_were(folder: Path, method: str) -> None:
    model, processor = load_model(str(folder))
    found = read_eval_rows(SHAPES_EVAL)[:2]
    inputs = encode(processor, [question(one.open_image(), one.question) for one in found])
    prompt = inputs["input_ids"].shape[1]
    with vtprune.wrapped(model, method, **({} if method == "none" else {"keep": 0.25})), plain_generation(model):
        steps = model.generate(
            **place(inputs, model), max_new_tokens=6, output_logits=True, return_dict_in_generate=True, pad_token_id=0
        )
        rows = steps.sequences[:, prompt:]
        logits = torch.stack(steps.logits, dim=1).float().log_softmax(-1)
        expected = logits.gather(2, rows[..., None])[..., 0]
        # Rows of different lengths, as continuations have.
        continuations = [rows[0].tolist(), rows[1, :3].tolist()]
        told = likelihoods(model, processor.tokenizer, inputs, texts=["", ""], continuations=continuations)
    assert [one.logprob for one in told] == pytest.approx([float(expected[0].sum()), float(expected[1, :3].sum())])
    assert all(one.greedy for one in told)
    assert [one.output_tokens for one in told] == [6, 3]


@pytest.mark.parametrize("method", ["fastv", "d2o"])
def test_batches_change_no_likelihood_and_answers_no_tokens(tmp_path: Path, method: str) -> None:
    manager = write_choices(tmp_path, 2, extra='target_delimiter: " a bright "\n')
    found = [evaluate(VTPruneSimple(method=method, keep=0.25, batch_size=batch), manager) for batch in (1, 8)]
    for one, other in zip(*map(losses, found), strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    kept = [[counts["kept_tokens"] for counts in sample["token_counts"]] for sample in found[0]["samples"][NAME]]
    # The prompt alone decides what is kept of it.
    assert all(len(set(choices)) == 1 for choices in kept)
    assert found[0]["samples"][NAME][0]["token_counts"][0]["output_tokens"] > 2


def test_costs_stand_beside_the_accuracy(tmp_path: Path) -> None:
    found = evaluate("vtprune", write_choices(tmp_path, 2), model_args="method=fastv,keep=0.25", force_simple=True)
    rows = {name: found["results"][NAME][f"{name},none"] for name in ROWS if f"{name},none" in found["results"][NAME]}
    assert rows["vtprune_tokens_percent"] == pytest.approx(25, abs=1)
    assert 0 < rows["vtprune_flops_percent"] < 100
    assert "vtprune_kv_percent" in make_table(found)


def test_a_journal_gives_back_what_was_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager, path = write_choices(tmp_path, 2), tmp_path / "journal.jsonl"
    lm = VTPruneSimple(method="grid", keep=0.25)
    lm.journal = Journal(path)
    found = losses(evaluate(lm, manager))
    lines = path.read_text().splitlines()
    assert len(lines) == 8
    # Killed after the fifth answer, in the middle of a line.
    path.write_text("\n".join(lines[:5]) + "\n" + lines[5][:40])
    lm.journal = Journal(path)
    asked: list[int] = []
    answer = lm._likelihoods

    def counted(requests: Any) -> Any:
        asked.append(len(requests))
        return answer(requests)

    monkeypatch.setattr(lm, "_likelihoods", counted)
    assert losses(evaluate(lm, manager)) == found
    assert sum(asked) == 3


def test_half_a_likelihood_in_a_journal_is_left_out_by_name(tmp_path: Path) -> None:
    lm = VTPruneSimple()
    lm.journal = Journal(tmp_path / "journal.jsonl")
    evaluate(lm, write_choices(tmp_path, 1))
    text = (tmp_path / "journal.jsonl").read_text()
    (tmp_path / "journal.jsonl").write_text(text.replace('"logprob"', '"logprobe"', 1).replace(', "greedy"', ', "g"'))
    assert len(Journal(tmp_path / "journal.jsonl").bad) == 4


@pytest.mark.parametrize("delimiter", ["", " "])
def test_an_empty_continuation_is_refused_by_name(tmp_path: Path, delimiter: str) -> None:
    task = write_choices(tmp_path, 2).load_task_or_group([NAME], "simple")[NAME]
    task.config.target_delimiter = delimiter
    task.config.doc_to_choice = lambda doc: ["red", ""]
    task.build_all_requests(limit=1)
    lm = VTPruneSimple()
    lm.task_dict[NAME] = task.dataset
    with pytest.raises(SampleError, match=rf"{NAME}, sample 0 .*: a continuation is a text and not empty"):
        lm.loglikelihood(task.instances)


def test_what_stands_for_a_picture_is_no_continuation(tmp_path: Path) -> None:
    manager = write_choices(tmp_path, 1, extra='target_delimiter: "<image>"\n')
    with pytest.raises(SampleError, match=rf"{NAME}, sample 0 .*holds '<image>'"):
        evaluate(VTPruneSimple(), manager)


def test_lmms_evals_cache_is_refused(tmp_path: Path) -> None:
    task = write_choices(tmp_path, 1).load_task_or_group([NAME], "simple")[NAME]
    task.build_all_requests(limit=1)
    lm = VTPruneSimple()
    lm.task_dict[NAME], task.args = task.dataset, Namespace(use_cache="cache")
    with pytest.raises(InputError, match=rf"use_cache: leave it out.*{NAME}"):
        lm.loglikelihood(task.instances)


def test_a_task_of_one_continuation_is_asked_for_its_target(tmp_path: Path) -> None:
    (tmp_path / "utils.py").write_text("def process(doc, results):\n    return {'loss': results[0][0]}\n")
    manager = write_choices(
        tmp_path, 2, output_type="loglikelihood", extra="process_results: !function utils.process\n"
    )
    found = evaluate(VTPruneSimple(), manager)
    assert 0 < found["results"][NAME]["loss,none"] < 1
    assert all(math.isfinite(loss) for (loss,) in losses(found))


def test_a_checkpoints_penalties_change_no_likelihood() -> None:
    lm = VTPruneSimple(random_checkpoint())
    inputs = encode(lm.processor, [question(read_eval_rows(SHAPES_EVAL)[0].open_image(), "what color is the circle?")])
    ids = lm.processor.tokenizer(" the circle the circle", add_special_tokens=False)["input_ids"]

    def told() -> Answer:
        return likelihoods(lm.model, lm.processor.tokenizer, inputs, texts=[""], continuations=[ids])[0]

    before = told()
    lm.model.generation_config.repetition_penalty = 1.5
    lm.model.generation_config.eos_token_id = ids[0]
    assert told().to_dict()["logprob"] == pytest.approx(before.to_dict()["logprob"])
    assert lm.model.generation_config.repetition_penalty == 1.5


def test_a_continuation_has_the_tokens_that_follow_the_prompt() -> None:
    tokenizer = load_model(random_qwen_checkpoint())[1].tokenizer
    assert tokenizer.decode(continuation_ids(tokenizer, "is it ", "red")) == "red"

    class Merging:
        """Reads "ab" as one token."""

        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            return {"input_ids": [1 if letter == "ab" else ord(letter[0]) for letter in text.replace("ab", "ä")]}

    assert continuation_ids(Merging(), "xa", "bc") == [ord("b"), ord("c")]
    assert continuation_ids(Merging(), "xa", "c") == [ord("c")]


@pytest.mark.parametrize("given", [{"system_instruction": "Be brief."}, {}], ids=["instruction", "description"])
def test_an_instruction_is_a_message_and_the_rest_of_the_context_the_users(
    tmp_path: Path, given: dict[str, Any]
) -> None:
    manager = write_choices(tmp_path, 1, extra="" if given else "description: Look closely.\n")
    task = manager.load_task_or_group([NAME], "simple")[NAME]
    task.config.num_fewshot = 0
    task.build_all_requests(limit=1, **given)
    lm = VTPruneSimple(random_qwen_checkpoint())
    lm.task_dict[NAME] = task.dataset
    *system, user = lm._chat(as_chat(task.instances[0], {}, lm._instructions))
    assert [message["content"][0]["text"] for message in system] == list(given.values())
    assert [part["type"] for part in user["content"]] == ["image", "text"]
    asked = task.eval_docs[0]["question"]
    assert user["content"][1]["text"] == (asked if given else f"Look closely.{asked}")


def test_generation_tasks_may_stand_beside_them(tmp_path: Path) -> None:
    write_task(tmp_path, "vtprune_pictures", [png(96, 96)] * 2)
    manager = write_choices(tmp_path, 1)
    found = {
        simple: simple_evaluate(
            model="vtprune", tasks=["vtprune_pictures", *([NAME] if simple else [])], task_manager=manager,
            bootstrap_iters=0, log_samples=True, force_simple=simple,
        )
        for simple in (False, True)
    }  # fmt: skip
    assert set(found[True]["samples"]) == {"vtprune_pictures", NAME}
    mine, others = ([one["filtered_resps"] for one in run["samples"]["vtprune_pictures"]] for run in found.values())
    assert mine == others


def test_a_likelihood_needs_a_simple_model_and_lmms_eval_says_so(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="used for generation only"):
        evaluate(VTPrune(), write_choices(tmp_path, 1))
