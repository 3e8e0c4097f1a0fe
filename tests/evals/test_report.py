"""`vtprune report`: what it reads, what it puts together and apart, and what it makes of the numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tests.evals.report_files import ALL_RIGHT, bench, costs, lmms, record
from vtprune.cli.app import app
from vtprune.evals.report.comparing import category_losses, duels, front, overall_share
from vtprune.evals.report.content import Report, Table, make_report
from vtprune.evals.report.reading import Group, read_all, told_apart
from vtprune.evals.report.runs import Row

HALF = (1.0, 0.0) * 4
MANY = 40


def report(*arguments: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["report", *map(str, arguments)])


def group_of(*places: Path) -> Group:
    found = read_all(places)
    assert not found.broken
    (group,) = found.groups
    return group


def row_of(group: Group, label: str) -> Row:
    return next(row for row in group.rows if row.label == label)


def table_of(content: Report, title: str) -> Table:
    return next(table for section in content.sections for table in section.tables if table.title.startswith(title))


def texts(table: Table) -> list[list[str]]:
    return [[cell.text for cell in row] for row in table.rows]


def test_a_bench_folder_is_read_with_what_its_answers_say(tmp_path: Path) -> None:
    group = group_of(bench(tmp_path / "one", record("flowcut", 0.25, HALF)))
    row = row_of(group, "flowcut")
    assert (row.keep, row.scores["shapes"].value, row.costs.flops) == (0.25, 0.5, 0.5)
    share = overall_share(group, row)
    assert share is not None
    assert share.value == 0.5
    # Half of 8 differences are 0 and half are 1: a variance of 2/7 over 8.
    assert share.stderr == pytest.approx((2 / 7 / 8) ** 0.5)


def test_folders_are_searched_to_the_bottom(tmp_path: Path) -> None:
    bench(tmp_path / "a" / "b", record("flowcut", 0.25, HALF))
    lmms(tmp_path / "a" / "c" / "model", {"t": {"acc,none": 0.5}}, model_args="pretrained=a/model")
    assert {run.path.name for group in read_all([tmp_path]).groups for run in group.runs} == {
        "results.json",
        "20260101_000000_results.json",
    }


def test_runs_of_one_identity_are_one_part(tmp_path: Path) -> None:
    bench(tmp_path / "one", record("flowcut", 0.25, HALF))
    bench(tmp_path / "two", record("grid", 0.25, HALF))
    group = group_of(tmp_path)
    assert [row.label for row in group.rows] == ["none", "flowcut", "grid"]
    assert not group.twice


def test_runs_whose_main_metrics_of_a_task_differ_are_apart_and_headed_apart(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"model_args": "pretrained=a/model"}
    lmms(tmp_path / "one", {"t": {"acc,none": 0.5}}, **arguments)
    lmms(tmp_path / "two", {"t": {"f1,none": 0.25}}, date="20260102_000000", **arguments)
    one, two = told_apart(read_all([tmp_path]).groups)
    assert one != two
    assert "f1" in two
    lmms(tmp_path / "three", {"t": {"f1,none": 0.5}, "u": {"acc,none": 1.0}}, date="20260103_000000", **arguments)
    first, second = read_all([tmp_path]).groups
    assert [score.metric for row in first.rows for score in row.scores.values()] == ["acc"]
    (row,) = second.rows
    assert {task: (score.metric, score.value) for task, score in row.scores.items()} == {
        "t": ("f1", 0.5),
        "u": ("acc", 1.0),
    }


def test_tasks_without_an_unpruned_score_are_left_out_of_the_mean_and_named(tmp_path: Path) -> None:
    for name, score in (("", (0.5, 0.0)), (",method=grid,keep=0.25", (0.25, 0.5))):
        results = {task: {"acc,none": value} for task, value in zip(("t", "u"), score, strict=True)}
        lmms(tmp_path / f"of{len(name)}", results, model_args=f"pretrained=a/model{name}")
    group = group_of(tmp_path)
    share = overall_share(group, row_of(group, "grid"))
    assert share is not None
    assert share.value == 0.5
    (section,) = make_report(read_all([tmp_path])).sections
    assert any("leaves out where the unpruned model scores nothing: u." in note for note in section.notes)


@pytest.mark.parametrize(
    "config", [{"model": "b"}, {"data": "e"}, {"limit": 9}, {"seed": 1}, {"code": "other"}, {"max_new_tokens": 3}]
)
def test_runs_of_another_identity_are_apart_and_headed_apart(tmp_path: Path, config: dict[str, Any]) -> None:
    bench(tmp_path / "one", record("flowcut", 0.25, HALF))
    bench(tmp_path / "two", record("flowcut", 0.25, HALF), config=config)
    groups = read_all([tmp_path]).groups
    assert [len(group.rows) for group in groups] == [2, 2]
    headings = [f"{group.model} {text}" for group, text in zip(groups, told_apart(groups), strict=True)]
    assert headings[0] != headings[1]


def test_another_dtype_is_another_part_even_where_none_was_asked_for(tmp_path: Path) -> None:
    bench(tmp_path / "one", record("flowcut", 0.25, HALF))
    bench(tmp_path / "two", record("flowcut", 0.25, HALF), machine={"dtype": "bfloat16"})
    assert len(read_all([tmp_path]).groups) == 2


def test_a_setting_that_was_measured_twice_is_never_averaged(tmp_path: Path) -> None:
    bench(tmp_path / "one", record("flowcut", 0.25, HALF))
    bench(tmp_path / "two", record("flowcut", 0.25, ALL_RIGHT), created="2026-02-01T00:00:00+00:00")
    group = group_of(tmp_path)
    assert row_of(group, "flowcut").scores["shapes"].value == 1.0
    (line,) = group.twice
    assert "measured twice" in line
    assert str(tmp_path / "two") in line


def samples(metric: str, scores: tuple[float, ...], **more: Any) -> list[dict[str, Any]]:
    return [{metric: score, **more} for score in scores]


def test_lmms_eval_folders_of_one_model_are_settings_of_one_part(tmp_path: Path) -> None:
    counts = {"kept_tokens": 10.0, "visual_tokens": 40, "flops": 3, "flops_full": 4, "kv_bytes": 1, "kv_bytes_full": 4,
              "kv_bytes_end": 1, "kv_bytes_end_full": 2, "prefill_ms": 5.0}  # fmt: skip
    for place, (arguments, scores) in enumerate([("", (1.0, 1.0, 1.0, 0.0)), (",method=flowcut,keep=0.25", HALF[:4])]):
        found = {"t": {"alias": "t", "acc,none": sum(scores) / 4, "acc_stderr,none": 0.2, **costs(64, 30)}}
        lmms(
            tmp_path, found, model_args=f"pretrained=a/model{arguments}", date=f"2026010{place + 1}_000000",
            samples={"t": samples("acc", scores, token_counts=[counts])},
        )  # fmt: skip
    group = group_of(tmp_path)
    row = row_of(group, "flowcut")
    assert (row.keep, row.costs.kept, row.costs.flops, row.costs.kv_end) == (0.25, 10.0, 0.75, 0.5)
    share = overall_share(group, row)
    assert share is not None
    assert share.value == pytest.approx(2 / 3)
    assert share.stderr is not None


def test_tasks_that_were_run_apart_are_columns_of_one_setting(tmp_path: Path) -> None:
    for place, task in enumerate(("one", "two")):
        for number, arguments in enumerate(("", ",method=grid,keep=64")):
            date = f"2026010{place + 1}_00000{number}"
            found = {task: {"acc,none": 0.8 - 0.4 * number, **costs(64 + 64 * place, 30 + 20 * place)}}
            lmms(tmp_path, found, model_args=f"pretrained=a/model{arguments}", date=date)
    group = group_of(tmp_path)
    assert group.tasks == ["one", "two"]
    row = row_of(group, "grid")
    share = overall_share(group, row)
    assert share is not None
    assert (share.value, share.stderr) == (pytest.approx(0.5), None)
    assert (row.costs.kept, row.costs.flops) == (96, pytest.approx(0.4))


def test_another_model_of_lmms_eval_is_a_part_without_costs(tmp_path: Path) -> None:
    lmms(tmp_path, {"t": {"acc,none": 0.5}}, model="llava_hf", model_args="pretrained=a/model,device_map=cpu")
    content = make_report(read_all([tmp_path]))
    (section,) = content.sections
    assert section.title == "a/model"
    assert "lmms-eval --model llava_hf" in section.subtitle
    assert [table.title for table in section.tables] == ["Accuracy"]
    assert not section.pictures
    assert section.commands == [
        "python -m lmms_eval eval --model llava_hf --model_args pretrained=a/model,device_map=cpu --tasks t --limit 4 "
        "--log_samples --output_path results"
    ]


def test_a_sum_or_an_f1_score_is_not_taken_for_the_mean_of_its_answers(tmp_path: Path) -> None:
    found = {"t": {"f1,none": 0.9}}
    lmms(tmp_path, found, model_args="", samples={"t": samples("f1", HALF[:4])})
    assert not row_of(group_of(tmp_path), "none").scores["t"].answers


def test_a_method_that_nobody_trained_is_marked(tmp_path: Path) -> None:
    for place, arguments in enumerate(("", ",method=covipal,keep=64")):
        lmms(
            tmp_path,
            {"t": {"acc,none": 0.5}},
            model_args=f"pretrained=a{arguments}",
            date=f"2026010{place + 1}_000000",
        )
    content = make_report(read_all([tmp_path]))
    assert [row[0] for row in texts(table_of(content, "Accuracy"))] == ["unpruned", "covipal †"]
    assert any(note.startswith("† covipal is untrained") for note in content.sections[0].notes)


def answers(right: int) -> tuple[float, ...]:
    return (1.0,) * right + (0.0,) * (MANY - right)


def duelling(tmp_path: Path, *records: dict[str, Any]) -> Group:
    asked = [{"task": "shapes", "doc_id": place} for place in range(MANY)]
    own = {f"{one['label']}-{one['keep']}": one for one in (record("none", None, answers(MANY)), *records)}
    return group_of(bench(tmp_path, questions=asked, settings=own))


def test_a_win_needs_a_difference_that_the_whole_table_allows(tmp_path: Path) -> None:
    group = duelling(
        tmp_path,
        record("random", 0.25, answers(20)),
        record("grid", 0.25, answers(33)),
        record("flowcut", 0.25, answers(34)),
        record("fastv", 0.25, answers(6)),
    )
    found = {(one.row.label, one.baseline.label): one for one in duels(group, "shapes")}
    verdicts = {pair: one.verdict for pair, one in found.items()}
    assert verdicts == {
        ("flowcut", "random"): "win",
        ("flowcut", "grid"): "tie",
        ("fastv", "random"): "loss",
        ("fastv", "grid"): "loss",
    }
    # 14 wins and no loss, as fastv's 14 losses: the second and third smallest of four p-values, both times three.
    assert found["flowcut", "random"].p == pytest.approx(3 * 2 * 0.5**14)


def test_baselines_at_another_keep_or_with_options_are_not_met(tmp_path: Path) -> None:
    group = duelling(
        tmp_path,
        record("random", 0.5, answers(20)),
        record("random", 1, answers(20)),
        record("pool", 0.25, answers(20), label="pool:kind=max"),
        record("flowcut", 0.25, answers(34)),
        record("flowcut", 1.0, answers(34)),
    )
    assert duels(group, "shapes") == []


def test_the_front_has_what_nothing_cheaper_reaches(tmp_path: Path) -> None:
    group = duelling(
        tmp_path,
        record("a", 0.1, answers(10), flops=0.2),
        record("b", 0.1, answers(9), flops=0.3),
        record("c", 0.1, answers(30), flops=0.4),
        record("d", 0.1, answers(30), flops=0.4),
        record("e", 0.1, answers(30), flops=0.5),
    )
    best = front(group.rows, lambda row: row.costs.flops, lambda row: row.scores["shapes"].value)
    assert [row.label for row in best] == ["a", "c", "d", "none"]


def test_each_category_loses_what_the_unpruned_model_had(tmp_path: Path) -> None:
    group = group_of(bench(tmp_path, record("flowcut", 0.25, HALF)))
    names, changes = category_losses(group, "shapes")
    assert names == ["counting", "reading"]
    assert changes == {"flowcut-0.25": [0.0, -1.0]}
    heats = [cell.heat for cell in table_of(make_report(read_all([tmp_path])), "Lost").rows[-1]]
    assert heats == [None, None, 0.0, -1.0]


def test_the_tables_say_what_was_measured(tmp_path: Path) -> None:
    bench(tmp_path, record("flowcut", 0.25, HALF), left_out={"evs": "it compares frames"})
    content = make_report(read_all([tmp_path]))
    assert texts(table_of(content, "Accuracy")) == [
        ["unpruned", "-", "100.0 ± 10.0", "100.0 ± 0.0"],
        ["flowcut", "25%", "50.0 ± 10.0", "50.0 ± 18.9"],
    ]
    assert texts(table_of(content, "Cost"))[1] == [
        "flowcut", "25%", "36.0 of 144.0", "50.0", "50.0", "50.0", "10.0 (0.50x)",
    ]  # fmt: skip
    (section,) = content.sections
    assert section.commands == ["vtprune bench --limit 8"]
    assert section.notes == ["Left out: evs: it compares frames."]
    assert ("Machine", "a chip, 1 threads, float32, cpu") in section.facts


def test_both_files_are_written_and_what_cannot_be_read_is_named_in_them(tmp_path: Path) -> None:
    bench(tmp_path / "good", record("flowcut", 0.25, HALF))
    bad = bench(tmp_path / "bad") / "results.json"
    bad.write_text(bad.read_text()[:100])
    done = report(tmp_path / "good", bad.parent, "--output", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert f"{bad} is not" in done.stdout
    for name in ("report.html", "report.md"):
        text = (tmp_path / "out" / name).read_text()
        assert "flowcut" in text
        assert "results.json is not a results file" in text.replace("\\", "")


def another_format(folder: Path) -> None:
    path = bench(folder) / "results.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 1}))


def without_answers(folder: Path) -> None:
    bench(folder, questions=[])


def cut_samples(folder: Path) -> None:
    lmms(folder, {"t": {"acc,none": 1.0}}, model_args="", samples={"t": samples("acc", (1.0,))})
    next(folder.glob("*.jsonl")).write_text('{"doc_id": 0}\n{"doc')


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: folder.mkdir(), "holds no results"),
        (lambda folder: None, "is not there"),
        (another_format, "results.json has format 1, and this version reads format 2"),
        (without_answers, "none has 8 answers to 0 questions"),
        (lambda folder: bench(folder, settings={}), "holds no finished setting"),
        (lambda folder: lmms(folder, {}, model_args=""), "no task has a number"),
        (lambda folder: lmms(folder, {"t": {"acc,none": 1.0}}, model_args="metod=fastv"), "did you mean method"),
        (cut_samples, "samples_t.jsonl, line 2 is not"),
    ],
)
def test_where_nothing_can_be_read_one_line_names_it(tmp_path: Path, make: Any, said: str) -> None:
    place = tmp_path / "results"
    make(place)
    done = report(place, "--output", tmp_path / "out")
    assert done.exit_code == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("vtprune: ")
    assert said in line
    assert str(place) in line
    assert not (tmp_path / "out").exists()
