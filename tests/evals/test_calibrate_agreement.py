"""`vtprune calibrate`: an agreement is calibrated on drawn questions or a folder's, proved, checked, gone on with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vtprune
from tests.evals.tuning import fails, private_environment, run  # noqa: F401 (a fixture of every test here)
from vtprune.evals.calibrate.answers import ANSWERS, Answers, normalise, table_of
from vtprune.evals.calibrate.asked import Source
from vtprune.loading.model import load_model
from vtprune.pruners.auto.calibration import CALIBRATION_NAME, read_calibration
from vtprune.pruners.auto.calibration import table_of as table_in

FEW = ("--samples", "24", "--tuning-samples", "12", "--methods", "grid", "--keeps", "11%,50%", "--max-new-tokens", "4")


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrated") / "own"
    result = run("calibrate", "--agreement", "0.8", *FEW, "--output", folder)
    assert result.exit_code == 0, result.output
    assert "at least 0.8 of the answers are the whole model's" in " ".join(result.output.split())
    return folder


def test_the_folder_holds_the_setting_the_proof_and_a_plot(calibrated: Path) -> None:
    written = json.loads((calibrated / "vtprune_config.json").read_text())["pruner"]
    promise = written["promise"]
    assert (written["method"], written["agreement"], promise["samples"]) == ("auto", 0.8, 24)
    assert promise["risk"] <= promise["bound"] <= 0.2
    assert promise["theorem"].startswith("conformal risk control")
    data = read_calibration(calibrated)
    assert (data["keeps"], data["method"]["method"], data["source"]) == ([0.11, 0.5], "grid", "drawn shapes")
    assert len(table_in(data["tuning"])) == 12
    with Image.open(calibrated / "calibration.png") as plot:
        assert plot.width > 500


def test_the_same_command_asks_nothing_twice_and_another_agreement_little(calibrated: Path) -> None:
    before = (calibrated / ANSWERS).read_text().split()
    with (calibrated / ANSWERS).open("a") as file:
        file.write('{"key": "half an ans')
    result = run("calibrate", "--agreement", "0.85", *FEW, "--output", calibrated)
    assert result.exit_code == 0, result.output
    again = run("calibrate", "--agreement", "0.8", *FEW, "--output", calibrated)
    assert again.exit_code == 0, again.output
    lines = [line for line in (calibrated / ANSWERS).read_text().splitlines() if line.startswith('{"key"')]
    assert len("".join(before)) == len("".join(line for line in lines if line.endswith("}")).replace(" ", ""))


def test_auto_does_on_the_samples_what_the_calibration_says_of_it(calibrated: Path, tmp_path: Path) -> None:
    """The real answers of the wrapped model are those that were computed from the stored ones."""
    model, processor = load_model(None)
    asked = Source(max_new_tokens=4).split(12, 24, 0, lambda text: None).calibration
    answers = Answers(model, processor, tmp_path, identity=["test"], batch=8)
    whole = answers.of(None, asked, lambda count: None)
    own = answers.of(vtprune.load_config(calibrated), asked, lambda count: None)  # type: ignore[arg-type]
    found = table_of(asked, [own], whole, "answer")
    promise = json.loads((calibrated / "vtprune_config.json").read_text())["pruner"]["promise"]
    assert found.losses[:, 0].mean() == pytest.approx(promise["risk"])
    assert found.flops[:, 0].sum() / found.flops[:, 1].sum() == pytest.approx(promise["flops"])
    assert found.kv[:, 0].sum() / found.kv[:, 1].sum() == pytest.approx(promise["kv"])


def test_new_samples_check_the_promise(calibrated: Path) -> None:
    result = run("calibrate", "--check", calibrated, "--samples", "20", "--max-new-tokens", "4")
    assert result.exit_code == 0, result.output
    assert "were promised at most" in result.output
    assert "within the promise" in result.output or "by chance" in result.output


def test_a_promise_that_does_not_hold_is_told_and_exits_with_1(calibrated: Path, tmp_path: Path) -> None:
    # The most careful samples promise what these do not keep: every answer of a level is taken.
    data = json.loads((calibrated / CALIBRATION_NAME).read_text())
    for part in ("tuning", "calibration"):
        data[part]["losses"] = [[0.0] * 2 for _ in data[part]["losses"]]
    data["keeps"] = [1, 2]
    folder = tmp_path / "bold"
    folder.mkdir()
    (folder / CALIBRATION_NAME).write_text(json.dumps(data))
    vtprune.save_config(vtprune.Auto(agreement=0.9), folder)
    result = run("calibrate", "--check", folder, "--samples", "20", "--max-new-tokens", "4")
    assert result.exit_code == 1
    assert "does not hold on these samples" in " ".join(result.output.split())


def test_tokens_are_compared_one_by_one_where_that_is_asked(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    result = run("calibrate", "--agreement", "0.8", "--loss", "tokens", *FEW, "--output", folder)
    assert result.exit_code == 0, result.output
    losses = table_in(read_calibration(folder)["calibration"]).losses
    assert ((losses >= 0) & (losses <= 1)).all()
    assert set(np.unique(losses)) - {0.0, 1.0}, "answers of several tokens may agree in some"
    checked = run("calibrate", "--check", folder, "--samples", "20", "--max-new-tokens", "4")
    assert "were promised at most" in checked.output, checked.output


def test_a_folder_of_pictures_is_dealt_by_picture_and_tasks_have_promises_of_their_own(tmp_path: Path) -> None:
    rng, lines = np.random.default_rng(0), []
    for place in range(30):
        name = f"{place}.png"
        Image.fromarray(rng.integers(0, 255, (96, 96, 3), dtype=np.uint8)).save(tmp_path / name)
        lines += [{"file_name": name, "question": question} for question in ("what is red?", "is there a circle?")]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    split = Source(str(tmp_path)).split(20, 40, 0, lambda text: None)
    assert not {one.picture for one in split.tuning} & {one.picture for one in split.calibration}
    tasks = Source("vtprune_shapes,vtprune_forms", max_new_tokens=4).split(30, 60, 0, lambda text: None)
    assert {one.task for one in tasks.calibration} == {"vtprune_shapes", "vtprune_forms"}
    assert not {one.picture for one in tasks.tuning} & {one.picture for one in tasks.calibration}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--samples", "20"), "it takes at least 49"),
        (("--samples", "100", "--confidence", "0.95"), "it takes at least 149"),
        (("--agreement", "1.0"), "all of them is what the unpruned model does"),
        (("--agreement", "1.5"), "between 0 and 1"),
        (("--methods", "none"), "prunes nothing, whatever its keep"),
        (("--methods", "pmod"), "trained at one level"),
        (("--methods", "grid:keep=0.5"), "leave it out"),
        (("--keeps", "50%,1.0"), "1.0 is the whole model"),
        (("--keeps", "50%,36"), "not both"),
        (("--loss", "words"), "answer or tokens"),
        (("--threshold", "0.1"), "goes with yopo"),
        (("--data", "no_such_task"), "knows no task"),
        (("--check", "nowhere"), "no vtprune_config.json in nowhere"),
        (("--data", "vtprune_pairs"), "other things than one picture"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    output = () if "--check" in options else ("--output", tmp_path / "own")
    fails(run("calibrate", *options, *output), message)
    assert not (tmp_path / "own" / "vtprune_config.json").exists()


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    fails(run("calibrate", "--data", tmp_path, "--output", tmp_path / "own"), "no picture and no video")


def test_a_budget_above_every_picture_is_no_level(tmp_path: Path) -> None:
    result = run(
        "calibrate",
        "--agreement",
        "0.8",
        *FEW[:6],
        "--keeps",
        "10,1000",
        "--max-new-tokens",
        "4",
        "--output",
        tmp_path / "own",
    )
    assert result.exit_code == 1
    assert "cuts none of these pictures" in " ".join(result.output.split())


def test_answers_are_compared_without_case_blanks_and_full_stop() -> None:
    assert normalise(" A  red\ncircle. ") == normalise("a Red circle") != normalise("a red square")
