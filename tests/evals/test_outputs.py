"""What commands leave: nothing that was there is overwritten, and numbers that stand beside each other agree."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from tests.checkpoint import png
from vtprune.console.progress import Estimate, Steps, clock
from vtprune.errors import VTPruneError
from vtprune.evals.arank import ranking as arank
from vtprune.evals.ask.ask import (
    Asked,
    check_output,
    encoded,
    table,
)
from vtprune.evals.ask.overlay import _heading
from vtprune.evals.lmms.efficiency import RowCost
from vtprune.evals.lmms.generation import Answer
from vtprune.evals.speed.timing import PrefillTimes
from vtprune.evals.tune.store import Search
from vtprune.training.run import _held


def test_ask_replaces_its_own_pictures_and_no_others(tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    photo.write_bytes(png(8, 8))
    with pytest.raises(VTPruneError, match="the picture that is asked about"):
        check_output(photo, photo)
    for suffix in (".png", ".jpg", ".webp"):
        own, other = tmp_path / f"own{suffix}", tmp_path / f"other{suffix}"
        check_output(own, photo)
        own.write_bytes(encoded(Image.new("RGB", (8, 8)), suffix))
        check_output(own, photo)
        Image.new("RGB", (8, 8)).save(other)
        with pytest.raises(VTPruneError, match="is there already and not of an earlier answer"):
            check_output(other, photo)


def test_shares_are_those_of_the_two_numbers_beside_them() -> None:
    cost = RowCost(144, 144.0, 7.9e8, 7.9e8, 0.0, 952.3e3, 952.3e3, 958.5e3, 958.5e3, 1.0)
    less = replace(cost, kept_tokens=35.97, flops=3.688e8, kv_bytes=288.77e3, kv_bytes_end=294.94e3)
    # The median of the pairs' ratios is 0.5, the ratio of the medians 0.75.
    prefill = PrefillTimes({"unpruned": [1.0, 2.0, 4.0], "pruned": [1.5, 1.0, 2.0]})
    answers = [Answer("a", 3, 1, 0.1, one) for one in (cost, less)]
    asked = Asked(answers[0], answers[1], None, prefill, Image.new("RGB", (1, 1)))  # type: ignore[arg-type]
    found = table(asked, "flowcut")
    rows = list(zip(*(list(column.cells) for column in found.columns), strict=True))
    assert [row[0] for row in rows][-1] == "prefill ms"
    for _, before, after, share in rows[1:]:
        assert share == f"{100 * float(str(after)) / float(str(before)):.1f}%"


def test_a_title_is_broken_into_lines_and_takes_no_room_where_there_is_none() -> None:
    assert _heading("", 720).height == 0
    one, many = _heading("short", 720), _heading("a question of many words " * 12, 720)
    assert 0 < one.height < many.height
    assert many.getextrema() == ((0, 255),) * 3


def test_a_search_and_a_training_refuse_folders_of_something_else(tmp_path: Path) -> None:
    for name in ("vtprune_config.json", "search.png", "unpruned.safetensors"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("mine")
        with pytest.raises(VTPruneError, match=rf"holds {name}, but no search\.json"):
            Search(folder, {"code": "c"}, restart=False)
    for name in ("vtprune_config.json", "model.safetensors", "vtprune_weights.safetensors", "loss.png"):
        folder = tmp_path / f"train-{name}"
        folder.mkdir()
        (folder / name).write_text("mine")
        with pytest.raises(VTPruneError, match=rf"holds a .*: {name}, but no training\.json"), _held(folder):
            pass


def test_arank_replaces_ranks_and_no_other_file(tmp_path: Path) -> None:
    output, plot = tmp_path / "results.json", tmp_path / "results.png"
    arank._check_output(output, plot)
    output.write_text(json.dumps({"format": 2, "settings": {}}))
    with pytest.raises(VTPruneError, match=r"results\.json is not a file of ranks, so it is not replaced"):
        arank._check_output(output, plot)
    output.write_text(json.dumps({"format": "vtprune-arank", "arank": [1.0], "layers": [0]}))
    arank._check_output(output, plot)
    output.unlink()
    plot.write_text("mine")
    with pytest.raises(VTPruneError, match=r"holds results\.png"):
        arank._check_output(output, plot)


class Flushed(io.StringIO):
    """A stream that notes what had been written whenever it was flushed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def flush(self) -> None:
        self.seen.append(self.getvalue())


def test_a_step_has_a_line_with_its_time_that_is_flushed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("vtprune.console.progress.time.monotonic", lambda: now[0])
    stream = Flushed()
    with Steps(Console(file=stream, width=40), "trials", 3, 1, parts="samples") as steps:
        steps.begin("trial 1", 10)
        now[0] = 61.0
        steps.part(4)
        now[0] = 75.0
        steps.end("trial 1: cosine 0.5")
        lines = stream.seen[-1].splitlines()
    assert lines == [
        "[2/3] trial 1: 4 of 10 samples so far",
        "[2/3] trial 1: cosine 0.5; 75.0 s, 1:15 in all, about 1:15 left",
    ]
    assert [clock(59.6), clock(3605)] == ["1:00", "1:00:05"]


def test_an_estimate_is_of_the_second_batch_and_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = [0.0], []
    monkeypatch.setattr("vtprune.console.progress.time.monotonic", lambda: now[0])
    estimate = Estimate(3, said.append)
    for at, count in ((0.0, 0), (9.0, 16), (9.8, 16), (99.0, 16)):
        now[0] = at
        estimate.answered(count, 100)
    (line,) = said
    assert line.startswith("about 0:15 for all of it, by the 50 ms that the first answers took each")
