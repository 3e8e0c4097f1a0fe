"""The Shapes benchmark and the bundled model: generated right, frozen right, and answered right."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from vtprune.assets import EXAMPLE_IMAGE, SHAPES_EVAL, TINY_LLAVA
from vtprune.shapes import (
    CATEGORIES,
    Glyph,
    Scene,
    Thing,
    make_scene,
    read_eval_rows,
    render,
)
from vtprune.shapes.dataset import (
    EvalRow,
    blind_baseline,
    build_eval_rows,
    overlap_with_training,
    quotas,
)
from vtprune.shapes.questions import (
    FORMS,
    QA,
    ask,
    normalise,
    vocabulary,
)
from vtprune.shapes.render import owner_map, shape_mask
from vtprune.shapes.scene import SHAPES, SPLITS, scene_rng

# Two reds, two circles; the leftmost, the topmost and each glyph are clear.
SCENE = Scene(
    things=(
        Thing("red", "circle", 20, 24, 10, "7"),
        Thing("blue", "circle", 70, 20, 10),
        Thing("red", "square", 40, 74, 10, "k"),
    ),
    ground=60,
    texture=1,
    loose=Glyph("3", 80, 80),
)
ANSWERS = {
    "is there a red circle?": "yes",
    "is there a blue square?": "no",
    "how many shapes are there?": "3",
    "how many red shapes are there?": "2",
    "how many crosses are there?": "0",
    "what color is the square?": "red",
    "which shape is blue?": "circle",
    "where is the red circle?": "top left",
    "where is the blue circle?": "top right",
    "what color is the leftmost shape?": "red",
    "which shape is bottommost?": "square",
    "what color is the rightmost shape?": "blue",
    "is the red circle left of the blue circle?": "yes",
    "is the red square above the blue circle?": "no",
    "what is written on the red circle?": "7",
    "what is written on the ground?": "3",
    "which shape is marked k?": "square",
    "what color is the shape marked 7?": "red",
}


def all_questions(scene: Scene, draws: int = 3000) -> dict[str, QA]:
    """Every question that many draws find about a scene."""
    rng = np.random.default_rng(0)
    drawn = (ask(scene, rng, CATEGORIES[i % len(CATEGORIES)]) for i in range(draws))
    return {qa.question: qa for qa in drawn if qa is not None}


@pytest.fixture(scope="module")
def frozen() -> list[EvalRow]:
    """The evaluation set as shipped."""
    return read_eval_rows(SHAPES_EVAL)


@pytest.fixture(scope="module")
def processor() -> ProcessorMixin:
    """The bundled processor."""
    return AutoProcessor.from_pretrained(TINY_LLAVA)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """The bundled model."""
    return AutoModelForImageTextToText.from_pretrained(TINY_LLAVA).eval()


def test_scene_and_pixels_depend_on_split_seed_and_index_alone() -> None:
    first, again = make_scene("eval", 3, 17), make_scene("eval", 3, 17)
    assert first == again
    assert np.array_equal(render(first), render(again))
    others = [make_scene("train", 3, 17), make_scene("eval", 4, 17), make_scene("eval", 3, 18)]
    assert all(other.key() != first.key() for other in others)


def test_pixels_are_the_same_everywhere() -> None:
    image = render(SCENE)
    assert image.shape == (96, 96, 3)
    assert image.dtype == np.uint8
    assert hashlib.sha256(image.tobytes()).hexdigest().startswith("1a99ce04778f8102")


def test_things_stay_inside_and_hardly_cover_one_another() -> None:
    for index in range(200):
        scene = make_scene("train", 0, index)
        areas = [int(shape_mask(thing.shape, thing.radius).sum()) for thing in scene.things]
        seen = Counter(owner_map(scene).ravel().tolist())
        # Corners of squares reach beyond the radius that placing goes by: a few pixels may be hidden.
        assert all(seen[i] > 0.95 * area for i, area in enumerate(areas))
    assert all(shape_mask(shape, 9).any() for shape in SHAPES)


@pytest.mark.parametrize(("question", "answer"), ANSWERS.items())
def test_answers_of_a_scene_checked_by_hand(question: str, answer: str) -> None:
    assert all_questions(SCENE)[question].answer == answer


def test_unclear_positions_and_ambiguous_names_are_not_asked() -> None:
    things = (Thing("red", "circle", 47, 20, 9), Thing("red", "circle", 50, 70, 9), Thing("cyan", "cross", 49, 45, 9))
    asked = all_questions(Scene(things, 60, 1))
    assert not any("the red circle" in question for question in asked)
    assert not any("leftmost" in question or "rightmost" in question for question in asked)
    assert "where is the cyan cross?" not in asked


def test_splits_have_seeds_of_their_own_and_share_no_scene() -> None:
    assert len(set(SPLITS.values())) == len(SPLITS)
    assert overlap_with_training(per_category=20, eval_seed=0, train_seed=0, train_scenes=3000) == 0
    draws = {split: scene_rng(split, 0, 0).integers(2**62) for split in SPLITS}
    assert len(set(draws.values())) == len(SPLITS)


def test_overlap_is_found_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SPLITS, "train", SPLITS["eval"])
    assert overlap_with_training(per_category=20, eval_seed=0, train_seed=0, train_scenes=50) > 0


def test_frozen_set_is_what_the_generator_makes(frozen: list[EvalRow]) -> None:
    made = build_eval_rows(len(frozen) // len(CATEGORIES))
    assert [(r.id, r.question, r.answer, r.scene) for r in made] == [
        (r.id, r.question, r.answer, r.scene) for r in frozen
    ]
    # PNG bytes may differ between zlib versions, pixels may not.
    for ours, theirs in zip(made[::50], frozen[::50], strict=True):
        assert np.array_equal(np.asarray(ours.open_image()), np.asarray(theirs.open_image()))


def test_answers_are_balanced_in_every_form(frozen: list[EvalRow]) -> None:
    assert len(frozen) >= 1200
    seen = Counter((row.form, row.answer) for row in frozen)
    assert dict(seen) == quotas(len(frozen) // len(CATEGORIES))
    baseline = blind_baseline(frozen)
    assert baseline["existence"] == 0.5
    assert max(baseline[name] for name in CATEGORIES if name != "existence") < 0.35


def test_any_prefix_is_balanced_over_categories(frozen: list[EvalRow]) -> None:
    for length in (5, 50, 333, 1000):
        counts = Counter(row.category for row in frozen[:length])
        assert max(counts.values()) - min(counts[name] for name in CATEGORIES) <= 1
    per_image = Counter(row.image for row in frozen)
    assert max(per_image.values()) <= 3


def test_datasets_decodes_the_parquet(tmp_path: Path, frozen: list[EvalRow]) -> None:
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset("parquet", data_files=str(SHAPES_EVAL), split="train", cache_dir=str(tmp_path))
    assert loaded.num_rows == len(frozen)
    row = loaded[0]
    assert row["image"].size == (96, 96)
    assert (row["question"], row["answer"]) == (frozen[0].question, frozen[0].answer)
    assert row["category"] in FORMS


def test_words_are_single_tokens_and_any_text_round_trips(processor: ProcessorMixin) -> None:
    tokenizer = processor.tokenizer
    for word in vocabulary():
        assert len(tokenizer.encode(f"a {word}" if word != "?" else "a?")) == 2, word
    for text in ("is there a red circle?", "top left", "any other text: zürich, 北京 & 42!"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_chat_template_takes_turns_and_images(processor: ProcessorMixin) -> None:
    image = {"type": "image"}
    chat = [
        {"role": "user", "content": [image, {"type": "text", "text": "is there a red circle?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
        {"role": "user", "content": [image, image, {"type": "text", "text": "how many circles are there?"}]},
    ]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert prompt == (
        "<s><|user|><image>is there a red circle?<|assistant|>yes</s>"
        "<|user|><image><image>how many circles are there?<|assistant|>"
    )
    images = [render(make_scene("val", 0, index)) for index in range(3)]
    inputs = processor(images=images, text=prompt, return_tensors="pt")
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 3 * 144
    assert inputs["pixel_values"].shape == (3, 3, 96, 96)


def test_published_weights_fit_in_twelve_megabytes() -> None:
    sizes = {path.name: path.stat().st_size for path in TINY_LLAVA.iterdir()}
    assert sizes["model.safetensors"] <= 12_000_000
    assert not [name for name in sizes if name.endswith((".bin", ".pt", ".pth", ".pkl", ".py"))]


def test_bundled_model_answers_and_stops(
    model: PreTrainedModel, processor: ProcessorMixin, frozen: list[EvalRow]
) -> None:
    from vtprune.evals.tiny_models.evaluate import answer

    rows = frozen[:40]
    answers = answer(model, processor, [row.open_image() for row in rows], [row.question for row in rows])
    right = sum(normalise(a) == row.answer for a, row in zip(answers, rows, strict=True))
    assert right >= 34


def test_bundled_model_reads_the_example(model: PreTrainedModel, processor: ProcessorMixin) -> None:
    message = {
        "role": "user",
        "content": [
            {"type": "image", "path": str(EXAMPLE_IMAGE)},
            {"type": "text", "text": "how many shapes are there?"},
        ],
    }
    inputs = processor.apply_chat_template(
        [message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        ids = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
    assert ids[-1] == model.generation_config.eos_token_id
    assert processor.decode(ids, skip_special_tokens=True) == "4"
