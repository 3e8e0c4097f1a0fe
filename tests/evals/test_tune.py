"""The search: what it finds and writes, that it goes on after an interruption, and how it fails."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import vtprune
from tests.checkpoint import png, random_qwen_checkpoint
from tests.clips import write_clip
from tests.evals.test_tune_parts import pictures
from tests.evals.tuning import (
    KEEP,
    fails,
    numbers,
    private_environment,  # noqa: F401 (a fixture of every test here)
    read,
    run,
    tune,
)
from vtprune.errors import VTPruneError
from vtprune.evals.samples import Wanted, draw_shapes
from vtprune.evals.settings import build_settings
from vtprune.evals.tune import search as tune_search
from vtprune.evals.tune.measure import Meter
from vtprune.evals.tune.space import propose, setting_key
from vtprune.evals.tune.store import search_fingerprint
from vtprune.loading.model import load_model
from vtprune.loading.prompts import encode, place, question


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a search that nothing disturbed: past the trials that are drawn at random."""
    output = tmp_path_factory.mktemp("finished") / "my-tune"
    result = tune(output, *KEEP, "--trials", "12")
    assert result.exit_code == 0, result.output
    assert "Search of holov" in result.output
    return output


def test_finds_no_less_than_the_defaults_have(finished: Path) -> None:
    data = read(finished)
    trials, best = data["trials"], data["trials"][data["best"]]
    assert [trial["number"] for trial in trials] == list(range(12))
    assert trials[0]["params"] == {"crops": 4, "alpha": 1.0, "tau": 1.0}
    assert trials[0]["pruner"] == vtprune.HoloV(keep=0.15).to_dict()
    assert best["objective"] == max(trial["objective"] for trial in trials) >= trials[0]["objective"]
    assert len({setting_key(trial["params"]) for trial in trials}) == len(trials)
    for trial in trials:
        assert (trial["state"], trial["kept"], trial["tokens"]) == ("measured", 22, 144)
        assert 0.5 < trial["flops_share"] < 0.6
    assert data["check"]["trial"] == data["best"]
    assert data["check"]["samples"] == len(data["check"]["found"]["cosines"]) == 2
    assert {"optuna", "torch", "transformers"} <= data["versions"].keys()
    assert data["config"]["seed"] == 0


def test_leaves_a_config_a_picture_and_the_unpruned_states(finished: Path) -> None:
    data = read(finished)
    assert vtprune.load_config(finished).to_dict() == data["trials"][data["best"]]["pruner"]
    assert Image.open(finished / "search.png").width > 1000
    states = load_file(finished / "unpruned.safetensors")
    assert {name: len(rows) for name, rows in states.items()} == {"search": 3, "check": 2}
    assert {path.name for path in finished.iterdir()} == {
        "search.json", "search.png", "unpruned.safetensors", "vtprune_config.json"
    }  # fmt: skip


def test_the_objective_is_what_a_plain_forward_of_each_sample_says(finished: Path) -> None:
    data = read(finished)
    model, processor = load_model()
    cosines = []
    for sample in draw_shapes(Wanted(3, 2, 0)).search:
        inputs = place(encode(processor, [question(sample.media, sample.question)]), model)
        states = []
        for pruner in (vtprune.NoPruning(), vtprune.load_config(finished)):
            with vtprune.wrapped(model, pruner), torch.no_grad():
                states.append(model.model(**inputs).last_hidden_state[0, -1])
        cosines.append(torch.cosine_similarity(*states, dim=0).item())
    assert data["trials"][data["best"]]["objective"] == pytest.approx(sum(cosines) / 3, abs=1e-5)


def interrupt_at(patch: pytest.MonkeyPatch, number: int, error: BaseException | None = None) -> list[int]:
    """Raises before trial `number`; returns a list of the trials that were asked for."""
    asked: list[int] = []

    def counted(space: Any, tried: Any, trial: int, seed: int) -> Any:
        if trial == number:
            raise error or KeyboardInterrupt
        asked.append(trial)
        return propose(space, tried, trial, seed)

    patch.setattr(tune_search, "propose", counted)
    return asked


def counted_forwards(patch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by one with every pass over unpruned samples."""
    passes: list[int] = []
    states = Meter.states

    def counted(self: Meter, on_batch: Callable[[int], None]) -> Any:
        passes.append(1)
        return states(self, on_batch)

    patch.setattr(Meter, "states", counted)
    return passes


def test_an_interrupted_search_goes_on_as_if_it_had_not_been(finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        passes = counted_forwards(patch)
        interrupt_at(patch, 7)
        result = tune(output, *KEEP, "--trials", "12")
    fails(result, "the same command goes on", status=130)
    assert len(passes) == 2
    assert numbers(output) == numbers(finished)[:7]
    # What is there is of use already.
    vtprune.unwrap(vtprune.wrap(load_model()[0], str(output)))
    with pytest.MonkeyPatch.context() as patch:
        passes, asked = counted_forwards(patch), interrupt_at(patch, 99)
        result = tune(output, *KEEP, "--trials", "12")
    assert result.exit_code == 0, result.output
    assert "7 trials are in" in result.output
    assert asked == [7, 8, 9, 10, 11]
    assert not passes
    assert numbers(output) == numbers(finished)
    assert read(output)["check"] == read(finished)["check"]


def test_more_trials_go_on_from_a_finished_search(tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert tune(output, *KEEP, "--trials", "2").exit_code == 0
    first = numbers(output)
    with pytest.MonkeyPatch.context() as patch:
        asked = interrupt_at(patch, 99)
        result = tune(output, *KEEP, "--trials", "3")
        again = tune(output, *KEEP, "--trials", "3")
    assert result.exit_code == again.exit_code == 0, result.output
    assert asked == [2]
    assert numbers(output)[:2] == first


def test_states_that_were_cut_short_are_computed_again(tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert tune(output, *KEEP, "--trials", "1").exit_code == 0
    whole = (output / "unpruned.safetensors").read_bytes()
    (output / "unpruned.safetensors").write_bytes(whole[: len(whole) // 2])
    assert tune(output, *KEEP, "--trials", "2").exit_code == 0
    assert (output / "unpruned.safetensors").read_bytes() == whole


def test_an_error_on_the_way_keeps_the_trials(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 2, RuntimeError("out of memory"))
        result = tune(tmp_path / "out", *KEEP, "--trials", "4")
    fails(result, "out of memory", status=1)
    assert len(numbers(tmp_path / "out")) == 2


def test_another_search_is_not_mixed_in(finished: Path) -> None:
    before = read(finished)
    fails(tune(finished, "--keep", "20%"), "keep was 0.15 and is now 0.2", "--restart")
    fails(tune(finished, *KEEP, "--seed", "1"), "the samples was", "seed was 0 and is now 1")
    assert read(finished) == before


def test_a_restart_and_other_code_keep_the_old_search(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "search.json").write_text("{")
    fails(tune(output, *KEEP), "is not the file of a search", "--restart")
    assert tune(output, *KEEP, "--trials", "1", "--restart").exit_code == 0
    assert (output / "search-old" / "search.json").read_text() == "{"
    data = {**read(output), "created": "2026-01-02T03:04:05+00:00"}
    data["config"]["code"] = "older"
    (output / "search.json").write_text(json.dumps(data))
    result = tune(output, *KEEP, "--trials", "1")
    assert "starting afresh" in result.output
    assert json.loads((output / "search-20260102030405" / "search.json").read_text()) == data
    assert read(output)["config"]["code"] == search_fingerprint()


def test_a_restart_that_finds_nothing_leaves_no_old_setting_behind(tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert tune(output, *KEEP, "--trials", "1").exit_code == 0
    fails(tune(output, "--flops", "1%", "--trials", "1", "--restart"), "no setting of holov meets")
    assert not (output / "vtprune_config.json").exists()
    assert not (output / "search.png").exists()
    (old,) = output.glob("search-*/vtprune_config.json")
    assert vtprune.load_config(old.parent).name == "holov"


def test_a_lost_setting_is_written_again(tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert tune(output, *KEEP, "--trials", "2").exit_code == 0
    best = vtprune.load_config(output)
    for text in (None, '{"format": "vtprune", "version": 1, "pruner": {"method": "random"}}'):
        path = output / "vtprune_config.json"
        path.unlink() if text is None else path.write_text(text)
        assert tune(output, *KEEP, "--trials", "2").exit_code == 0
        assert vtprune.load_config(output) == best


def test_bench_takes_the_folder_as_a_method(finished: Path, tmp_path: Path) -> None:
    result = run(
        "bench", "--methods", f"grid,{finished}", "--keep", "9", "--limit", "5", "--output", tmp_path / "bench"
    )
    assert result.exit_code == 0, result.output
    records = list(json.loads((tmp_path / "bench" / "results.json").read_text())["settings"].values())
    assert [(record["label"], record["keep"]) for record in records] == [
        ("none", None),
        ("grid", 9),
        ("my-tune", 0.15),
    ]
    assert records[2]["pruner"] == vtprune.load_config(finished).to_dict()
    assert records[2]["tokens"]["kept"] == 22


def test_a_folder_is_known_by_what_it_holds(tmp_path: Path) -> None:
    for name, keep in (("a/same", 0.2), ("b/same", 0.3), ("c/copy", 0.2)):
        vtprune.save_config(vtprune.HoloV(keep=keep), tmp_path / name)
    vtprune.save_config([vtprune.FlowCut(keep=36), vtprune.Random(keep=20)], tmp_path / "list")
    folders = [str(tmp_path / name) for name in ("a/same", "b/same", "list")]
    _, first, second, both = build_settings(folders, [0.25, 0.5])
    assert first.label != second.label
    assert first.label.startswith("same-")
    assert (first.keep, second.keep, both.keep, both.label) == (0.2, 0.3, 20, "list")
    assert [pruner.name for pruner in both.pruners()] == ["flowcut", "random"]
    assert build_settings([str(tmp_path / "c/copy")], [1])[1].key() == first.key()
    with pytest.raises(VTPruneError, match=r"no vtprune_config\.json in"):
        build_settings([str(tmp_path)], [0.5])


def test_a_setting_that_is_not_a_number_is_told_and_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = Meter.measure

    def broken(self: Meter, pruner: Any, unpruned: Any) -> Any:
        found = measure(self, pruner, unpruned)
        return found if pruner.alpha is None else dataclasses.replace(found, cosines=[0.9, math.nan, 0.9])

    monkeypatch.setattr(Meter, "measure", broken)
    result = tune(tmp_path, *KEEP, "--trials", "2")
    assert result.exit_code == 0, result.output
    assert "trial 1 failed: the pruned state is not a number on 1 samples (shapes 1)" in result.output
    assert [trial["state"] for trial in read(tmp_path)["trials"]] == ["measured", "failed"]
    assert read(tmp_path)["best"] == 0
    assert "1 of 2 settings gave no number" in result.output


def test_settings_that_the_model_refuses_are_infeasible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = vtprune.HoloV.resolve

    def refuse(self: Any) -> Any:
        if self.tau == 1 and self.alpha is None:
            raise VTPruneError("cannot be met")
        return resolve(self)

    monkeypatch.setattr(vtprune.HoloV, "resolve", refuse)
    result = tune(tmp_path / "out", *KEEP, "--trials", "2")
    assert result.exit_code == 0, result.output
    assert [trial["state"] for trial in read(tmp_path / "out")["trials"]] == ["infeasible", "measured"]
    fails(tune(tmp_path / "none", *KEEP, "--trials", "1"), "the only trial of holov has no objective: cannot be met")


@pytest.mark.parametrize(
    ("method", "options", "fragments"),
    [
        ("grid", KEEP, ("grid has nothing to tune", "flowcut", "fopru", "holov")),
        ("flowcut:stages=1", KEEP, ("nothing to tune beside the options that are given",)),
        ("holov", ("--keep", "100%"), ("nothing is pruned",)),
        ("holov", ("--keep", "144"), ("every one of 144 vision tokens is kept",)),
        ("holov", (), ("give one of --keep",)),
        ("holov", (*KEEP, "--flops", "50%"), ("give one of --keep",)),
        ("holov", ("--flops", "100%"), ("flops: cannot take '100%'",)),
        ("holov:keep=3", KEEP, ("the budget is --keep or --flops",)),
        ("holv", KEEP, ("did you mean 'holov'",)),
        ("holov", (*KEEP, "--model", "somewhere"), ("--data FOLDER",)),
        ("holov", (*KEEP, "--data", "nowhere"), ("nowhere is not a folder",)),
    ],
)
def test_a_request_that_makes_no_sense(
    method: str, options: tuple[str, ...], fragments: tuple[str, ...], tmp_path: Path
) -> None:
    fails(tune(tmp_path, *options, method=method), *fragments)
    assert not (tmp_path / "vtprune_config.json").exists()


def test_a_folder_of_pictures_is_searched_on_another_family(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "data", 5)
    rows = [{"file_name": f"{i}.png", "question": f"number {i}?"} for i in range(4)] + [{"file_name": "4.png"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ("--model", random_qwen_checkpoint(), "--data", folder, "--keep", "40%", "--trials", "3")
    result = tune(tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    assert all(trial["state"] == "measured" for trial in read(tmp_path / "out")["trials"])


def test_videos_among_pictures_are_searched_too(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "data", 2)
    write_clip(folder / "clip.mp4", 30, 10, (96, 64))
    write_clip(folder / "other.mkv", 30, 10, (64, 96))
    options = ("--model", random_qwen_checkpoint(), "--data", folder, "--keep", "40%", "--trials", "2")
    sizes = ("--samples", "2", "--check-samples", "2")
    result = tune(tmp_path / "out", *options, *sizes, "--frames", "4")
    assert result.exit_code == 0, result.output
    assert all(trial["state"] == "measured" for trial in read(tmp_path / "out")["trials"])
    fails(tune(tmp_path / "out", *options, *sizes, "--frames", "6"), "another --output")


def test_a_model_that_takes_no_videos_is_named(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "data", 1)
    write_clip(folder / "clip.mp4")
    words = "the processor refuses clip.mp4 (16 frames of 64x48): llava takes images; a video needs a model of"
    fails(tune(tmp_path / "out", *KEEP, "--data", folder), words)
    (folder / "clip.mp4").write_bytes(b"no video")
    fails(tune(tmp_path / "out", *KEEP, "--data", folder), "data: cannot read", "clip.mp4")
    fails(tune(tmp_path / "out", *KEEP, "--frames", "4"), "frames: --frames goes with pictures or videos of your own")


def test_a_folder_that_cannot_be_searched(tmp_path: Path) -> None:
    empty = pictures(tmp_path / "empty", 0)
    fails(tune(tmp_path / "out", *KEEP, "--data", empty), "no picture and no video in", str(empty))
    one = pictures(tmp_path / "one", 1)
    fails(tune(tmp_path / "out", *KEEP, "--data", one), "holds one picture or video", "--check-samples 0")
    broken = pictures(tmp_path / "broken", 0)
    whole = png(200, 200, "blue")
    for i in range(3):
        (broken / f"{i}.png").write_bytes(whole[: len(whole) // 2])
    fails(tune(tmp_path / "out", *KEEP, "--data", broken), "data: cannot read", ".png: image file is truncated")
    (one / "metadata.jsonl").write_text('{"file_name": "0.png"}\n{"file_name": "gone.png"}')
    fails(tune(tmp_path / "out", *KEEP, "--data", one), "data: no file", "gone.png")
    (one / "metadata.jsonl").write_text('{"file_name": "0.png"}\n{"name": "0.png"}')
    fails(tune(tmp_path / "out", *KEEP, "--data", one), "metadata.jsonl, line 2", "file_name")
    assert not (tmp_path / "out").exists()


def test_a_finite_space_is_searched_to_its_end_and_no_further(tmp_path: Path) -> None:
    result = tune(tmp_path, *KEEP, method="fopru")
    assert result.exit_code == 0, result.output
    assert "every setting of the search space has been tried (4)" in result.output
    assert len(read(tmp_path)["trials"]) == 4
