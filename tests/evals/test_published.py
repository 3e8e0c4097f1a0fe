"""Published numbers: the file that holds them, and what matches ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import vtprune
from tests.evals.report_files import costs, lmms
from vtprune.errors import FileError
from vtprune.evals.report.published import (
    BENCHMARKS,
    COLUMNS,
    UNREPORTED,
    Match,
    Published,
    family,
    known,
    matches,
    read_published,
)
from vtprune.evals.report.reading import read_all
from vtprune.method import catalogue

DULL = {"none", "random", "grid", "pool"}
LLAVA = "pretrained=llava-hf/llava-1.5-7b-hf"


def test_every_row_is_of_its_shape() -> None:
    assert len(read_published()) > 100


def test_every_method_is_known_or_said_to_be_not_built() -> None:
    own = vtprune.available()
    wrong = {one.method for one in known() if one.built != (one.name in own)}
    assert not wrong
    for text in {one.method for one in known() if one.built}:
        vtprune.method.resolving.resolve(text)


def test_every_method_without_a_row_is_named_with_the_reason() -> None:
    assert catalogue.own_methods().keys() - DULL - {one.method for one in known()} == UNREPORTED.keys()


def test_a_row_of_a_built_method_names_that_methods_paper() -> None:
    own = catalogue.own_methods()
    assert not {(one.method, one.paper) for one in known() if one.built and own[one.name].arxiv != one.paper}


def test_a_mean_is_one_of_benchmarks_that_can_be_run() -> None:
    names = {name for name, _ in BENCHMARKS}
    assert not {part for one in known() if "+" in one.task for part in one.task.split("+")} - names


LINE = "flowcut,2505.19536,a/model,64,64 tokens,GQA,accuracy,55.6,61.9,a table,"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (LINE.replace("55.6", "about 56"), "row 3, is not a published number: value"),
        (LINE.replace("2505.19536", "FlowCut"), "row 3, is not a published number: paper"),
        (LINE.replace("64,", "some,", 1), "row 3, is not a published number: tokens_kept"),
        ("flowcut,2505.19536", "row 3, is not a published number: model"),
        (LINE + ",more", "row 3, has more values"),
        (LINE.replace("a table", '"a table'), "row 3, is not CSV"),
    ],
)
def test_a_bad_row_is_one_line_with_its_number(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "published.csv"
    path.write_text("\n".join([",".join(COLUMNS), LINE, line]) + "\n")
    with pytest.raises(FileError, match=said) as raised:
        read_published(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_of_other_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "published.csv"
    path.write_text("method,value\n")
    with pytest.raises(FileError, match="row 1, does not name the columns method, paper"):
        read_published(path)


def published(**changes: str) -> Published:
    values = dict(zip(COLUMNS, LINE.replace("a/model", "llava-hf/llava-1.5-7b-hf").split(","), strict=True))
    return Published(**{**values, **changes})


def matched(
    tmp_path: Path, one: Published, *, kept: float = 64, model: str = LLAVA, method: str = "flowcut", **results: Any
) -> Match:
    """The first match of a number with a run of a method, beside the unpruned model."""
    found = results or {"gqa": {"exact_match,none": 0.55, "exact_match_stderr,none": 0.005}}
    full = {task: {name: 1.1 * value for name, value in row.items()} for task, row in found.items()}
    lmms(tmp_path, full, model_args=model, date="20260101_000000")
    pruned = {task: {**row, **costs(kept, 30)} for task, row in found.items()}
    lmms(tmp_path, pruned, model_args=f"{model},method={method},keep=64", date="20260102_000000")
    (group,) = read_all([tmp_path]).groups
    return (matches(group, [one]) or [Match(one)])[0]


def test_a_number_within_its_digits_and_two_errors_is_reproduced(tmp_path: Path) -> None:
    match = matched(tmp_path, published())
    assert (match.ours, match.stderr, match.unpruned) == (
        pytest.approx(55.0),
        pytest.approx(0.5),
        pytest.approx(60.5),
    )
    assert match.tolerance == pytest.approx(0.05 + 2 * 0.5)
    assert match.verdict == "reproduced within 1.1"


def test_a_number_further_off_is_not(tmp_path: Path) -> None:
    match = matched(tmp_path, published(value="56.1"))
    assert match.verdict == "not reproduced: -1.1, tolerance 1.1"
    assert not match.reproduced


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"method": "holov"}, {}),
        ({"task": "TextVQA"}, {}),
        ({"task": "VQAv2"}, {}),
        ({"metric": "another"}, {}),
        ({"tokens_kept": "128"}, {}),
        ({"tokens_kept": "33.3%"}, {}),
        ({}, {"kept": 66}),
        ({}, {"model": "pretrained=llava-hf/llava-1.5-13b-hf"}),
    ],
)
def test_another_setting_is_not_run(tmp_path: Path, changes: dict[str, str], options: dict[str, Any]) -> None:
    assert matched(tmp_path, published(**changes), **options).verdict == "not run"


@pytest.mark.parametrize(
    ("method", "run", "met"),
    [
        ("prumerge", "prumerge", True),
        ("prumerge", "prumerge:merge=False", False),
        ("flowcut", "flowcut:variant=released", True),
        ("prumerge", "prumerge:plus=True", False),
        ("prumerge:plus=True", "prumerge", False),
        ("prumerge:plus=True", "prumerge:plus=True", True),
        ("vispruner:important_ratio=1.0", "vispruner:important_ratio=1", True),
    ],
)
def test_options_that_make_another_published_method_are_told_apart(
    tmp_path: Path, method: str, run: str, met: bool
) -> None:
    assert (matched(tmp_path, published(method=method), method=run).ours is not None) == met


@pytest.mark.parametrize(("wanted", "kept"), [("64", 64.6), ("11.1%", 64.0)])
def test_tokens_may_be_off_by_a_hundredth(tmp_path: Path, wanted: str, kept: float) -> None:
    assert matched(tmp_path, published(tokens_kept=wanted), kept=kept).ours is not None


def test_a_copy_of_a_model_is_of_its_family() -> None:
    assert family("/models/LLaVA-1.5-7b-hf/") == family("liuhaotian/llava-v1.5-7b") == "llava-1.5-7b-hf"


def test_both_scores_of_mme_are_added(tmp_path: Path) -> None:
    results = {"mme": {"mme_cognition_score,none": 300.0, "mme_perception_score,none": 1400.0}}
    match = matched(tmp_path, published(task="MME", metric="perception + cognition", value="1700"), **results)
    assert match.ours == 1700
    assert match.verdict == "reproduced within 0.5*"


def test_a_mean_share_is_taken_where_every_benchmark_was_run(tmp_path: Path) -> None:
    one = published(task="GQA+POPE", metric="% of unpruned", value="90.9")
    results = {"gqa": {"exact_match,none": 0.55}, "pope": {"pope_accuracy,none": 0.7, "pope_f1_score,none": 0.77}}
    assert matched(tmp_path, one, **results).ours == pytest.approx(100 / 1.1)
    assert matched(tmp_path / "again", one).verdict == "not run"
