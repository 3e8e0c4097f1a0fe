"""The sweep: what it writes, that it goes on after an interruption, and how it fails."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner, Result

import vtprune
from tests.checkpoint import png, random_checkpoint, random_qwen3_checkpoint, write_task
from tests.evals.choices import NAME, write_choices
from vtprune import adapters
from vtprune.cli.app import app
from vtprune.cli.bench import what_to_run
from vtprune.evals import settings
from vtprune.evals.bench.bench import SHORT_METHODS, BenchConfig, run_bench
from vtprune.evals.bench.plots import method_styles, pareto_png
from vtprune.evals.bench.scores import main_metric, standard_error, task_scores
from vtprune.evals.bench.tables import kept_score, markdown_table, quality_columns
from vtprune.evals.lmms import model as lmms_model
from vtprune.evals.lmms.shapes_task import process_results
from vtprune.evals.settings import Setting
from vtprune.files import held
from vtprune.method.catalogue import own_methods

METHODS = ("--methods", "grid,flowcut", "--keep", "0.25")
SETTINGS = [Setting("none"), Setting("grid", 0.25), Setting("flowcut", 0.25)]
# What must be the same however often a run was interrupted: all but the times.
NUMBERS = ("pruner", "scores", "tokens", "flops", "kv", "answers", "correct", "kept_tokens")


def bench(output: Path, *arguments: str | Path) -> Result:
    words = ["bench", "--model", random_checkpoint(), "--output", output, "--limit", "10", *arguments]
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(word) for word in words])


def read(output: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((output / "results.json").read_text())
    return data


def numbers(data: dict[str, Any]) -> dict[str, Any]:
    return {key: {name: record[name] for name in NUMBERS} for key, record in data["settings"].items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run that nothing disturbed."""
    output = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(output / "cache"))
        result = bench(output, *METHODS)
    assert result.exit_code == 0, result.output
    assert "Accuracy" in result.output
    assert "it/s" not in result.output + result.stderr
    return output


def test_results_hold_achieved_costs_and_every_answer(finished: Path) -> None:
    data = read(finished)
    assert list(data["settings"]) == [setting.key() for setting in SETTINGS]
    assert {"vtprune", "torch", "transformers", "lmms-eval"} <= data["versions"].keys()
    assert data["machine"]["dtype"] == "float32"
    assert len(data["questions"]) == 10
    none, grid, flowcut = data["settings"].values()
    assert (none["tokens"]["kept"], none["flops"]["share"], none["kv"]["share"]) == (144, 1.0, 1.0)
    for record in (grid, flowcut):
        assert record["tokens"]["before"] == 144
        assert record["tokens"]["kept"] == 36
        assert 0 < record["flops"]["share"] < 1
        assert 0.25 < record["kv"]["share"] < 0.5
    assert flowcut["flops"]["scoring_share"] > grid["flops"]["scoring_share"] == 0
    assert flowcut["prefill"]["over_scoreless_ms"] is not None
    for record in (none, grid, flowcut):
        assert len(record["answers"]) == len(record["correct"]) == len(record["kept_tokens"]) == 10
        assert record["prefill"]["ms"] > 0
        assert 0.05 < record["prefill"]["ratio"] < 20
        assert {score["name"] for score in record["scores"]} == {
            "vtprune_shapes", "attribute", "counting", "existence", "position", "reading"
        }  # fmt: skip
    assert not list(finished.rglob(".*"))


def test_each_cell_has_a_folder_with_what_it_was_made_with_and_every_sample(finished: Path) -> None:
    data = read(finished)
    cells = {json.loads((folder / "config.json").read_text())["key"]: folder for folder in finished.glob("cells/*")}
    assert cells.keys() == data["settings"].keys()
    for key, record in data["settings"].items():
        names = sorted(path.name for path in cells[key].iterdir())
        assert names == ["config.json", "metrics.json", "samples.jsonl"]
        about = json.loads((cells[key] / "config.json").read_text())
        assert about["setting"]["pruner"] == record["pruner"]
        assert about["config"] == data["config"]
        assert about["versions"] == data["versions"]
        metrics = json.loads((cells[key] / "metrics.json").read_text())
        assert metrics == {name: value for name, value in record.items() if name in metrics}
        assert {"scores", "metrics", "tokens", "flops", "kv", "prefill"} <= metrics.keys()
        samples = [json.loads(line) for line in (cells[key] / "samples.jsonl").read_text().splitlines()]
        assert [sample["question"] for sample in samples] == data["questions"]
        assert [sample["answer"] for sample in samples] == record["answers"]
        assert [sample["scores"]["accuracy"] for sample in samples] == record["correct"]
        flops = sum(sample["cost"]["flops"] for sample in samples)
        assert flops == pytest.approx(record["flops"]["mean"] * len(samples))


def test_table_and_picture_are_written(finished: Path) -> None:
    table = (finished / "table.md").read_text()
    for word in ("flowcut", "± ", "36.0 of 144.0", "counting", "Versions: python"):
        assert word in table
    assert Image.open(finished / "pareto.png").width > 1000


def test_pruned_answers_are_those_of_the_method(finished: Path) -> None:
    record = read(finished)["settings"][Setting("flowcut", 0.25).key()]
    lm = lmms_model.VTPrune(random_checkpoint(), method="flowcut", keep=0.25)
    with results_suite() as suite:
        from lmms_eval.evaluator import simple_evaluate

        raw = simple_evaluate(
            model=lm, tasks=list(suite.tasks), task_manager=suite.manager, limit=suite.limit, bootstrap_iters=0
        )
    samples = raw["samples"]["vtprune_shapes"]
    assert [sample["filtered_resps"][0] for sample in samples] == record["answers"]


def results_suite() -> Any:
    from vtprune.evals.bench.suite import open_suite

    return open_suite(["vtprune_shapes"], 10, 0)


def interrupt_after(patch: pytest.MonkeyPatch, batches: int, error: BaseException) -> list[int]:
    """Lets so many batches be answered and then raises; returns a list that counts them."""
    answered: list[int] = []
    answer = lmms_model.answer_batch

    def counted(*arguments: Any, **options: Any) -> Any:
        if len(answered) == batches:
            raise error
        answered.append(1)
        return answer(*arguments, **options)

    patch.setattr(lmms_model, "answer_batch", counted)
    return answered


def test_an_interrupted_run_goes_on_where_it_stopped(finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    options = (*METHODS, "--batch-size", "4")  # three batches a setting
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 5, KeyboardInterrupt())
        result = bench(output, *options)
    assert result.exit_code == 130
    assert "the same command goes on" in result.stderr
    first = read(output)
    assert list(first["settings"]) == [SETTINGS[0].key()]
    with pytest.MonkeyPatch.context() as patch:
        answered = interrupt_after(patch, 100, KeyboardInterrupt())
        result = bench(output, *options)
    assert result.exit_code == 0, result.output
    assert "1 of 3 settings are in" in result.output
    assert len(answered) == 4  # one batch was left of the second setting, three of the third
    data = read(output)
    assert data["settings"][SETTINGS[0].key()] == first["settings"][SETTINGS[0].key()]
    assert data["questions"] == read(finished)["questions"]
    again = numbers(data)
    for key, record in numbers(read(finished)).items():
        # Batches of another size put other rows together, which moves per-row means in their last digits.
        for name in ("pruner", "scores", "answers", "correct", "kept_tokens"):
            assert again[key][name] == record[name]
        assert again[key]["flops"]["share"] == pytest.approx(record["flops"]["share"], rel=1e-12)


def test_a_finished_run_computes_nothing_again(finished: Path) -> None:
    before = numbers(read(finished))
    with pytest.MonkeyPatch.context() as patch:
        answered = interrupt_after(patch, 0, AssertionError("nothing is to be answered"))
        result = bench(finished, *METHODS)
    assert result.exit_code == 0, result.output
    assert not answered
    assert numbers(read(finished)) == before


def test_a_lost_results_file_is_made_of_the_cells_again(finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    whole = read(output)
    (output / "results.json").unlink()
    # Of one cell the run was killed while it wrote it; another one is of a machine that computes in less precision.
    cut, other = (next(output.glob(f"cells/{name}-*")) for name in ("grid", "flowcut"))
    lines = (cut / "samples.jsonl").read_text()
    (cut / "samples.jsonl").write_text(lines[: len(lines) // 2])
    about = json.loads((other / "config.json").read_text())
    about["machine"]["dtype"] = "bfloat16"
    (other / "config.json").write_text(json.dumps(about))
    with pytest.MonkeyPatch.context() as patch:
        answered = interrupt_after(patch, 100, KeyboardInterrupt())
        result = bench(output, *METHODS)
    assert result.exit_code == 0, result.output
    assert "1 of 3 settings are in" in result.output
    assert len(answered) == 2
    assert read(output)["questions"] == whole["questions"]
    assert numbers(read(output)) == numbers(whole)
    unpruned = Setting("none").key()
    assert read(output)["settings"][unpruned] == whole["settings"][unpruned]


def test_tasks_that_ask_how_likely_given_answers_are_run_as_others_do(tmp_path: Path) -> None:
    write_choices(tmp_path, 4)
    words = ["bench", "--methods", "none,grid", "--include-path", str(tmp_path), "--output", str(tmp_path / "out")]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*words, "--tasks", NAME])
    assert result.exit_code == 0, result.output
    none, grid = read(tmp_path / "out")["settings"].values()
    targets = [question["target"] for question in read(tmp_path / "out")["questions"]]
    assert none["answers"] == targets
    assert none["correct"] == [1.0] * 4
    assert [answer == target for answer, target in zip(grid["answers"], targets, strict=True)] == [
        number == 1.0 for number in grid["correct"]
    ]
    # Costs are those of one given answer, not of all four.
    assert (none["tokens"]["kept"], grid["tokens"]["kept"]) == (144, 36)
    assert none["flops"]["share"] == 1 > grid["flops"]["share"]
    words[-1] = str(tmp_path / "both")
    both = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*words, "--tasks", f"vtprune_shapes,{NAME}"])
    assert both.exit_code == 2
    assert f"{NAME} asks how likely given answers are, and vtprune_shapes for answers; run them apart" in both.stderr


def test_the_dearest_of_hard_pictures_stands_beside_the_mean(tmp_path: Path) -> None:
    # A folder is a method at its own keep: here thresholds decide.
    vtprune.save_config(vtprune.MustDrop(), tmp_path / "thresholds")
    methods = f"grid,{tmp_path / 'thresholds'}"
    result = bench(tmp_path, "--methods", methods, "--keep", "0.25", "--worst")
    assert result.exit_code == 0, result.output
    none, grid, mustdrop = read(tmp_path)["settings"].values()
    assert none["worst"]["share"] == 1.0
    # A count that is fixed costs the same on every picture; one that follows from thresholds does not.
    assert {cost["kept"] for cost in grid["worst"]["pictures"].values()} == {36}
    assert grid["flops"]["share"] < grid["worst"]["share"] < grid["flops"]["share"] * 1.02
    pictures = mustdrop["worst"]["pictures"]
    assert len({cost["kept"] for cost in pictures.values()}) > 1
    assert mustdrop["worst"]["share"] == max(cost["flops"] / cost["flops_full"] for cost in pictures.values())
    assert f"({mustdrop['worst']['picture']})" in (tmp_path / "table.md").read_text()


def test_another_run_is_not_mixed_in(finished: Path) -> None:
    result = bench(finished, *METHODS, "--seed", "1")
    assert result.exit_code == 2
    assert "seed was 0 and is now 1" in result.stderr
    assert "--no-resume" in result.stderr


def test_results_of_other_code_are_set_aside(finished: Path, tmp_path: Path) -> None:
    old = {**read(finished), "created": "2026-01-02T03:04:05+00:00"}
    old["config"]["code"] = "older"
    (tmp_path / "results.json").write_text(json.dumps(old))
    result = bench(tmp_path, *METHODS)
    assert result.exit_code == 0, result.output
    assert "starting afresh" in result.output
    assert json.loads((tmp_path / "results-20260102030405.json").read_text()) == old
    assert numbers(read(tmp_path)) == numbers(read(finished))


def test_no_resume_starts_afresh(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{")
    (tmp_path / "cells" / "grid-9-0").mkdir(parents=True)
    result = bench(tmp_path, "--methods", "grid", "--keep", "9")
    assert result.exit_code == 2
    assert "is not a results file" in result.stderr
    result = bench(tmp_path, "--methods", "grid", "--keep", "9", "--no-resume", "--seed", "1")
    assert result.exit_code == 0, result.output
    assert read(tmp_path)["settings"][Setting("grid", 9).key()]["tokens"]["kept"] == 9
    assert len(list(tmp_path.glob("cells/*"))) == 2
    assert list(tmp_path.glob("cells-old/*")) == [tmp_path / "cells-old" / "grid-9-0"]


def test_a_full_disk_keeps_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    replace, calls = os.replace, []

    def full(source: Any, target: Any) -> None:
        # The sample of questions is written elsewhere, where there is room.
        calls.extend([target] if Path(target).parent == output else [])
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    result = bench(output, *METHODS)
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(read(output)["settings"]) == [SETTINGS[0].key()]
    assert not list(output.glob("*.part"))


def test_a_broken_sample_is_named_and_answers_are_kept(tmp_path: Path) -> None:
    output, whole = tmp_path / "out", png(200, 200, "blue")
    images = [png(96, 96), png(1, 1), whole[: len(whole) // 2], png(20000, 10)]
    write_task(tmp_path, "vtprune_broken", images)
    options = ("--tasks", "vtprune_broken", "--include-path", tmp_path, "--methods", "grid", "--batch-size", "2")
    result = bench(output, *options)
    assert result.exit_code == 1
    assert "vtprune_broken, sample 2 (picture-2): cannot be read: image file is truncated" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    images[2] = whole
    write_task(tmp_path, "vtprune_broken", images)
    with pytest.MonkeyPatch.context() as patch:
        answered = interrupt_after(patch, 100, KeyboardInterrupt())
        result = bench(output, *options, "--keep", "0.5")
    assert result.exit_code == 0, result.output
    assert len(answered) == 1 + 2
    assert len(read(output)["settings"]) == 2


def test_a_model_without_an_adapter_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "ADAPTERS", adapters.ADAPTERS[1:])
    result = bench(tmp_path, *METHODS)
    assert result.exit_code == 2
    assert "no adapter for LlavaForConditionalGeneration" in result.stderr


def test_a_method_that_the_model_cannot_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any) -> Any:
        raise vtprune.VTPruneError("needs what this model has not")

    monkeypatch.setattr(vtprune.FlowCut, "resolve", refuse)
    result = bench(tmp_path, *METHODS)
    assert result.exit_code == 2
    assert "flowcut: needs what this model has not" in result.stderr
    assert not (tmp_path / "results.json").exists()
    monkeypatch.setattr("vtprune.evals.bench.bench.SHORT_METHODS", ("grid", "flowcut"))
    result = bench(tmp_path, "--keep", "0.25")
    assert result.exit_code == 0, result.output
    assert "Left out: flowcut at 25%: needs what this model has not." in result.output


def test_a_setting_that_cuts_no_image_is_named_and_the_others_are_run(tmp_path: Path) -> None:
    result = bench(tmp_path, "--methods", "turbo:layers=1,grid", "--keep", "10")
    assert result.exit_code == 1
    assert "no image could be cut to its budget: turbo: 1 encoder layers that halve the tokens" in result.stderr
    data = read(tmp_path)
    assert [record["method"] for record in data["settings"].values()] == ["none", "grid"]
    assert list(data["left_out"]) == ["turbo:layers=1 at 10"]
    assert "Left out: turbo:layers=1 at 10: no image" in (tmp_path / "table.md").read_text()


def test_scores_and_their_errors() -> None:
    assert standard_error([1.0, 0.0, 1.0, 0.0]) == pytest.approx((0.5 * 0.5 / 4) ** 0.5)
    assert standard_error([1.0]) is None
    found = {"alias": "a task", "mme,none": 1200.5, "mme_stderr,none": "N/A", "mme_stderr_clt,none": 3.5}
    assert main_metric("mme", found) == ("mme", 1200.5, 3.5)
    samples = [{"doc": {"category": "ab"[i % 2]}, "accuracy": float(i < 3)} for i in range(8)]
    scores = task_scores("shapes", {"accuracy,none": 0.375}, samples)
    assert [(score.name, score.value, score.count) for score in scores] == [
        ("shapes", 0.375, 8),
        ("a", 0.5, 4),
        ("b", 0.25, 4),
    ]


@pytest.mark.parametrize("answer", ["Top left", " top  left. ", "TOP-left!"[:3] + " left"])
def test_exact_match_forgives_case_spaces_and_punctuation(answer: str) -> None:
    assert process_results({"answer": "top left"}, [answer]) == {"accuracy": 1.0}
    assert process_results({"answer": "top right"}, [answer]) == {"accuracy": 0.0}


def record(method: str, share: float, value: float) -> dict[str, Any]:
    score = {"name": "t", "task": "t", "metric": "accuracy", "value": value, "stderr": 0.02, "count": 9}
    part = {"share": share, "end_share": share}
    return {"method": method, "label": method, "keep": share, "scores": [score], "flops": part, "kv": part}


def test_the_pareto_plot_takes_many_methods_and_none() -> None:
    records = [record("none", 1.0, 0.9)]
    assert pareto_png(records, "one").startswith(b"\x89PNG")
    names = ["random", "grid", "pool", *(f"method_{i}" for i in range(20))]
    records += [record(name, share, 0.4 + share / 2) for name in names for share in (0.1, 0.25, 0.5)]
    assert Image.open(io.BytesIO(pareto_png(records, "many"))).size == (1725, 1185)


def test_tables_compare_with_the_unpruned_model() -> None:
    records = [record("none", 1.0, 0.8), record("grid", 0.25, 0.4)]
    share = kept_score(records[1], records[0])
    assert share is not None
    assert share.value == pytest.approx(0.5)
    table = markdown_table(quality_columns(records), records)
    assert "| grid | 25% | 40.0 ± 2.0 | 50.0 |" in table


def test_a_folder_with_trained_weights_runs_on_the_model_that_lies_beside_them(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder, alone = tmp_path / "trained", tmp_path / "weights-alone"
    model = AutoModelForImageTextToText.from_pretrained(random_checkpoint())
    with torch.no_grad():
        for weight in model.get_output_embeddings().parameters():
            weight.neg_()
        model.save_pretrained(folder)
        AutoProcessor.from_pretrained(random_checkpoint()).save_pretrained(folder)
        vtprune.wrap(model, "pmod")
        for name, weight in model.named_parameters():
            if name.startswith("vtprune_weights"):
                weight.normal_()
    vtprune.save(model, folder)
    with torch.no_grad():
        # The weights alone are of the base that the bench runs on.
        for weight in model.get_output_embeddings().parameters():
            weight.neg_()
    vtprune.save(model, alone)
    result = bench(tmp_path / "out", "--methods", f"{folder},{alone},pmod", "--keep", "0.6")
    assert result.exit_code == 0, result.output
    none, trained, weights, untrained = read(tmp_path / "out")["settings"].values()
    assert [record["label"] for record in (trained, weights, untrained)] == ["trained", "weights-alone", "pmod"]
    assert trained["answers"] != weights["answers"]
    for record in (trained, weights, untrained):
        assert 0 < record["tokens"]["share"] < 0.7
        assert none["flops"]["share"] > record["flops"]["share"] > 0
    again = bench(tmp_path / "out", "--methods", str(folder))
    assert "2 of 2 settings are in" in again.output
    (alone / "vtprune_weights.safetensors").unlink()
    refused = bench(tmp_path / "other", "--methods", str(alone))
    assert refused.exit_code == 2
    assert "vtprune train" in refused.output


def test_methods_that_have_to_be_trained_are_not_among_the_defaults() -> None:
    from vtprune.evals.settings import all_methods

    assert not {"pmod", "random_ltd"} & set(all_methods())
    assert {"fastv", "d2o", "lazyllm", "mue"} <= set(all_methods())


def test_what_another_run_makes_is_not_put_aside(finished: Path) -> None:
    before = {path.name: path.read_bytes() for path in finished.iterdir() if path.is_file()}
    with held(next(finished.glob("cells/*"))):
        result = bench(finished, *METHODS, "--no-resume")
    assert result.exit_code == 2
    assert f"another run is writing into {finished}; wait until it has ended" in " ".join(result.stderr.split())
    assert {path.name: path.read_bytes() for path in finished.iterdir() if path.is_file()} == before


def test_a_model_may_be_spread_over_devices(finished: Path, tmp_path: Path) -> None:
    refused = bench(tmp_path / "a", *METHODS, "--device-map", "auto", "--device", "cpu")
    assert refused.exit_code == 2
    assert "leave out device=cpu" in refused.stderr
    spread = bench(tmp_path / "b", *METHODS, "--device-map", '{"": "cpu"}')
    assert spread.exit_code == 0, spread.output
    assert numbers(read(tmp_path / "b")) == numbers(read(finished))


def test_tables_of_something_else_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "table.md").write_text("mine")
    result = bench(tmp_path, *METHODS)
    assert result.exit_code == 2
    assert "holds table.md, but no results.json" in " ".join(result.stderr.split())
    assert (tmp_path / "table.md").read_text() == "mine"


def test_without_a_terminal_every_setting_has_a_line_before_the_next_one_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vtprune.evals.bench.sweep import Sweep

    seen: list[str] = []
    out = io.StringIO()
    run = Sweep.run

    def watched(self: Sweep, setting: Setting) -> dict[str, Any]:
        seen.append(out.getvalue())
        return run(self, setting)

    monkeypatch.setattr(Sweep, "run", watched)
    config = BenchConfig(("grid", "random"), (9,), tmp_path, model=str(random_checkpoint()), limit=10, batch_size=4)
    run_bench(config, Console(file=out, width=200))
    first, second, third = seen
    assert "running 3 settings on" in first
    assert "each on 10 questions" in first
    assert "for all of it, by the" in second
    assert re.search(r"\[1/3\] none: accuracy .*; [0-9.]+ s, 0:\d\d in all, about 0:\d\d left", second)
    assert re.search(r"\[2/3\] grid at 9: .* 9\.0 of 144\.0 tokens", third)


def test_the_short_list_has_the_baselines_and_every_stage_and_is_no_everything() -> None:
    names = ("none", *SHORT_METHODS, "pmod")
    stages = {part for name in names for part in vtprune.available()[name].stage.split(", ")}
    # YOPO alone changes layers, and means little on a model that was not trained for it.
    others = {part for info in own_methods().values() for part in info.stage.split(", ")}
    assert stages == others - {"attention and MLP"}
    assert {"random", "grid"} < set(SHORT_METHODS)
    per_stage = Counter(vtprune.available()[name].stage for name in SHORT_METHODS[2:])
    assert max(per_stage.values()) <= 2
    assert what_to_run(["vtprune_shapes"], None, None, everything=False, limit=None, model=None) == {
        "tasks": ("vtprune_shapes",),
        "methods": (*SHORT_METHODS, *settings.trained_folders()),
        "keeps": (0.25,),
        "limit": 500,
        "lenient": True,
    }
    everything = what_to_run(["vtprune_shapes"], None, None, everything=True, limit=None, model=None)
    assert set(settings.all_methods()) <= set(everything["methods"])
    assert everything["limit"] is None


def test_each_method_has_a_colour_and_a_marker_of_its_own() -> None:
    names = ["random", "grid", "pool", "grid", *(f"method_{i}" for i in range(60))]
    styles = method_styles(names)
    assert len({(style["color"], style["marker"], style.get("linestyle")) for style in styles}) == len(names)
    coloured = [style["color"] for style in styles[3:27]]
    assert len(set(coloured)) == len(coloured)
    assert len({(style["color"], style["marker"]) for style in styles[3:]}) == len(names) - 3


def test_pictures_with_fewer_pixels_are_a_row_beside_the_methods(tmp_path: Path) -> None:
    folder = random_qwen3_checkpoint(experts=False)
    words = ["bench", "--model", folder, "--methods", "downscale,random", "--keep", "25%", "--limit", "4"]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*words, "--output", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    records = read(tmp_path / "run")["settings"]
    settings_of = Setting("none"), Setting("downscale", 0.25), Setting("random", 0.25)
    none, smaller, random = (records[one.key()] for one in settings_of)
    assert smaller["pruner"] == {"method": "downscale", "keep": 0.25}
    assert smaller["tokens"]["before"] == none["tokens"]["kept"] == 9
    assert smaller["tokens"]["kept"] == random["tokens"]["kept"] == 2
    assert smaller["tokens"]["share"] == pytest.approx(2 / 9)
    # A small picture is cheaper in the tower, too; the cache is that of as many tokens.
    assert smaller["flops"]["share"] < random["flops"]["share"] < 1
    assert smaller["flops"]["unpruned"] == random["flops"]["unpruned"] == none["flops"]["mean"]
    assert smaller["kv"]["share"] == pytest.approx(random["kv"]["share"])
    times = smaller["prefill"]
    assert times["ratio"] == pytest.approx(times["ms"] / times["unpruned_ms"])


def test_a_model_that_sees_one_size_takes_no_smaller_pictures(tmp_path: Path) -> None:
    result = bench(tmp_path / "run", "--methods", "downscale", "--keep", "25%")
    assert result.exit_code == 2
    assert "downscale: CLIPImageProcessor makes pictures of one size" in " ".join(result.output.split())
    assert not (tmp_path / "run" / "results.json").exists()
