"""Tasks that ask again: every round is answered, and the task goes by the answers before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

from tests.checkpoint import png, random_checkpoint, write_task
from vtprune.errors import SampleError
from vtprune.evals.lmms import multi_round
from vtprune.evals.lmms.journal import Journal
from vtprune.evals.lmms.model import VTPrune
from vtprune.evals.lmms.simple_model import VTPruneSimple

NAME = "vtprune_rounds"
# The first round shows the picture; each later one shows it again and tells what was said; the second picture has one
# round more than the first.
UTILS = """
def visual(doc):
    return [doc["image"]]

def text(doc, lmms_eval_specific_kwargs=None, previous_output=None, round_idx=None, previous_round_info=None):
    if round_idx is None:
        return "what color is the circle?"
    info = {"asked": (previous_round_info or {"asked": 1})["asked"] + 1}
    assert info["asked"] == round_idx + 1 and len(previous_output) == round_idx
    if round_idx == 2 + (doc["id"] == "picture-1"):
        return None, None, True, previous_output + ["over"], info
    return [doc["image"]], f"you said {len(previous_output[-1])}, is it red?", False, previous_output, info

def process(doc, results):
    return {"rounds": len(results[0])}
"""


@pytest.fixture
def manager(tmp_path: Path) -> TaskManager:
    write_task(tmp_path, NAME, [png(96, 96), png(200, 100, "blue")], max_new_tokens=3)
    lines = (tmp_path / f"{NAME}.yaml").read_text()
    for old, new in (
        ("output_type: generate_until", "output_type: generate_until_multi_round"),
        ("vtprune.evals.lmms.shapes_task.doc_to_visual", "utils.visual"),
        ("vtprune.evals.lmms.shapes_task.doc_to_text", "utils.text"),
        ("vtprune.evals.lmms.shapes_task.process_results", "utils.process"),
        ("metric: accuracy", "metric: rounds"),
    ):
        lines = lines.replace(old, new)
    (tmp_path / f"{NAME}.yaml").write_text(lines)
    (tmp_path / "utils.py").write_text(UTILS)
    return TaskManager("ERROR", include_path=str(tmp_path), include_defaults=False)


def evaluate(model: Any, manager: TaskManager) -> dict[str, Any]:
    found: dict[str, Any] = simple_evaluate(
        model=model, tasks=[NAME], task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    return found


def answers(found: dict[str, Any]) -> list[list[str]]:
    return [sample["filtered_resps"][0] for sample in found["samples"][NAME]]


def test_every_round_is_answered_and_paid_for(manager: TaskManager) -> None:
    lm = VTPrune(random_checkpoint(), method="grid", keep=36, batch_size=2)
    found = evaluate(lm, manager)
    # What the task makes of the answers when it ends them counts.
    assert [len(said) for said in answers(found)] == [3, 4]
    assert all(said[-1] == "over" for said in answers(found))
    assert found["results"][NAME]["rounds,none"] == 3.5
    costs = [sample["token_counts"][0] for sample in found["samples"][NAME]]
    assert [cost["kept_tokens"] for cost in costs] == [72, 108]
    assert found["results"][NAME]["vtprune_tokens_kept,none"] == 90
    assert found["results"][NAME]["vtprune_tokens_percent,none"] == 25


def test_rows_of_a_batch_and_a_simple_model_are_answered_alike(manager: TaskManager) -> None:
    options = {"pretrained": random_checkpoint(), "method": "flowcut", "keep": 0.25}
    expected = answers(evaluate(VTPrune(**options, batch_size=1), manager))
    assert answers(evaluate(VTPrune(**options, batch_size=2), manager)) == expected
    assert answers(evaluate(VTPruneSimple(**options), manager)) == expected


def test_a_journal_keeps_each_round(tmp_path: Path, manager: TaskManager, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, path = VTPrune(random_checkpoint()), tmp_path / "journal.jsonl"
    lm.journal = Journal(path)
    found = answers(evaluate(lm, manager))
    lines = path.read_text().splitlines()
    assert len(lines) == 5
    path.write_text("\n".join(lines[:4]) + "\n")
    lm.journal = Journal(path)
    asked: list[int] = []
    answer = lm._answer

    def counted(requests: Any) -> Any:
        asked.append(len(requests))
        return answer(requests)

    monkeypatch.setattr(lm, "_answer", counted)
    assert answers(evaluate(lm, manager)) == found
    assert asked == [1]


def test_a_task_without_an_end_is_named(manager: TaskManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multi_round, "MOST_ROUNDS", 3)
    (tmp_path / "utils.py").write_text(UTILS + "\ndef text(doc, **rounds):\n    return 'what color?'\n")
    with pytest.raises(SampleError, match=rf"{NAME}, sample 0 \(picture-0\): .* not ended after 3 rounds"):
        evaluate(VTPrune(random_checkpoint()), manager)
