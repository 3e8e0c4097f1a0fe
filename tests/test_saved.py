"""What an earlier version wrote loads, and answers as it did: only what users import and call is used here."""

from __future__ import annotations

import io
import json
import runpy
import shutil
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tests.matrix  # noqa: F401  (some configs are of a method that it registers)
import vtprune
from tests.saved import (
    ANSWERS,
    BENCH,
    BENCH_ANSWERS,
    BENCH_CUT,
    BENCH_FINISHED,
    BENCH_RUN,
    CONFIG,
    CONFIGS,
    TRAINED,
    TUNE,
    TUNE_RUN,
    TUNE_TRIALS,
    WEIGHTS,
    answer,
    load_model,
)
from vtprune.method.registry import pruner_class
from vtprune.method.stages import Trained

SAID: dict[str, Any] = json.loads(ANSWERS.read_text())
# What of a setting's record and of a trial is the same whenever it is measured: all but the times.
NUMBERS = ("method", "label", "keep", "pruner", "scores", "tokens", "flops", "kv", "answers", "correct", "kept_tokens")
TRIAL = ("number", "params", "state", "reason", "kept", "tokens", "flops_share", "pruner")
RESULTS, SEARCH, STATES = "results.json", "search.json", "unpruned.safetensors"
OTHER_CODE = "of other code"
# Tokens of a flat ground are alike but for rounding, which differs between processors and says there which of them is
# another one's duplicate.
LOGITS_ELSEWHERE = {"vispruner-0.25-0.5-paper": [12.599308, 7.821419]}


def methods_of(name: str) -> list[str]:
    """The names of the methods of a config."""
    return [json.loads(stage["method"]) for stage in stages(config(CONFIGS / name))]


def config(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return data


def stages(data: dict[str, Any]) -> list[dict[str, str]]:
    """The methods of a config with every option as text, so that 1 is not 1.0."""
    found = data["pruner"] if isinstance(data["pruner"], list) else [data["pruner"]]
    return [{name: json.dumps(value) for name, value in stage.items()} for stage in found]


def cases() -> list[Any]:
    """Every config; the first one of each method, and those of several, are the fast ones."""
    met: set[str] = set()
    found = []
    for name in SAID["configs"]:
        methods = methods_of(name)
        slow = len(methods) == 1 and methods[0] in met
        met.update(methods)
        found.append(pytest.param(name, marks=pytest.mark.slow if slow else ()))
    return found


@pytest.fixture(scope="module")
def bundled() -> tuple[Any, dict[str, Any]]:
    """The bundled model and what it is asked; every test leaves it unwrapped."""
    return load_model()


def agrees(found: dict[str, Any], said: dict[str, Any], elsewhere: list[float] | None = None) -> None:
    """The same tokens and costs to the last digit, and logits as far as machines agree; elsewhere: what they are on
    processors that round otherwise."""
    assert {**found, "logits": None} == {**said, "logits": None}
    if elsewhere is None or found["logits"] != pytest.approx(elsewhere, abs=1e-3):
        assert found["logits"] == pytest.approx(said["logits"], abs=1e-3)


def test_every_config_has_its_answers() -> None:
    names = {folder.name for folder in CONFIGS.iterdir()}
    assert len(names) > 60
    assert names == set(SAID["configs"])
    methods = {method for name in names for method in methods_of(name)}
    assert len(methods) > 20
    assert methods <= vtprune.available().keys()
    assert SAID["trained"].keys() < methods


@pytest.mark.parametrize("name", sorted(SAID["configs"]))
def test_a_config_loads_and_is_written_again_as_it_was(
    name: str, bundled: tuple[Any, dict[str, Any]], tmp_path: Path
) -> None:
    folder, model = CONFIGS / name, bundled[0]
    old, loaded = config(folder), vtprune.load_config(folder)
    vtprune.save_config(loaded, tmp_path / "loaded")
    assert vtprune.load_config(tmp_path / "loaded") == loaded
    # Folders of methods that bring weights need them.
    bare = any(issubclass(pruner_class(method), Trained) for method in methods_of(name))
    with vtprune.wrapped(model, old if bare else str(folder)):
        vtprune.save_config(model, tmp_path / "wrapped")
    for written in tmp_path.iterdir():
        new = config(written)
        assert new.keys() == old.keys()
        assert (new["format"], new["version"]) == (old["format"], old["version"])
        assert isinstance(new["pruner"], list) == isinstance(old["pruner"], list)
        # A later version may have options besides.
        assert [new | old for new, old in zip(stages(new), stages(old), strict=True)] == stages(new)


@pytest.mark.parametrize("name", cases())
def test_a_config_answers_as_it_did(name: str, bundled: tuple[Any, dict[str, Any]]) -> None:
    model, inputs = bundled
    with vtprune.wrapped(model, vtprune.load_config(CONFIGS / name)):
        agrees(answer(model, inputs), SAID["configs"][name], LOGITS_ELSEWHERE.get(name))


@pytest.mark.parametrize("name", sorted(SAID["texts"]))
def test_a_text_stands_for_the_methods_that_it_stood_for(
    name: str, bundled: tuple[Any, dict[str, Any]], tmp_path: Path
) -> None:
    with vtprune.wrapped(bundled[0], SAID["texts"][name]) as model:
        vtprune.save_config(model, tmp_path)
    assert vtprune.load_config(tmp_path) == vtprune.load_config(CONFIGS / name)


@pytest.mark.parametrize("name", sorted(SAID["trained"]))
def test_trained_weights_answer_as_they_did(name: str, bundled: tuple[Any, dict[str, Any]], tmp_path: Path) -> None:
    (model, inputs), folder, said = bundled, TRAINED / name, SAID["trained"][name]
    with warnings.catch_warnings():
        warnings.simplefilter("error", vtprune.UntrainedWarning)
        warnings.simplefilter("error", vtprune.UncheckedBaseWarning)
        with vtprune.wrapped(model, str(folder)):
            agrees(answer(model, inputs), said)
            vtprune.save(model, tmp_path)
    with vtprune.wrapped(model, vtprune.load_config(folder)):
        assert answer(model, inputs)["logits"] != pytest.approx(said["logits"], abs=1e-3)
        vtprune.load_weights(model, folder)
        agrees(answer(model, inputs), said)
    # A later version may have options besides.
    (written,), (kept,) = stages(config(tmp_path)), stages(config(folder))
    assert written | kept == written
    (new, told), (old, said) = read_weights(tmp_path), read_weights(folder)
    assert told == said
    assert {key: tensor.tolist() for key, tensor in new.items()} == {
        key: tensor.tolist() for key, tensor in old.items()
    }


def read_weights(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors and the header of a folder's weights."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        return load_file(folder / WEIGHTS), file.metadata()


class Ran(NamedTuple):
    """A command that has ended: its status, what it printed on one line, the folder that it wrote into, and what had
    stood there before."""

    status: int
    text: str
    output: Path
    before: dict[str, bytes]


def vtprune_command(folder: Path, *words: str) -> tuple[int, str]:
    """`python -m vtprune.cli` in a folder, with what it needs kept inside of it: its status, and what it printed."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(out), warnings.catch_warnings():
        # Other tests have imported it.
        warnings.filterwarnings("ignore", "'vtprune.cli", RuntimeWarning)
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
            patch.setenv(name, "1")
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(folder / "cache"))
        # Times are compared nowhere.
        patch.setattr("vtprune.evals.bench.sweep.TIMED_SAMPLES", 1)
        patch.setattr(sys, "argv", ["vtprune", *words])
        patch.chdir(folder)
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("vtprune.cli", run_name="__main__")
    return int(ended.value.code or 0), " ".join(out.getvalue().split())


def bench(folder: Path, methods: str) -> tuple[int, str]:
    return vtprune_command(folder, "bench", "--methods", methods, *BENCH)


def tune(folder: Path, trials: int) -> tuple[int, str]:
    return vtprune_command(folder, "tune", "--trials", str(trials), *TUNE)


def read(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text())
    return data


def some(record: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: record[name] for name in names}


def spaces_agree(new: dict[str, Any], old: dict[str, Any]) -> None:
    """Two searches draw from the same values; a later version may say more of them."""
    assert new["space"].keys() == old["space"].keys()
    for name, tunable in old["space"].items():
        assert {**new["space"][name], **tunable} == new["space"][name]


def identity(settings: dict[str, Any]) -> str:
    """What files beside a run's main one say of the run that they belong to."""
    return sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def stamp(data: dict[str, Any]) -> str:
    """When a run was begun, as names of what is set aside say it."""
    return "".join(filter(str.isdigit, data["created"]))[:14]


def copy_run(run: Path, folder: Path, main: str, code: str) -> dict[str, bytes]:
    """Puts a saved run into a folder, as one by the `code` that is given; returns its files by their names in it."""
    target = folder / run.name
    shutil.copytree(run, target)
    data = read(target / main)
    data["config"]["code"] = code
    (target / main).write_text(json.dumps(data))
    files = (path for path in target.rglob("*") if path.is_file())
    return {str(path.relative_to(target)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def bench_of_now(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """A run into the folder of one that other code has begun."""
    folder = tmp_path_factory.mktemp("bench")
    before = copy_run(BENCH_RUN, folder, RESULTS, OTHER_CODE)
    return Ran(*bench(folder, BENCH_FINISHED), folder / BENCH_RUN.name, before)


@pytest.fixture(scope="module")
def tune_of_now(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """A search in the folder of one by other code."""
    folder = tmp_path_factory.mktemp("tune")
    before = copy_run(TUNE_RUN, folder, SEARCH, OTHER_CODE)
    return Ran(*tune(folder, 1), folder / TUNE_RUN.name, before)


def test_a_run_of_other_code_is_set_aside_whole_and_measured_anew(bench_of_now: Ran) -> None:
    status, text, output, before = bench_of_now
    old, new = json.loads(before[RESULTS]), read(output / RESULTS)
    begun = stamp(old)
    assert status == 0, text
    assert text.count(f"results of other code are now in bench_run/results-{begun}.json; starting afresh") == 1
    assert "already" not in text
    assert sum(name.startswith("cells/") for name in before) == 7
    for name, content in before.items():
        first, dot, rest = name.partition("/" if "/" in name else ".")
        assert (output / f"{first}-{begun}{dot}{rest}").read_bytes() == content, name
    assert new["config"].pop("code") != old["config"].pop("code")
    assert some(new, ("format", "config", "questions")) == some(old, ("format", "config", "questions"))
    assert new["settings"].keys() == old["settings"].keys()
    for key, record in old["settings"].items():
        assert some(new["settings"][key], NUMBERS) == some(record, NUMBERS)


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / BENCH_RUN.name
    shutil.copytree(BENCH_RUN, output)
    old = read(output / RESULTS)
    # As if the code had not changed since.
    monkeypatch.setattr("vtprune.evals.bench.bench.code_fingerprint", lambda: old["config"]["code"])
    (journal,) = output.glob(BENCH_ANSWERS)
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    lines[0]["text"] = "out of the journal"
    journal.write_text("\n".join(map(json.dumps, lines)))
    status, text = bench(tmp_path, f"{BENCH_FINISHED},{BENCH_CUT}")
    assert status == 0, text
    assert "2 of 3 settings are in bench_run/results.json already" in text
    assert "starting afresh" not in text
    new = read(output / RESULTS)
    *known, key = new["settings"]
    assert known == list(old["settings"])
    assert {name: new["settings"][name] for name in old["settings"]} == old["settings"]
    assert some(new, ("created", "config", "questions")) == some(old, ("created", "config", "questions"))
    answers = new["settings"][key]["answers"]
    assert 0 < len(lines) < len(answers)
    for line in lines:
        assert answers[int(line["key"].split("/")[1])] == line["text"]
    assert answers.count("out of the journal") == 1
    assert sorted(path.name for path in journal.parent.iterdir() if path.suffix != ".lock") == [
        "config.json",
        "metrics.json",
        "samples.jsonl",
    ]
    table = (output / "table.md").read_text().splitlines()
    rows = [row for row in (BENCH_RUN / "table.md").read_text().splitlines() if row.startswith("|")]
    assert len(rows) == 8
    assert set(rows) < set(table)


def test_the_folder_of_a_search_is_a_method(bundled: tuple[Any, dict[str, Any]]) -> None:
    model, inputs = bundled
    found = read(TUNE_RUN / SEARCH)
    best = found["trials"][found["best"]]
    told = []
    for source in (str(TUNE_RUN), best["pruner"], vtprune.HoloV(keep=0.15, **best["params"])):
        with vtprune.wrapped(model, source):
            told.append(answer(model, inputs))
    assert told[0] == told[1] == told[2]
    assert told[0]["kept_tokens"] == best["kept"]


def test_a_search_by_other_code_is_set_aside_whole_and_done_anew(tune_of_now: Ran) -> None:
    status, text, output, before = tune_of_now
    old, new = json.loads(before[SEARCH]), read(output / SEARCH)
    moved = output / f"search-{stamp(old)}"
    assert status == 0, text
    assert text.count(f"the earlier search is now in tune_run/{moved.name}; starting afresh") == 1
    assert "already" not in text
    assert {name: (moved / name).read_bytes() for name in (SEARCH, CONFIG)} == some(before, (SEARCH, CONFIG))
    assert vtprune.load_config(moved) == vtprune.load_config(TUNE_RUN)
    assert new["config"].pop("code") != old["config"].pop("code")
    assert some(new, ("format", "config")) == some(old, ("format", "config"))
    spaces_agree(new, old)
    (trial,) = new["trials"]
    assert some(trial, TRIAL) == some(old["trials"][0], TRIAL)
    assert trial["objective"] == pytest.approx(old["trials"][0]["objective"], abs=1e-5)
    states, saved = load_file(output / STATES), load_file(TUNE_RUN / STATES)
    assert states.keys() == saved.keys()
    for name, rows in saved.items():
        assert states[name].flatten().tolist() == pytest.approx(rows.flatten().tolist(), abs=1e-3)


def test_more_trials_go_on_from_a_search(tune_of_now: Ran, tmp_path: Path) -> None:
    output = tmp_path / TUNE_RUN.name
    with safe_open(TUNE_RUN / STATES, "pt") as file:
        assert file.metadata() == {"identity": identity(read(TUNE_RUN / SEARCH)["config"])}
    # As if the code had not changed since.
    copy_run(TUNE_RUN, tmp_path, SEARCH, read(tune_of_now.output / SEARCH)["config"]["code"])
    old = read(output / SEARCH)
    save_file(load_file(TUNE_RUN / STATES), output / STATES, metadata={"identity": identity(old["config"])})
    status, text = tune(tmp_path, TUNE_TRIALS + 1)
    assert status == 0, text
    assert f"{TUNE_TRIALS} trials are in tune_run/search.json already" in text
    assert "starting afresh" not in text
    assert "unpruned states" not in text
    new = read(output / SEARCH)
    assert new["trials"][:TUNE_TRIALS] == old["trials"]
    assert [trial["number"] for trial in new["trials"]] == list(range(TUNE_TRIALS + 1))
    assert some(new, ("created", "config")) == some(old, ("created", "config"))
    spaces_agree(new, old)
    assert vtprune.load_config(output).to_dict() == new["trials"][new["best"]]["pruner"]
