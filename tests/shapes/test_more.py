"""The second drawn set: what it asks is true of what it shows, and its answers are judged fairly."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from vtprune.assets import PARTS, SHAPES_MORE
from vtprune.loading.pictures import open_picture
from vtprune.shapes.clips import EVENTS, FRAMES, SIDE, SPEED, sample_clip
from vtprune.shapes.describing import DESCRIBE, describe, description_score, read_description
from vtprune.shapes.forms import FACTS, FORMS_OF_ONE, ask_fact, draw_fact, says_fact
from vtprune.shapes.grounding import STEPS, box_of, is_right_box, overlap, read_box
from vtprune.shapes.more import PARTS as MADE
from vtprune.shapes.more import MoreRow, build_more_rows, more_vocabulary, read_more_rows, score_more
from vtprune.shapes.questions import quadrant, vocabulary
from vtprune.shapes.render import owner_map, render
from vtprune.shapes.scene import Glyph, Scene, Thing, make_scene, most_things, sample_scene

COUNTS = {"grounding": 200, "descriptions": 100, "forms": 400, "pairs": 150, "clips": 160}
SCENE = Scene(
    things=(
        Thing("red", "circle", 20, 24, 10, "7"),
        Thing("blue", "circle", 70, 20, 10),
        Thing("red", "square", 44, 74, 10, "k"),
    ),
    ground=60,
    texture=1,
)


@pytest.fixture(scope="module")
def rows() -> dict[str, list[MoreRow]]:
    return {part: read_more_rows(path) for part, path in SHAPES_MORE.items()}


def scenes_of(row: MoreRow) -> list[Scene]:
    found = []
    for text in row.scenes:
        values = json.loads(text)
        things = tuple(Thing(**thing) for thing in values.pop("things"))
        loose = values.pop("loose")
        found.append(Scene(things=things, loose=None if loose is None else Glyph(**loose), **values))
    return found


def names(scene: Scene) -> list[str]:
    return [thing.name for thing in scene.things]


@pytest.mark.parametrize("part", PARTS)
def test_the_files_are_what_the_generator_makes(part: str, rows: dict[str, list[MoreRow]]) -> None:
    assert tuple(MADE) == PARTS
    assert rows[part] == build_more_rows(part)
    assert len(rows[part]) == COUNTS[part]
    assert len({row.id for row in rows[part]}) == COUNTS[part]


def test_the_pictures_are_those_of_the_scenes(rows: dict[str, list[MoreRow]]) -> None:
    for part in PARTS:
        for row in rows[part][:10]:
            for png, scene in zip(row.media, scenes_of(row), strict=True):
                assert np.array_equal(np.asarray(open_picture(png, "it")), render(scene))


def test_scenes_are_none_of_the_first_sets_training(rows: dict[str, list[MoreRow]]) -> None:
    trained = {make_scene("train", 0, index).key() for index in range(3000)}
    own = {scene.key() for part in PARTS for row in rows[part] for scene in scenes_of(row)}
    # A single thing is soon drawn twice.
    assert not {key for key in own & trained if len(json.loads(key)[0]) > 1}


def test_things_stand_apart_in_pictures_of_every_size() -> None:
    for index, (width, height) in enumerate([(64, 64), (64, 96), (96, 64), (128, 96), (128, 128)] * 6):
        scene = sample_scene(np.random.default_rng(index), width, height)
        assert render(scene).shape == (height, width, 3)
        assert 1 <= len(scene.things) <= most_things(width, height)
        shown = owner_map(scene)
        assert set(np.unique(shown)) == set(range(-1, len(scene.things)))


def test_a_size_is_told_where_it_is_not_the_usual_one() -> None:
    assert "width" not in SCENE.to_json()
    assert json.loads(replace(SCENE, width=128).to_json())["width"] == 128
    assert quadrant(SCENE, SCENE.things[1]) == "top right"
    assert quadrant(replace(SCENE, width=192), SCENE.things[1]) == "top left"


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("2 3 8 9", (2, 3, 8, 9)),
        ("[2, 3, 8, 9]", (2, 3, 8, 9)),
        ("about 2.5 3 8 9.", (2.5, 3, 8, 9)),
        ("2 3 8", None),
        ("8 3 2 9", None),
        ("red", None),
        ("1 2 3 4 5", None),
    ],
)
def test_boxes_are_read(text: str, box: Any) -> None:
    assert read_box(text) == box


def test_boxes_are_judged_by_their_overlap() -> None:
    assert overlap((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert overlap((0, 0, 2, 2), (5, 5, 6, 6)) == 0
    truth = " ".join(map(str, box_of(SCENE, SCENE.things[0])))
    assert truth == "2 3 8 9"
    assert is_right_box(truth, truth)
    assert is_right_box("3 4 8 9", truth)
    assert not is_right_box("4 5 10 11", truth)
    assert not is_right_box("top left", truth)


def test_a_box_covers_its_thing_in_any_size() -> None:
    for width, height in ((96, 96), (128, 64)):
        scene = sample_scene(np.random.default_rng(1), width, height)
        shown = owner_map(scene)
        for place, thing in enumerate(scene.things):
            left, top, right, bottom = box_of(scene, thing)
            y, x = np.nonzero(shown == place)
            assert left <= x.min() * STEPS / width
            assert (x.max() + 1) * STEPS / width <= right + 1e-9
            assert top <= y.min() * STEPS / height
            assert (y.max() + 1) * STEPS / height <= bottom + 1e-9
            assert (right - left) * width / STEPS <= 2 * thing.radius + 1 + 2 * width / STEPS


def test_grounding_is_true(rows: dict[str, list[MoreRow]]) -> None:
    for row in rows["grounding"]:
        (scene,) = scenes_of(row)
        if row.form == "box":
            name = row.question.removeprefix("find the ")
            (thing,) = [one for one in scene.things if one.name == name]
            assert row.answer == " ".join(map(str, box_of(scene, thing)))
        else:
            x, y = map(int, row.question.removeprefix("what is at ").removesuffix("?").split())
            shown = owner_map(scene)
            middle = shown[int((y + 0.5) * scene.height / STEPS), int((x + 0.5) * scene.width / STEPS)]
            near = [t for t in scene.things if abs(t.x - (x + 0.5) * scene.width / STEPS) <= scene.width / STEPS]
            assert row.answer in {thing.name for thing in near}
            assert middle == -1 or scene.things[middle].name == row.answer


def test_descriptions_are_read_in_any_order() -> None:
    told = [("red", "circle", "7", "top left"), ("red", "square", "k", ""), ("blue", "circle", "", "top right")]
    assert describe(SCENE) == "red circle 7 top left red square k blue circle top right"
    assert read_description(describe(SCENE)) == told
    # The bundled LLaVA names shapes first, or places before glyphs, as it likes.
    assert read_description("circle red top left 7 square red k circle blue top right") == told
    assert read_description("Red circle 7, top left. Red square k; blue circle top right") == told


def test_descriptions_are_judged_thing_by_thing() -> None:
    truth = describe(SCENE)
    assert description_score(truth, truth) == 1
    assert description_score("blue circle top right red circle 7 top left red square k", truth) == 1
    assert description_score("red circle 7 top left", truth) == pytest.approx(2 * 1 / 4)
    assert description_score("red circle 8 top left red square k blue circle top right", truth) == pytest.approx(2 / 3)
    assert description_score(f"{truth} green cross", truth) == pytest.approx(6 / 7)
    assert description_score("nothing", truth) == 0


def test_long_answers_are_long(rows: dict[str, list[MoreRow]]) -> None:
    lengths = [len(row.answer.split()) for row in rows["descriptions"]]
    assert np.mean(lengths) > 15
    assert max(lengths) >= 25
    assert {row.question for row in rows["descriptions"]} == {DESCRIBE}


def test_every_fact_is_asked_in_four_forms(rows: dict[str, list[MoreRow]]) -> None:
    facts: dict[str, dict[str, MoreRow]] = {}
    for row in rows["forms"]:
        facts.setdefault(row.fact, {})[row.category] = row
    assert len(facts) == 100
    kinds = Counter()
    for asked in facts.values():
        assert set(asked) == set(FORMS_OF_ONE)
        truth, kind = asked["short"].answer, asked["short"].form
        kinds[kind, asked["yes_no"].answer] += 1
        assert asked["choice"].answer == truth
        assert truth in asked["choice"].question
        assert (truth in asked["yes_no"].question) >= (asked["yes_no"].answer == "yes")
        assert says_fact(asked["describe_one"].answer, asked["describe_one"].answer, kind)
        assert truth in asked["describe_one"].answer
        assert len({row.scenes[0] for row in asked.values()}) == 1
    assert set(kinds.values()) <= {12, 13}


def test_a_wrong_fact_in_a_description_is_wrong() -> None:
    truth = "red circle 7 top left"
    for kind, said in (("color", "blue"), ("shape", "square"), ("glyph", "8"), ("place", "top right")):
        old = truth.split()[list(FACTS).index(kind)] if kind != "place" else "top left"
        told = truth.replace(old, said)
        assert not says_fact(told, truth, kind)
        assert all(says_fact(told, truth, other) for other in FACTS if other != kind)
    assert not says_fact(f"{truth} blue square", truth, "color")


def test_facts_of_yes_and_no_agree_with_the_scene() -> None:
    for index in range(200):
        rng = np.random.default_rng(index)
        scene, kind = sample_scene(rng), list(FACTS)[index % 4]
        fact = draw_fact(scene, rng, kind)
        if fact is None:
            continue
        qa = ask_fact(fact, "yes_no", rng)
        value = fact.truth if qa.answer == "yes" else fact.other
        assert value in qa.question
        assert fact.truth != fact.other


def test_pairs_are_true_and_balanced(rows: dict[str, list[MoreRow]]) -> None:
    for row in rows["pairs"]:
        first, second = scenes_of(row)
        if row.form == "pair_which":
            name = row.question.removeprefix("in which picture is a ").removesuffix("?")
            assert (name in names(first), name in names(second)) == (row.answer == "first", row.answer == "second")
        elif row.form == "pair_more":
            assert (len(first.things) > len(second.things)) == (row.answer == "first")
            assert len(first.things) != len(second.things)
        else:
            shape, scene = row.question.split()[4], first if "first" in row.question else second
            assert [t.color for t in scene.things if t.shape == shape] == [row.answer]
    for form in ("pair_which", "pair_more"):
        assert Counter(row.answer for row in rows["pairs"] if row.form == form) == {"first": 25, "second": 25}


def test_clips_show_what_they_are_asked_about(rows: dict[str, list[MoreRow]]) -> None:
    for row in rows["clips"]:
        frames = scenes_of(row)
        assert len(frames) == FRAMES
        first, last = frames[0], frames[-1]
        if row.form == "clip_count":
            assert int(row.answer) == len((first if "start" in row.question else last).things)
        elif row.form == "clip_becomes":
            assert row.answer in {thing.color for thing in last.things}
            assert next(t for t in first.things if t not in last.things).color != row.answer
        else:
            before = [t for t in first.things if t not in last.things]
            (moved,) = before
            (after,) = [t for t in last.things if t not in first.things]
            shift = (after.x - moved.x, after.y - moved.y)
            ways = {(-1, 0): "left", (1, 0): "right", (0, -1): "up", (0, 1): "down"}
            way = ways[tuple(int(np.sign(step)) for step in shift)]  # type: ignore[index]
            assert row.answer == (way if row.form == "clip_way" else moved.color)
            assert max(map(abs, shift)) == SPEED * (FRAMES - 1)


def test_every_kind_of_event_is_drawn() -> None:
    clips = [sample_clip(np.random.default_rng(index)) for index in range(60)]
    assert {clip.event for clip in clips} == set(EVENTS)
    assert all(len(clip.frames) == FRAMES and clip.frames[0].width == SIDE for clip in clips)
    for clip in clips:
        counts = [len(frame.things) for frame in clip.frames]
        changes = {"come": 1, "go": -1}.get(clip.event, 0)
        assert counts[-1] - counts[0] == changes


def test_the_true_answers_are_right_and_others_are_not(rows: dict[str, list[MoreRow]]) -> None:
    for part in PARTS:
        for row in rows[part]:
            assert score_more(row.category, row.form, answer=row.answer, truth=row.answer) == 1
            assert score_more(row.category, row.form, answer="nothing", truth=row.answer) == 0


def test_every_word_is_in_the_vocabulary(rows: dict[str, list[MoreRow]]) -> None:
    known = {*vocabulary(), *more_vocabulary()}
    for part in PARTS:
        for row in rows[part]:
            assert set(f"{row.question} {row.answer}".replace("?", "").split()) <= known
