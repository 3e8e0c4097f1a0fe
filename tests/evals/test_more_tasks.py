"""The tasks of the second drawn set: what they show a model, how they judge its answers, and who is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint import random_qwen3_checkpoint
from tests.cli.test_cli import fails, run
from tests.evals.test_plugin import (
    evaluate,
)
from vtprune.assets import PARTS
from vtprune.evals.bench.suite import BUNDLED_TASKS, open_suite
from vtprune.evals.lmms.model import VTPrune
from vtprune.shapes.describing import description_score
from vtprune.shapes.more import read_more_rows, score_more

ROUNDS = 8
# Placeholders of pictures and frames in the shortest prompt of each part.
SHOWN = {"grounding": 1, "descriptions": 1, "forms": 1, "pairs": 2, "clips": 3}


def of_part(part: str, model: str | None, limit: int = ROUNDS) -> list[dict[str, Any]]:
    task = f"vtprune_{part}"
    with open_suite([task], limit, seed=0) as suite:
        lm = VTPrune(model, batch_size=4, frames=6)
        samples: list[dict[str, Any]] = evaluate(lm, suite.manager, task)["samples"][task]
    return samples


@pytest.mark.parametrize("part", PARTS)
def test_every_form_is_sampled_and_judged_by_its_own_rule(part: str) -> None:
    samples = of_part(part, random_qwen3_checkpoint(experts=False))
    rows = {row.id: row for row in read_more_rows(BUNDLED_TASKS[f"vtprune_{part}"])}
    forms = {row.category for row in rows.values()}
    assert {sample["doc"]["category"] for sample in samples} == forms
    metric = "f1" if part == "descriptions" else "accuracy"
    for sample in samples:
        row, answer = rows[sample["doc"]["id"]], sample["filtered_resps"][0]
        assert sample["target"] == row.answer
        assert sample[metric] == score_more(row.category, row.form, answer=answer, truth=row.answer)
        assert sample["token_counts"][0]["visual_tokens"] >= 4 * SHOWN[part]


def test_the_bundled_llava_tells_more_of_a_picture_than_another_ones_description_does() -> None:
    samples = of_part("descriptions", None, 12)
    scores = [sample["f1"] for sample in samples]
    other = [
        description_score(sample["filtered_resps"][0], samples[i - 1]["target"]) for i, sample in enumerate(samples)
    ]
    assert sum(scores) / len(scores) > 0.4
    assert sum(other) / len(other) < 0.1


def test_two_pictures_stand_in_one_prompt() -> None:
    one, two = of_part("forms", None, 1)[0], of_part("pairs", None, 1)[0]
    assert one["token_counts"][0]["visual_tokens"] == 144
    assert two["token_counts"][0]["visual_tokens"] == 288


def test_a_model_that_takes_no_videos_is_refused_by_name(tmp_path: Path) -> None:
    found = run("bench", "--tasks", "vtprune_clips", "--methods", "grid", "--output", str(tmp_path / "bench"))
    fails(found, 1, "vtprune_clips shows videos")


def test_a_part_without_its_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUNDLED_TASKS, "vtprune_pairs", tmp_path / "gone.parquet")
    found = run("bench", "--tasks", "vtprune_pairs", "--methods", "grid", "--output", str(tmp_path / "bench"))
    fails(found, 2, "the data of vtprune_pairs are missing")
