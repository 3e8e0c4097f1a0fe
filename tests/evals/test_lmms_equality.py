"""Whichever way a question is put, the answer and its cost are the same: through lmms-eval, through `vtprune bench`,
one at a time or many together, and, unpruned, through lmms-eval's own models."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from PIL import Image
from rich.console import Console

from tests.checkpoint import random_checkpoint, random_qwen3_checkpoint, random_qwen_checkpoint, write_task
from vtprune.assets import TINY_LLAVA
from vtprune.evals.bench.bench import BenchConfig, run_bench
from vtprune.evals.bench.suite import BUNDLED_TASK, open_suite
from vtprune.evals.bench.sweep import Sweep
from vtprune.evals.lmms.efficiency import RowCost
from vtprune.evals.lmms.table import ROWS
from vtprune.evals.settings import UNPRUNED, all_methods

KEEP, LIMIT = 0.25, 5
TIMES = ("prefill_ms", "decode_ms", "peak_bytes")
WITHOUT_TIMES = [name for name in ROWS if not name.endswith(("_ms", "_gib"))]


def benched(output: Path, methods: Sequence[str], patch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """The records of `vtprune bench` by method, but for the times, which are not taken."""
    patch.setattr(Sweep, "_time", lambda sweep, setting: {"ms": 1.0, "ratio": 1.0, "over_scoreless_ms": None})
    config = BenchConfig(
        tuple(methods), (KEEP,), output, model=random_checkpoint(), limit=LIMIT, batch_size=4, lenient=True
    )
    found = run_bench(config, Console(file=io.StringIO()))
    return {record["method"]: record for record in found["settings"].values()}


def asked(method: str) -> dict[str, Any]:
    """The same method through lmms-eval, on the same questions."""
    keep = "" if method == UNPRUNED else f",keep={KEEP}"
    arguments = f"pretrained={random_checkpoint()},method={method}{keep},batch_size=4"
    with open_suite([BUNDLED_TASK], LIMIT, 0) as suite:
        found: dict[str, Any] = simple_evaluate(
            model="vtprune", model_args=arguments, tasks=[BUNDLED_TASK], task_manager=suite.manager, batch_size=1,
            bootstrap_iters=0, log_samples=True,
        )  # fmt: skip
    return found


def check_equal(record: dict[str, Any], found: dict[str, Any]) -> None:
    row, samples = found["results"][BUNDLED_TASK], found["samples"][BUNDLED_TASK]
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    assert [sample["filtered_resps"][0] for sample in samples] == record["answers"]
    assert row["accuracy,none"] == record["scores"][0]["value"]
    assert {name: row[f"{name},none"] for name in WITHOUT_TIMES} == pytest.approx(
        {
            "vtprune_tokens_kept": record["tokens"]["kept"],
            "vtprune_tokens_percent": 100 * record["tokens"]["share"],
            "vtprune_flops_percent": 100 * record["flops"]["share"],
            "vtprune_kv_percent": 100 * record["kv"]["share"],
            "vtprune_kv_end_percent": 100 * record["kv"]["end_share"],
            "vtprune_scoring_percent": 100 * record["flops"]["scoring_share"],
        },
        rel=1e-9,
    )


def test_lmms_eval_and_bench_say_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = benched(tmp_path / "out", ("flowcut", "fastv", "d2o"), monkeypatch)
    assert list(records) == [UNPRUNED, "flowcut", "fastv", "d2o"]
    for method in ("flowcut", "d2o"):
        check_equal(records[method], asked(method))


@pytest.mark.slow
def test_lmms_eval_and_bench_say_the_same_of_every_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = benched(tmp_path / "out", all_methods(), monkeypatch)
    left_out = json.loads((tmp_path / "out" / "results.json").read_text())["left_out"]
    assert len(records) + len(left_out) == len(all_methods()) + 1
    for method, record in records.items():
        check_equal(record, asked(method))


@pytest.fixture
def pictures(tmp_path: Path) -> TaskManager:
    """Pictures that the Qwens take as they are: lmms-eval scales others in a way of its own."""
    found = []
    for turn in (0, 90, 180, 270, 30):
        buffer = io.BytesIO()
        slope, hill = Image.linear_gradient("L").rotate(turn), Image.radial_gradient("L")
        Image.merge("RGB", (slope, hill, slope)).resize((224, 224)).save(buffer, "PNG")
        found.append(buffer.getvalue())
    write_task(tmp_path, "vtprune_pictures", found, max_new_tokens=6)
    return TaskManager("ERROR", include_path=str(tmp_path), include_defaults=False)


def run(manager: TaskManager, model: str, arguments: str, **options: Any) -> dict[str, Any]:
    found: dict[str, Any] = simple_evaluate(
        model=model, model_args=arguments, tasks=["vtprune_pictures"], task_manager=manager, batch_size=1,
        bootstrap_iters=0, log_samples=True, **options,
    )  # fmt: skip
    return found


def answers(found: dict[str, Any]) -> list[str]:
    return [sample["filtered_resps"][0] for sample in found["samples"]["vtprune_pictures"]]


def test_costs_of_samples_add_up_and_batches_change_none(pictures: TaskManager) -> None:
    runs = [run(pictures, "vtprune", f"method=fastv,keep=0.3,batch_size={batch}") for batch in (1, 8)]
    costs = [[sample["token_counts"][0] for sample in found["samples"]["vtprune_pictures"]] for found in runs]
    assert answers(runs[0]) == answers(runs[1])
    bare = [[{k: v for k, v in cost.items() if k not in TIMES} for cost in one] for one in costs]
    # What is in the cache at the end is counted when the longest answer of the batch is complete.
    for one in bare:
        for cost in one:
            del cost["kv_bytes_end"], cost["kv_bytes_end_full"]
    assert bare[0] == bare[1]
    known = RowCost.__dataclass_fields__
    for found, own in zip(runs, costs, strict=True):
        rows = [RowCost(**{name: cost[name] for name in known}) for cost in own]
        for name in WITHOUT_TIMES:
            pairs = [pair for cost in rows if (pair := ROWS[name](cost)) is not None]
            total = sum(part for part, _ in pairs) / sum(whole for _, whole in pairs)
            assert found["results"]["vtprune_pictures"][f"{name},none"] == pytest.approx(total)


@pytest.fixture
def _decord(monkeypatch: pytest.MonkeyPatch) -> None:
    """lmms-eval's models import it to read videos, of which there are none here."""
    stub = ModuleType("decord")
    stub.VideoReader = stub.cpu = object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "decord", stub)


@pytest.mark.usefixtures("_decord")
def test_unpruned_answers_are_those_of_lmms_evals_llava(pictures: TaskManager) -> None:
    for folder in (str(TINY_LLAVA), random_checkpoint()):
        theirs = run(pictures, "llava_hf", f"pretrained={folder},device=cpu,device_map=cpu,dtype=float32")
        assert all(answers(theirs))
        assert answers(run(pictures, "vtprune", f"pretrained={folder},dtype=float32")) == answers(theirs)


@pytest.mark.usefixtures("_decord")
@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_vl"])
def test_unpruned_answers_are_those_of_lmms_evals_qwens(pictures: TaskManager, name: str) -> None:
    folder = random_qwen3_checkpoint(experts=False) if name == "qwen3_vl" else random_qwen_checkpoint()
    size = "min_pixels=3136,max_pixels=50176"
    theirs = run(pictures, name, f"pretrained={folder},device=cpu,device_map=cpu,{size}")
    # Its chat model begins each prompt so, and its weights are read as bfloat16.
    system = {"system_instruction": "You are a helpful assistant."} if name == "qwen3_vl" else {}
    mine = run(pictures, "vtprune", f"pretrained={folder},dtype=bfloat16", **system)
    assert any(answers(theirs))
    assert answers(mine) == answers(theirs)
