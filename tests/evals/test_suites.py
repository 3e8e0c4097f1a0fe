"""Tasks that papers report: which there are, and lmms-eval's own ones over files of the same columns."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Features, Image, List, Value
from typer.testing import CliRunner

from tests.checkpoint import png
from vtprune.cli.app import app
from vtprune.cli.bench import folder_name, which_questions
from vtprune.errors import VTPruneError
from vtprune.evals.bench.scores import main_metric, task_scores
from vtprune.evals.bench.suite import open_suite
from vtprune.evals.bench.suites import SUITES
from vtprune.evals.bench.tables import kept_score, main_scores, markdown_table, notes, quality_columns

TEXT, NUMBER, TEXTS = Value("string"), Value("int64"), List(Value("string"))
FIRST: dict[str, Any] = {"image": Image(), "question": TEXT, "question_id": TEXT}
# By task the columns beside the picture and the question, and what stands in them.
STOCK: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "pope": ({"answer": TEXT, "category": TEXT}, {"answer": "yes", "category": "adversarial"}),
    "mme": ({"answer": TEXT, "category": TEXT}, {"answer": "Yes", "category": "color"}),
    "textvqa_val": ({"answers": TEXTS}, {"answers": ["red"] * 10}),
    "scienceqa_img": (
        {"choices": TEXTS, "answer": NUMBER, "hint": TEXT},
        {"choices": ["a", "b"], "answer": 1, "hint": ""},
    ),
    "vizwiz_vqa_val": ({"answers": TEXTS, "category": TEXT}, {"answers": ["red"] * 10, "category": "other"}),
    "vqav2_val": (
        {"answers": List({"answer": TEXT}), "multiple_choice_answer": TEXT},
        {"answers": [{"answer": "red"}] * 10, "multiple_choice_answer": "red"},
    ),
    "chartqa": ({"answer": TEXT, "type": TEXT}, {"answer": "4", "type": "human_test"}),
    "docvqa_val": ({"answers": TEXTS, "questionId": TEXT}, {"answers": ["red"], "questionId": "1"}),
    # Its pictures come from the hub; in a file they stand beside the questions.
    "gqa": ({"answer": TEXT}, {"answer": "red"}),
    "ocrbench": (
        {"answer": TEXTS, "dataset": TEXT, "question_type": TEXT},
        # Every answer holds it, so that each question is right.
        {"answer": [""], "dataset": "TextVQA", "question_type": "Scene Text-centric VQA"},
    ),
}


def write_stock(folder: Path, task: str) -> None:
    columns, values = STOCK[task]
    pictures = [{"bytes": png(60, 40, colour), "path": None} for colour in ("red", "blue", "green", "white")]
    # MME asks two questions of each picture.
    rows = [
        {"image": picture, "question": f"is it {i}?", "question_id": str(i // 2), **values}
        for i, picture in enumerate(pictures)
    ]
    Dataset.from_list(rows, features=Features({**FIRST, **columns})).to_parquet(folder / f"{task}.parquet")


def run(*words: str | Path) -> Any:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["bench", *[str(word) for word in words]])


@pytest.mark.slow
def test_tasks_of_lmms_eval_run_on_files_of_the_same_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    for task in STOCK:
        write_stock(data, task)
    output = tmp_path / "out"
    result = run(
        "--tasks", ",".join(STOCK), "--data", data, "--output", output,
        "--methods", "grid", "--keep", "25%", "--max-new-tokens", "3", "--metric", "pope=pope_accuracy",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads((output / "results.json").read_text())
    for record in found["settings"].values():
        scores = {score["task"]: score for score in record["scores"] if score["name"] == score["task"]}
        assert list(scores) == list(STOCK)
        assert scores["pope"]["metric"] == "pope_accuracy"
        assert scores["mme"]["metric"] == "mme_perception_score"
        assert record["metrics"]["pope"].keys() >= {"pope_f1_score,none", "pope_recall,none"}
        # lmms-eval sums it up in a table of its module: a second setting must not find the first one's sums there.
        assert scores["ocrbench"]["value"] == pytest.approx(4 / 1000)
        assert list(record["by_task"]) == list(STOCK)
        counts = [cost["tokens"]["kept"] for cost in record["by_task"].values()]
        assert sum(counts) / len(counts) == pytest.approx(record["tokens"]["kept"])
        assert len(record["answers"]) == 4 * len(STOCK)
    table = (output / "table.md").read_text()
    for word in ("# Every metric", "pope: pope_recall", "# Cost by task", "| ocrbench |"):
        assert word in table
    # What tasks write for a server lies beside the results, not where the command was given.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "data", "out"]
    assert list(output.glob("cells/*/submissions/textvqa*.json"))


def test_a_group_runs_on_files_of_its_tasks(tmp_path: Path) -> None:
    write_stock(tmp_path, "scienceqa_img")
    words = ("--tasks", "scienceqa_full", "--methods", "grid", "--keep", "25%", "--max-new-tokens", "3")
    missing = run(*words, "--data", tmp_path, "--output", tmp_path / "out")
    assert missing.exit_code == 2
    assert "cannot load the data of scienceqa_full" in missing.stderr
    (tmp_path / "scienceqa.parquet").write_bytes((tmp_path / "scienceqa_img.parquet").read_bytes())
    result = run(*words, "--data", tmp_path, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    for record in found["settings"].values():
        assert {score["task"] for score in record["scores"]} == {"scienceqa", "scienceqa_img"}
        assert len(record["answers"]) == 8


@pytest.mark.slow
def test_prompts_are_those_of_the_model_that_is_named(tmp_path: Path) -> None:
    write_stock(tmp_path, "pope")
    ends = []
    for name in (None, "plm"):
        with open_suite(["pope"], None, 0, data=tmp_path, prompts=name) as suite:
            task = suite.manager.load_task_or_group(["pope"], "chat")["pope"]
            ends.append(task.doc_to_text(task.test_docs()[0]).splitlines()[-1])
    assert ends == ["Answer the question using a single word or phrase.", "Your response must be concise."]


def test_data_that_cannot_be_had_are_named_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("vtprune.loading.model.load_model", never)
    result = run("--tasks", "pope", "--output", tmp_path / "out", "--data", tmp_path)
    assert result.exit_code == 2
    assert f"there is none of pope.parquet in {tmp_path}" in " ".join(result.stderr.split())


def test_a_suite_says_its_tasks_and_their_metrics() -> None:
    assert set(SUITES) == {"llava", "ocr", "video", "bundled"}
    found = which_questions(None, ["ocr"], [])
    assert found["tasks"] == tuple(SUITES["ocr"])
    assert dict(found["metrics"]) == SUITES["ocr"]
    both = which_questions("pope,vtprune_shapes", ["llava", "ocr"], ["pope=pope_accuracy"])
    assert both["tasks"][:2] == ("pope", "vtprune_shapes")
    assert len(both["tasks"]) == len(set(both["tasks"])) == 1 + len({**SUITES["llava"], **SUITES["ocr"]})
    assert dict(both["metrics"])["pope"] == "pope_accuracy"
    assert "vtprune_shapes" not in dict(both["metrics"])
    assert which_questions(None, [], []) == {"tasks": ("vtprune_shapes",), "metrics": ()}
    assert dict(which_questions(None, ["bundled"], ["accuracy"])["metrics"])["vtprune_pairs"] == "accuracy"


@pytest.mark.parametrize(
    ("suites", "metrics", "message"),
    [
        (["lava"], [], "suite: there is no 'lava'; there are llava, ocr, video, bundled"),
        ([], ["pope=pope_accuracy"], "metric: 'pope' is not among the tasks: vtprune_shapes"),
        ([], ["vtprune_shapes="], "metric: cannot read 'vtprune_shapes='"),
    ],
)
def test_suites_and_metrics_that_there_are_not_are_named(suites: list[str], metrics: list[str], message: str) -> None:
    with pytest.raises(VTPruneError, match=message):
        which_questions(None, suites, metrics)


@pytest.mark.slow
@pytest.mark.parametrize("suite", SUITES)
def test_lmms_eval_knows_the_tasks_of_each_suite_and_their_metrics(suite: str) -> None:
    from lmms_eval.tasks import TaskManager
    from lmms_eval.utils import load_yaml_config

    from vtprune.evals.lmms.plugin import TASK_FOLDER

    manager = TaskManager("ERROR", include_path=[str(TASK_FOLDER)])
    for task, metric in SUITES[suite].items():
        assert task in manager.all_tasks
        path = manager.task_index[task]["yaml_path"]
        own = load_yaml_config(path, mode="simple") if path != -1 else {}
        known = [entry["metric"] for entry in own.get("metric_list", ())]
        assert metric in ("", *known) or "group" in own


def test_the_metric_that_is_asked_for_is_shown_and_one_that_there_is_not_is_named() -> None:
    results = {"f1,none": 0.5, "f1_stderr,none": "N/A", "accuracy,none": 0.75, "submission,none": None}
    assert main_metric("t", results)[0] == "f1"
    assert main_metric("t", results, "accuracy") == ("accuracy", 0.75, None)
    with pytest.raises(RuntimeError, match="t: it has no metric 'recall', it has f1, accuracy"):
        main_metric("t", results, "recall")


def test_a_number_that_is_no_mean_of_its_samples_has_no_error_of_theirs() -> None:
    samples = [{"doc_id": i, "doc": {"category": "c"}, "total": {"score": 1.0 * (i < 3)}} for i in range(4)]
    (score,) = task_scores("t", {"total,none": 175.0}, samples)
    assert (score.value, score.stderr) == (175.0, None)
    whole, part = task_scores("t", {"total,none": 0.75}, samples)
    assert whole.stderr == part.stderr == pytest.approx(0.2165, abs=1e-4)


def record(label: str, *answers: list[float]) -> dict[str, Any]:
    scores = [
        {
            "name": name,
            "task": name,
            "metric": "a",
            "value": sum(own) / len(own),
            "stderr": 0.1,
            "count": len(own),
        }
        for name, own in zip(("t0", "t1"), answers, strict=False)
    ]
    return {"method": label, "label": label, "keep": 0.5, "scores": scores, "correct": [*chain(*answers)]}


def test_the_error_of_a_share_is_that_of_answers_in_pairs() -> None:
    unpruned = record("none", [1.0, 1.0, 1.0, 0.0], [1.0, 1.0])
    same = kept_score(record("grid", [1.0, 1.0, 1.0, 0.0], [1.0, 1.0]), unpruned)
    assert same is not None
    assert (same.value, same.stderr) == (1.0, 0.0)
    fewer = kept_score(record("grid", [1.0, 1.0, 0.0, 0.0], [1.0, 0.0]), unpruned)
    assert fewer is not None
    assert fewer.value == pytest.approx((2 / 3 + 1 / 2) / 2)
    # By hand: what is left of each answer over share x unpruned, (1, 1, -2, 0) / 3 and (1, -1) / 2; the errors of
    # their means over the unpruned scores, sqrt(2 / 9 / 4) / 0.75 and 1 / 2; and of the mean of both tasks.
    assert fewer.stderr == pytest.approx((2 / 36 / 0.75**2 + 1 / 4) ** 0.5 / 2)


def test_tasks_without_an_unpruned_score_are_left_out_of_the_mean_and_named() -> None:
    unpruned, grid = record("none", [1.0, 1.0], [0.0, 0.0]), record("grid", [1.0, 0.0], [1.0, 0.0])
    share = kept_score(grid, unpruned)
    assert share is not None
    assert share.value == 0.5
    data = {
        "config": {"tasks": ["t0", "t1"], "model": "m"},
        "questions": [],
        "settings": {"a": unpruned, "b": grid},
        "machine": {"dtype": "float32", "device": "cpu", "processor": "p", "threads": 1},
        "versions": {},
    }
    said = "The mean share of the unpruned score leaves out where the unpruned model scores nothing: t1."
    assert said in notes(data)
    data["settings"] = {"a": record("none", [1.0, 1.0], [1.0, 0.0]), "b": grid}
    assert said not in notes(data)


def test_a_column_has_one_unit_and_a_category_may_be_called_as_its_task() -> None:
    records = [record("none", [1.0, 1.1]), record("grid", [0.9, 1.0])]
    table = markdown_table(quality_columns(records), records)
    assert "| 1.05 ± 0.10 |" in table
    assert "| 0.95 ± 0.10 |" in table
    odd = record("none", [1.0, 0.0])
    odd["scores"].append({**odd["scores"][0], "value": 1.0})
    assert [score["value"] for score in main_scores(odd)] == [0.5]


def test_a_metric_that_a_task_does_not_have_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    result = run("--metric", "nosuch", "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert "metric: vtprune_shapes has no 'nosuch', it has accuracy" in " ".join(result.stderr.split())


def test_every_model_is_looked_for_before_the_first_is_run(tmp_path: Path) -> None:
    for missing, said in (
        (tmp_path / "none", "is not a folder with a checkpoint"),
        ("no/such", "cannot load no/such"),
    ):
        result = run("--model", "tiny-qwen", "--model", missing, "--output", tmp_path / "out")
        assert result.exit_code == 2
        assert said in " ".join(result.stderr.split())
        assert not (tmp_path / "out").exists()


def test_data_may_lie_in_a_folder_with_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "of [2026] *"
    folder.mkdir()
    write_stock(folder, "pope")
    with open_suite(["pope"], None, 0, data=folder) as suite:
        assert len(suite.manager.load_task_or_group(["pope"], "chat")["pope"].test_docs()) > 0


def test_two_models_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder / "mine").mkdir(parents=True)
    result = run("--model", tmp_path / "a" / "mine", "--model", tmp_path / "b" / "mine", "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert "model: two of them would have one folder in --output (mine, mine)" in " ".join(result.stderr.split())


def test_several_models_have_folders_of_their_own() -> None:
    assert folder_name(None) == "tiny-llava"
    assert folder_name("tiny-qwen") == "tiny-qwen"
    assert folder_name("llava-hf/llava-1.5-7b-hf") == "llava-hf__llava-1.5-7b-hf"
