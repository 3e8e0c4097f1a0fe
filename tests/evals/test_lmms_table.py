"""lmms-eval's own table and files say what each task cost, as `vtprune bench` counts it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import make_table

import vtprune
from tests.checkpoint import png, random_checkpoint, write_task
from vtprune.evals.lmms.efficiency import RowCost
from vtprune.evals.lmms.model import VTPrune
from vtprune.evals.lmms.table import ROWS, VisionTokenCounts, costs_of, value_of
from vtprune.loading.model import load_model

COST = RowCost(100, 25.0, 60.0, 100.0, 3.0, 40.0, 100.0, 50.0, 100.0, 2.0)


@pytest.fixture
def manager(tmp_path: Path) -> TaskManager:
    write_task(tmp_path, "vtprune_small", [png(96, 96)] * 3, max_new_tokens=4)
    write_task(tmp_path, "vtprune_large", [png(200, 100)] * 2, max_new_tokens=4)
    return TaskManager("ERROR", include_path=str(tmp_path), include_defaults=False)


def evaluate(model: Any, manager: TaskManager, **options: Any) -> dict[str, Any]:
    return simple_evaluate(
        model=model, tasks=["vtprune_small", "vtprune_large"], task_manager=manager, bootstrap_iters=0,
        log_samples=True, **options,
    )  # fmt: skip


def test_each_task_has_its_costs_beside_its_accuracy(manager: TaskManager) -> None:
    arguments = f"pretrained={random_checkpoint()},method=fastv,keep=0.25,batch_size=2"
    found = evaluate("vtprune", manager, model_args=arguments, batch_size=1)
    for task, samples in found["samples"].items():
        costs = [sample["token_counts"][0] for sample in samples]
        row = {name: found["results"][task][f"{name},none"] for name in ROWS if name != "vtprune_peak_gib"}
        flops = 100 * sum(one["flops"] for one in costs) / sum(one["flops_full"] for one in costs)
        assert row["vtprune_flops_percent"] == pytest.approx(flops)
        assert row["vtprune_tokens_kept"] == pytest.approx(sum(one["kept_tokens"] for one in costs) / len(costs))
        assert 0 < row["vtprune_kv_percent"] <= row["vtprune_kv_end_percent"] < 100
        assert row["vtprune_prefill_ms"] > 0
        assert row["vtprune_decode_ms"] > 0
    table = make_table(found)
    assert all(table.count(name) == 2 for name in ROWS if name != "vtprune_peak_gib")


def test_a_model_that_is_handed_in_has_tables_of_its_own(manager: TaskManager) -> None:
    model, processor = load_model(random_checkpoint())
    with vtprune.wrapped(model, "none"):
        found = evaluate(VTPrune(model=model, processor=processor), manager)
    assert not any(name.startswith("vtprune_") for name in found["results"]["vtprune_small"])


def test_shares_are_those_of_sums_and_a_peak_is_the_highest() -> None:
    other = RowCost(300, 25.0, 60.0, 300.0, 3.0, 40.0, 100.0, 50.0, 100.0, 4.0, peak_bytes=2**31)
    documents = [costs_of([VisionTokenCounts(9, 2, cost=cost, shown=True)]) for cost in (COST, other)]
    values = {
        name: value_of(name, [one[name] for one in documents if name in one])
        for name in {name for one in documents for name in one}
    }
    assert values["vtprune_tokens_percent"] == pytest.approx(100 * 50 / 400)
    assert values["vtprune_flops_percent"] == pytest.approx(100 * 120 / 400)
    assert values["vtprune_prefill_ms"] == pytest.approx(3)
    assert values["vtprune_peak_gib"] == 2
    assert "vtprune_decode_ms" not in values
    assert costs_of([VisionTokenCounts(9, 2, cost=COST, shown=False), None]) == {}


def test_the_first_prompts_are_read_once_untimed(manager: TaskManager, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = VTPrune(random_checkpoint())
    asked: list[int] = []
    generate = lm.model.generate

    def noted(**inputs: Any) -> Any:
        asked.append(inputs["max_new_tokens"])
        return generate(**inputs)

    monkeypatch.setattr(lm.model, "generate", noted)
    evaluate(lm, manager)
    assert asked == [2, 4, 4, 4, 4, 4]
