"""The parts of the search: its samples, its proposals, and the keep that fits a budget of FLOPs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.clips import write_clip, write_frames
from vtprune.assets import SHAPES_EVAL
from vtprune.errors import InputError, VTPruneError
from vtprune.evals.samples import Wanted, draw_shapes, read_folder
from vtprune.evals.tune.budget import OverBudgetError, largest_count
from vtprune.evals.tune.space import all_settings, holds, propose
from vtprune.loading.media import size_text
from vtprune.loading.videos import Video
from vtprune.method.pruner import Tunable
from vtprune.shapes import read_eval_rows


def pictures(folder: Path, count: int) -> Path:
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (90 + i, 96), (20 * i, 90, 40)).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("best", range(1, 20))
def test_the_largest_count_is_found_from_any_hint(best: int) -> None:
    for hint in range(1, 20):
        assert largest_count(lambda count: count / 20, best / 20, 20, hint) == best

    def refusing(count: int) -> float:
        if not best - 2 <= count <= best + 2:
            raise VTPruneError("no such split")
        return count / 20

    assert largest_count(refusing, best / 20, 20, best) == best
    with pytest.raises(OverBudgetError, match=r"needs 5\.0%"):
        largest_count(lambda count: count / 20, 0.01, 20, best)


def test_metadata_gives_questions_and_held_out_pictures_are_others(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "data", 8)
    rows = [{"file_name": f"{i // 2}.png", "question": f"{i}?"} for i in range(15)] + [{"file_name": "7.png"}]
    (folder / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    told: list[str] = []
    found = read_folder(folder, "What?", Wanted(6, 6, 0), told.append)
    assert (len(found.search), len(found.check), told) == (6, 6, [])
    assert not {sample.name for sample in found.search} & {sample.name for sample in found.check}
    for sample in found.search + found.check:
        assert sample.question == "What?" or int(sample.question[:-1]) // 2 == int(sample.name[0])
    assert found.fingerprint() == read_folder(folder, "What?", Wanted(6, 6, 0)).fingerprint()
    assert found.fingerprint() != read_folder(folder, "What?", Wanted(6, 6, 1)).fingerprint()
    few = read_folder(folder, "What?", Wanted(30, 10, 0), told.append)
    assert (len(few.search), len(few.check)) == (12, 4)
    assert "12 to search on, 4 held out" in told[0]


def test_a_folder_holds_videos_and_folders_of_frames_that_are_named(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "data", 1)
    write_clip(folder / "clip.webm", 30, 10, codec="libvpx-vp9")
    found = read_folder(folder, "What?", Wanted(1, 1, 0, frames=5))
    (video,) = [sample.media for sample in found.search + found.check if isinstance(sample.media, Video)]
    assert len(video.frames) == 5
    again, more = (read_folder(folder, "What?", Wanted(1, 1, 0, frames=frames)) for frames in (5, 6))
    assert found.fingerprint() == again.fingerprint() != more.fingerprint()
    write_frames(folder / "frames", 12)
    rows = [{"file_name": "frames"}, {"file_name": "clip.webm", "question": "Who?"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = read_folder(folder, "What?", Wanted(1, 1, 0))
    sizes = {sample.name: (sample.question, size_text(sample.media)) for sample in found.search + found.check}
    assert sizes == {"frames": ("What?", "12 frames of 64x48"), "clip.webm": ("Who?", "16 frames of 64x48")}


def test_metadata_may_begin_with_a_byte_order_mark_and_hold_line_separators(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "data", 2)
    rows = [{"file_name": f"{i}.png", "question": "one\u2028two"} for i in range(2)]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8-sig")
    assert read_folder(folder, "What?", Wanted(1, 1, 0)).search[0].question == "one\u2028two"
    (folder / "metadata.jsonl").write_text("\n")
    with pytest.raises(InputError, match="names no picture"):
        read_folder(folder, "What?", Wanted(1, 1, 0))


def test_drawn_samples_are_new_and_repeat_with_the_seed() -> None:
    found = draw_shapes(Wanted(30, 30, 0))
    known = {row.open_image().tobytes() for row in read_eval_rows(SHAPES_EVAL)}
    drawn = {sample.media.tobytes() for sample in found.search + found.check}
    assert len(drawn) == 60
    assert not drawn & known
    assert found.fingerprint() == draw_shapes(Wanted(30, 30, 0)).fingerprint()
    assert found.fingerprint() != draw_shapes(Wanted(30, 30, 1)).fingerprint()


def test_proposals_stay_in_the_space_and_depend_on_the_arguments_alone() -> None:
    space = {
        "a": Tunable(-1.0, 1.0),
        "b": Tunable(0.1, 10.0, log=True),
        "c": Tunable(2, 5, whole=True),
        "d": Tunable(choices=(None, "x", True, 1)),
    }
    tried: list[tuple[dict[str, Any], float | None]] = []
    for number in range(14):
        params = propose(space, tried, number, 3)
        assert params is not None
        assert params == propose(space, tried, number, 3)
        assert all(holds(space[name], value) for name, value in params.items())
        tried.append((params, None if number % 4 == 3 else -abs(params["a"])))
    assert all_settings(space) is None
    finite = {name: space[name] for name in "cd"}
    assert len(all_settings(finite) or []) == 16
    assert not holds(space["c"], 2.0)
    assert not holds(space["d"], 1.0)
    assert not holds(space["a"], 1.5)
