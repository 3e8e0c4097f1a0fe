"""auto: what settings would have done, what is promised of one, and the files that it goes by."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vtprune
from tests.models import ROWS, make, prompt
from vtprune.errors import FileError, InputError, PromiseWarning
from vtprune.hooks.base_sample import sample_base
from vtprune.pruners.auto import calibration
from vtprune.pruners.auto.calibration import CALIBRATION_NAME, read_calibration, settle, table_of, to_file
from vtprune.pruners.auto.ladder import Ladder, Table, best_ladder, fixed, growing
from vtprune.pruners.auto.promise import prove

KEEPS = (0.1, 0.3)


def table(count: int = 200, seed: int = 0, tasks: tuple[str, ...] = ("",)) -> Table:
    """Samples of which the surer ones agree more often, at two levels."""
    rng = np.random.default_rng(seed)
    sure = np.sort(rng.random((count, 2)), axis=1)
    losses = (rng.random((count, 2)) > sure**0.25).astype(float)
    ones = np.ones((count, 1))
    return Table(
        pictures=np.arange(count),
        tasks=np.array([tasks[row % len(tasks)] for row in range(count)]),
        losses=losses,
        probability=sure,
        margin=sure / 2,
        flops=np.hstack([30 * ones, 50 * ones, 110 * ones]),
        encoder=np.hstack([20 * ones, 20 * ones, 20 * ones]),
        kv=np.hstack([1 * ones, 3 * ones, 10 * ones]),
        tokens=np.full(count, 100),
    )


def test_a_ladder_answers_at_the_first_level_that_is_sure_and_pays_for_all_attempts() -> None:
    two = replace(
        table(3),
        probability=np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.4]]),
        losses=np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]),
    )
    for shared, again in ((True, 20), (False, 0)):
        found = growing(two, (0, 1), np.array([0.5]), score="probability", shared=shared)
        assert found.taken[:, 0].tolist() == [0, 1, 2]
        assert found.losses[:, 0].tolist() == [1.0, 1.0, 0.0]
        assert found.flops[:, 0].tolist() == [30, 30 + 50 - again, 30 + 50 + 110 - 2 * again]
        assert found.kv[:, 0].tolist() == [1, 3, 10]
        # The last setting is the whole model, without an attempt.
        assert (found.taken[:, -1].tolist(), found.flops[:, -1].tolist()) == ([2, 2, 2], [110, 110, 110])


def test_a_threshold_that_is_met_exactly_accepts() -> None:
    found = growing(
        replace(table(2), probability=np.full((2, 2), 0.5)),
        (0,),
        np.array([0.5, 0.50001]),
        score="probability",
        shared=True,
    )
    assert found.taken[:, 0].tolist() == [0, 0]
    assert found.taken[:, 1].tolist() == [2, 2]


def test_one_keep_for_all_is_every_level_in_turn() -> None:
    own = table()
    found = fixed(own)
    assert found.losses[:, :2].tolist() == own.losses.tolist()
    assert not found.losses[:, 2].any()
    assert found.flops is own.flops


def test_the_cheapest_ladder_is_found_and_one_that_costs_more_than_it_saves_is_not() -> None:
    ladder, cost = best_ladder(table(), 0.1, shared=True)
    assert ladder.levels
    assert cost < 1
    dear = replace(table(), flops=np.hstack([np.full((200, 2), 109.0), np.full((200, 1), 110.0)]))
    assert best_ladder(dear, 0.01, shared=False)[1] > 0.99


def test_what_is_proved_keeps_the_promise_on_the_samples_and_says_so() -> None:
    own = table(1000, seed=1)
    ladder, _ = best_ladder(table(), 0.1, shared=True)
    for confidence in (None, 0.95):
        settled = prove(own, KEEPS, ladder, shared=True, agreement=0.9, confidence=confidence)
        promise = settled.promise
        assert settled.levels[-1] == 1.0
        assert promise.risk <= promise.bound <= 0.1
        assert promise.flops < 1
        assert sum(promise.levels.values()) == promise.samples == 1000
        again = settled.on(own, KEEPS, shared=True)
        assert again.losses[:, 0].mean() == pytest.approx(promise.risk)
        assert again.flops.sum() / own.flops[:, -1].sum() == pytest.approx(promise.flops)
    sure = prove(own, KEEPS, ladder, shared=True, agreement=0.9, confidence=0.95)
    hoped = prove(own, KEEPS, ladder, shared=True, agreement=0.9)
    assert sure.threshold >= hoped.threshold, "a confidence costs something"


def test_where_nothing_can_be_vouched_for_every_image_stays_whole() -> None:
    lost = replace(table(100), losses=np.ones((100, 2)))
    for ladder in (None, Ladder((0,), "margin", np.array([0.0]))):
        settled = prove(lost, KEEPS, ladder, shared=True, agreement=0.95)
        assert settled.levels == (1.0,)
        assert (settled.promise.risk, settled.promise.flops) == (0.0, 1.0)


@pytest.mark.parametrize(("flops", "levels"), [((90, 80, 100), (0.3,)), ((120, 110, 100), (1.0,))])
def test_a_more_careful_setting_that_costs_less_is_taken(flops: tuple[int, ...], levels: tuple[float, ...]) -> None:
    same = replace(table(), losses=np.zeros((200, 2)), flops=np.tile(np.array(flops, dtype=float), (200, 1)))
    settled = prove(same, KEEPS, None, shared=True, agreement=0.9)
    assert settled.levels == levels
    assert settled.promise.flops == min(flops) / 100
    ladder = Ladder((0, 1), "margin", np.array([0.0, 2.0]))
    dear = replace(same, flops=same.flops + np.array([40, 40, 0]))
    assert prove(dear, KEEPS, ladder, shared=False, agreement=0.9).levels == (1.0,)


def test_each_of_several_tasks_keeps_the_promise() -> None:
    two = table(400, tasks=("easy", "hard"))
    hard = two.tasks == "hard"
    losses = two.losses.copy()
    losses[hard] = 1.0
    losses[~hard] = 0.0
    settled = prove(replace(two, losses=losses), KEEPS, None, shared=True, agreement=0.9)
    assert settled.levels == (1.0,), "half of all answers would be lost, all of them hard ones"
    assert set(settled.promise.by_task) == {"easy", "hard"}
    alone = prove(replace(two, losses=losses).where(~hard), KEEPS, None, shared=True, agreement=0.9, task="easy")
    assert alone.levels == (0.1,)
    assert "easy" in str(alone.promise)


def test_too_few_pictures_of_one_task_are_named() -> None:
    few = table(40, tasks=("a", *["b"] * 9))
    with pytest.raises(InputError, match=r"4 pictures of a .*at least 9$"):
        prove(few, KEEPS, None, shared=True, agreement=0.9)


def content(model: Any, **changes: Any) -> dict[str, Any]:
    """A calibration of a model, as it is written down."""
    data: dict[str, Any] = {
        "format": "vtprune-calibration",
        "version": 1,
        "model": "a model",
        "base": sample_base(model, "vtprune_weights").metadata(),
        "dtype": "float32",
        "processor": "",
        "generation": {"max_new_tokens": 8, "do_sample": False},
        "loss": "answer",
        "source": "samples",
        "seed": 0,
        "method": {"method": "grid"},
        "keeps": list(KEEPS),
        "shared": True,
        "tuning": to_file(table(seed=3)),
        "calibration": to_file(table(500, seed=4)),
    }
    return {**data, **changes}


def written(folder: Path, data: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / CALIBRATION_NAME).write_text(json.dumps(data))
    vtprune.save_config(vtprune.Auto(agreement=0.9), folder)
    return folder


def test_a_folder_is_wrapped_with_and_its_table_comes_back_as_it_was(tmp_path: Path) -> None:
    model = make("llava-clip")
    folder = written(tmp_path / "own", content(model))
    found = table_of(read_calibration(folder)["calibration"])
    own = table(500, seed=4)
    assert all(np.allclose(getattr(found, name), values) for name, values in vars(own).items() if name != "tasks")
    inputs = prompt("llava-clip", ROWS["llava-clip"])
    with vtprune.wrapped(model, str(folder)):
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        report = vtprune.report(model)
        assert report.method == "auto"
        assert {level for sample in report.samples for level in sample.attempts} <= {*KEEPS, 1.0}
        vtprune.save_config(model, tmp_path / "again")
    # The config says where its calibration lies.
    with vtprune.wrapped(model, str(tmp_path / "again")):
        pass
    with vtprune.wrapped(model, "auto", agreement=0.95, calibration=str(folder)):
        pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2"),
        ({"keeps": [0.1]}, "does not fit"),
        ({"method": {"method": "lazyllm"}}, "lazyllm goes on choosing"),
        ({"method": {"method": "none"}}, "prunes nothing"),
        ({"base": {}}, "another model"),
        ({"method": {"method": "nothing"}}, "unknown pruner"),
        ({"tuning": {}}, "is not a calibration"),
    ],
)
def test_a_calibration_that_cannot_be_used_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    model = make("llava-clip")
    folder = written(tmp_path / "own", content(model, **change))
    with pytest.raises(vtprune.VTPruneError, match=message):
        vtprune.wrap(model, str(folder))
    assert not vtprune.is_wrapped(model)


def test_another_model_is_refused_and_another_dtype_told(tmp_path: Path) -> None:
    folder = written(tmp_path / "own", content(make("llava-clip")))
    other = make("llava-clip")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.5)
    with pytest.raises(vtprune.VTPruneError, match="calibrated on another model"):
        vtprune.wrap(other, str(folder))
    with pytest.warns(PromiseWarning, match="dtype=float64: it was calibrated in float32"):
        vtprune.wrap(make("llava-clip").double(), str(folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"agreement": 1.0}, "all of them is what the unpruned model does"),
        ({"agreement": 1.5}, "between 0 and 1"),
        ({"agreement": 0.0}, "between 0 and 1"),
        ({"confidence": 1.0}, "confidence is a share"),
        ({"keep": 0.5}, "finds out how much to keep"),
        ({"keep_video": 0.5}, "finds out how much to keep"),
        ({"adaptive": 1}, "adaptive is one of"),
    ],
)
def test_a_promise_that_cannot_be_made_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(vtprune.VTPruneError, match=message):
        vtprune.Auto(**options)


def test_a_model_without_a_calibration_is_told_how_to_make_one() -> None:
    with pytest.raises(InputError, match="run `vtprune calibrate"):
        vtprune.wrap(make("llava-clip"), "auto", agreement=0.9)


def test_it_stands_alone(tmp_path: Path) -> None:
    folder = written(tmp_path / "own", content(make("llava-clip")))
    auto = vtprune.Auto(agreement=0.9, calibration=str(folder))
    with pytest.raises(vtprune.VTPruneError, match="stands alone"):
        vtprune.wrap(make("llava-clip"), [vtprune.Grid(keep=0.5), auto])
    with pytest.raises(vtprune.VTPruneError, match="leave keep_prompt out"):
        vtprune.wrap(make("llava-clip"), auto, keep_prompt=0.5)


def test_a_config_whose_promise_is_not_that_of_its_calibration_is_refused(tmp_path: Path) -> None:
    model = make("llava-clip")
    folder = written(tmp_path / "own", content(model))
    promise = settle(read_calibration(folder), agreement=0.9).promise.to_dict()
    vtprune.save_config(vtprune.Auto(agreement=0.9, promise=promise), folder)
    with vtprune.wrapped(model, str(folder)):
        pass
    vtprune.save_config(vtprune.Auto(agreement=0.9, promise={**promise, "risk": 0.0}), folder)
    with pytest.raises(InputError, match="does not give the promise"):
        vtprune.wrap(model, str(folder))


def test_a_task_has_a_promise_of_its_own_and_others_are_named(tmp_path: Path) -> None:
    model = make("llava-clip")
    own = to_file(table(500, seed=4, tasks=("a", "b")))
    folder = written(tmp_path / "own", content(model, calibration=own, tuning=own))
    assert settle(read_calibration(folder), agreement=0.9, task="a").promise.samples == 250
    with pytest.raises(InputError, match="tasks are a, b"):
        vtprune.wrap(model, "auto", task="c", calibration=str(folder))


def test_a_calibration_is_settled_once_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, made = written(tmp_path / "own", content(make("llava-clip"))), []
    monkeypatch.setattr(calibration, "settle", lambda data, **options: made.append(options) or settle(data, **options))
    auto = vtprune.Auto(agreement=0.9, calibration=str(folder))
    first = auto.growth()
    assert auto.growth() == first
    assert len(made) == 2  # as asked, and one budget for all
    data = json.loads((folder / CALIBRATION_NAME).read_text())
    data["calibration"]["losses"] = [[1.0] * len(row) for row in data["calibration"]["losses"]]
    written(folder, data)
    assert auto.growth() != first
    assert auto.growth().levels == (1.0,)


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / CALIBRATION_NAME).write_text("{")
    with pytest.raises(FileError, match="is not a calibration"):
        vtprune.wrap(make("llava-clip"), "auto", calibration=str(tmp_path))
