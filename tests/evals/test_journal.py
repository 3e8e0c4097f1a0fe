"""What lies on the disk as JSON: damage costs what is damaged, and one message names the file and what is wrong."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vtprune
from tests.evals.test_bench import record
from vtprune.errors import FileError, VTPruneError
from vtprune.evals.bench.results import FORMAT, Results
from vtprune.evals.bench.tables import markdown_table, metric_columns, quality_columns
from vtprune.evals.lmms.efficiency import RowCost
from vtprune.evals.lmms.generation import Answer
from vtprune.evals.lmms.journal import Journal
from vtprune.evals.samples import Wanted, read_folder
from vtprune.evals.tune.store import Search
from vtprune.json_files import parse
from vtprune.training.output import read_log
from vtprune.training.state import REST

COST = RowCost(*[1.0] * 10)
ENTRY = asdict(Answer("yes", 3, 1, 0.5, COST))
CONFIG = {"code": "c", "tasks": ["t"], "method": "holov"}
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["key", "measured"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
QUICK = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def line(key: str, **changes: Any) -> bytes:
    return json.dumps({"key": key, **ENTRY, **changes}).encode()


BAD = {
    "garbage": b"\xff\x00{{{",
    "no object": b"[1]",
    "a number": b"7",
    "null": b"null",
    "no key": json.dumps(ENTRY).encode(),
    "a key that is no text": json.dumps({"key": 1, **ENTRY}).encode(),
    "only a key": b'{"key": "x"}',
    "a text that is none": line("x", text=None),
    "a cost that is none": line("x", cost=[]),
    "half a cost": line("x", cost={"flops": 1.0}),
    "a cost too many": line("x", cost={**asdict(COST), "more": 1.0}),
    "a cost without a number": line("x", cost={**asdict(COST), "flops": None}),
    "not finite": line("x", seconds=float("nan")),
    "something else": line("x", more=1),
    "too deep": b"[" * 100_000,
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_a_bad_line_is_left_out_by_name_and_all_others_are_kept(bad: bytes, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b"\n".join([line("a"), bad, line("b"), line("c")]))
    journal = Journal(path)
    assert [journal.get(key) for key in "abc"] == [ENTRY] * 3
    (said,) = journal.bad
    assert f"{path}, line 2 is not an answer" in said
    journal.add({"d": ENTRY})
    again = Journal(path)
    assert not again.bad
    assert all(again.get(key) == ENTRY for key in "abcd")


@QUICK
@given(st.lists(st.one_of(VALUES.map(json.dumps).map(str.encode), st.binary(max_size=20)), max_size=4), st.integers(0))
def test_no_content_of_a_journal_stops_a_run(lines: list[bytes], cut: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal.jsonl"
        whole = b"\n".join([line("a"), *lines, line("b")]) + b"\n"
        path.write_bytes(whole)
        journal = Journal(path)
        assert journal.get("a") == journal.get("b") == ENTRY
        path.write_bytes(whole[: cut % len(whole)])
        short = Journal(path)
        short.add({"c": ENTRY})
        assert Journal(path).get("c") == ENTRY


def whole_results() -> dict[str, Any]:
    records = {name: record(name, 0.25, 0.5) for name in ("none", "grid")}
    for one in records.values():
        one["tokens"] = {"before": 4.0, "kept": 1.0, "published": None}
        one["flops"] = {"share": 0.5, "scoring_share": 0.0}
        one["prefill"] = {"ms": 1.0, "ratio": 1.0, "over_scoreless_ms": None}
        one["correct"], one["metrics"] = [1.0] * 9, {"t": {"accuracy,none": 0.5, "f1,none": 0.5}}
        one["by_task"] = {"t": {name: one[name] for name in ("tokens", "flops", "kv")}}
    return {"format": FORMAT, "config": CONFIG, "questions": [{"doc_id": 0}], "settings": records}


def whole_search() -> dict[str, Any]:
    trial = {"number": 0, "params": {}, "state": "measured", "objective": 0.5, "reason": None, "kept": 1.0,
             "tokens": 4.0, "flops_share": 0.5, "pruner": vtprune.HoloV(keep=0.2).to_dict()}  # fmt: skip
    return {"format": 1, "config": CONFIG, "trials": [trial], "best": 0, "check": None}


def whole_log() -> dict[str, Any]:
    point = {"step": 1, "loss": 1.0, "auxiliary": 0.0, "rate": 0.1}
    return {"state": "finished", "settings": {}, "steps": 1, "samples": 1, "answer_tokens": 1, "seconds": 1.0,
            "curve": [point]}  # fmt: skip


def read_results(folder: Path) -> object:
    records = list(Results(folder, CONFIG, resume=True).settings.values())
    return records and [
        markdown_table(columns, records) for columns in (quality_columns(records), metric_columns(records))
    ]


READERS: dict[str, tuple[str, Callable[[], dict[str, Any]], Callable[[Path], object]]] = {
    "bench": ("results.json", whole_results, read_results),
    "tune": ("search.json", whole_search, lambda folder: Search(folder, CONFIG, restart=False).best),
    "train": ("training.json", whole_log, read_log),
    "config": ("vtprune_config.json", lambda: vtprune.method.config.to_dict(vtprune.HoloV()), vtprune.load_config),
    "questions": (
        "metadata.jsonl",
        lambda: {"file_name": "gone.png", "question": "?"},
        lambda folder: read_folder(folder, "?", Wanted(1, 0, 0)),
    ),
}


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to everything inside a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [place for key, inner in items for place in places(inner, (*path, key))]
    return ([path] if path else []) + found


def refusal(call: Callable[[], object]) -> str | None:
    """What a reader says against a file; no other kind of error may come."""
    try:
        call()
    except VTPruneError as error:
        return str(error)
    return None


def changed(whole: dict[str, Any], path: tuple[Any, ...], value: Any, *, remove: bool) -> dict[str, Any]:
    copy: dict[str, Any] = json.loads(json.dumps(whole))
    inner: Any = copy
    for key in path[:-1]:
        inner = inner[key]
    if remove:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return copy


@pytest.mark.parametrize("reader", READERS)
@QUICK
@given(data=st.data())
def test_every_damaged_file_is_read_rightly_or_named(reader: str, data: st.DataObject) -> None:
    name, make, read = READERS[reader]
    whole = make()
    where = data.draw(st.sampled_from(places(whole)))
    broken = changed(whole, where, data.draw(VALUES), remove=data.draw(st.booleans()))
    text = data.draw(st.sampled_from([json.dumps(broken), json.dumps(data.draw(VALUES))]))
    text = text[: data.draw(st.sampled_from([len(text), len(text) // 2]))]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_text(text)
        said = refusal(lambda: read(Path(folder)))
        assert said is None or folder in said


def test_results_without_settings_and_searches_of_other_methods_are_named(tmp_path: Path) -> None:
    data = whole_results()
    del data["settings"]
    (tmp_path / "results.json").write_text(json.dumps(data))
    with pytest.raises(VTPruneError, match=r"results\.json is not a .*: settings: Field required.*--no-resume"):
        Results(tmp_path, CONFIG, resume=True)
    search = whole_search()
    search["trials"][0]["pruner"] = {"method": "holv"}
    (tmp_path / "search.json").write_text(json.dumps(search))
    with pytest.raises(VTPruneError, match=r"search\.json is not .*trials\.0\.pruner: .*holv.*--restart"):
        Search(tmp_path, CONFIG, restart=False)


@QUICK
@given(VALUES.map(json.dumps))
def test_the_rest_of_a_checkpoint_is_whole_or_named(text: str) -> None:
    with pytest.raises(FileError, match=r"state\.safetensors is not"):
        parse(REST, text, "state.safetensors", "a checkpoint")
