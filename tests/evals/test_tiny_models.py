"""The training of the bundled models: the Qwen is shown and asked what its processor and it make of a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from transformers import AutoModelForImageTextToText

from vtprune.errors import VTPruneError
from vtprune.evals.tiny_models.evaluate import answer
from vtprune.evals.tiny_models.labels import vision_targets
from vtprune.evals.tiny_models.llava import architecture as llava_architecture
from vtprune.evals.tiny_models.llava import loop as llava_loop
from vtprune.evals.tiny_models.qwen.architecture import build_model, build_processor
from vtprune.evals.tiny_models.qwen.lessons import (
    KINDS,
    OTHER_SIZES,
    Layout,
    draw_layout,
    draw_lesson,
    lesson_rng,
    prefix_of,
    write_rows,
)
from vtprune.evals.tiny_models.qwen.loop import Trainer, stages
from vtprune.evals.tiny_models.qwen.seeing import TokenHeads, look, patches_of
from vtprune.evals.tiny_models.tokens import Encoder
from vtprune.shapes.clips import FPS
from vtprune.shapes.more import build_more_rows
from vtprune.shapes.render import render
from vtprune.shapes.scene import Scene, make_scene, sample_scene

LAYOUTS = [Layout("usual", 96, 96), Layout("sized", 128, 64), Layout("pair", 64, 96), Layout("clip", 64, 64)]


@pytest.fixture(scope="module")
def tiny() -> Any:
    """The processor, and the model before training, whose planes say something."""
    processor = build_processor()
    model = build_model(processor.tokenizer, seed=0).eval()
    with torch.no_grad():
        for merger in model.model.visual.deepstack_merger_list:
            torch.nn.init.normal_(merger.linear_fc2.weight, std=0.05)
    return processor, model


def picture(scene: Scene) -> Image.Image:
    return Image.fromarray(render(scene))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.kind)
def test_rows_are_what_the_processor_and_the_model_make(layout: Layout, tiny: Any) -> None:
    """Logits of the answers of a packed row equal those of each question in a prompt of its own."""
    processor, model = tiny
    encoder = Encoder(processor.tokenizer)
    lesson = draw_lesson("val", 0, 0, layout=layout, rows=1)
    prefix = prefix_of(model, encoder, layout)
    rows = write_rows(encoder, prefix, lesson.questions, [False])
    trainer = Trainer.__new__(Trainer)
    trainer.model, trainer.encoder, trainer.prefixes = model, encoder, {}
    with torch.no_grad():
        logits, _ = trainer._answers(lesson, look(model.model.visual, *patches_of(lesson.frames)))
    labelled = rows.turns[rows.labels >= 0]
    for turn, qa in enumerate(rows.asked[0][:4]):
        inputs = _inputs(processor, layout, lesson.frames, qa.question)
        answer = torch.tensor([*encoder.text(qa.answer)])
        ids = torch.cat([inputs.pop("input_ids"), answer[None]], dim=1)
        kinds = torch.cat([inputs.pop("mm_token_type_ids"), torch.zeros(1, len(answer), dtype=torch.int)], dim=1)
        inputs.pop("attention_mask")
        with torch.no_grad():
            alone = model(input_ids=ids, mm_token_type_ids=kinds, **inputs).logits[0, -len(answer) - 1 :]
        torch.testing.assert_close(logits[labelled == turn], alone, atol=2e-4, rtol=1e-4)


def _inputs(processor: Any, layout: Layout, frames: torch.Tensor, question: str) -> dict[str, Any]:
    pixels = ((frames[: layout.shown] * 0.25 + 0.5) * 255).round().byte()
    if layout.kind == "clip":
        shown = [{"type": "video"}]
        media: dict[str, Any] = {
            "videos": [pixels.flatten(0, 1)],
            "video_metadata": [
                {"fps": FPS, "total_num_frames": pixels.shape[0] * 2, "frames_indices": list(range(6))}
            ],
            "do_sample_frames": False,
        }
    else:
        shown = [{"type": "image"}] * layout.shown
        media = {"images": [Image.fromarray(one[0].permute(1, 2, 0).numpy()) for one in pixels]}
    content = [*shown, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return dict(processor(text=[text], return_tensors="pt", **media))


@pytest.mark.parametrize("size", [(96, 96), (128, 64), (64, 128)])
def test_the_batched_tower_is_the_models(size: tuple[int, int], tiny: Any) -> None:
    processor, model = tiny
    scene = sample_scene(np.random.default_rng(3), *size)
    made = processor.image_processor(images=[picture(scene)], return_tensors="pt")
    lesson = draw_lesson("val", 0, 0, layout=Layout("sized", *size), rows=2)
    flat, grid = patches_of(lesson.frames)
    assert made["image_grid_thw"].tolist() == [[1, *grid]]
    with torch.no_grad():
        found = look(model.model.visual, flat, grid)
        wanted = model.model.get_image_features(flat.flatten(0, 1), torch.tensor([[1, *grid]] * 2))
    for row in range(2):
        torch.testing.assert_close(found.tokens[row], wanted.pooler_output[row], atol=1e-5, rtol=1e-5)
        for plane, values in zip(found.planes, wanted.deepstack_features, strict=True):
            torch.testing.assert_close(plane[row], values[row], atol=1e-5, rtol=1e-5)


def test_labels_of_other_sizes_stand_where_things_stand() -> None:
    scene = sample_scene(np.random.default_rng(5), 128, 64)
    targets = vision_targets([scene])
    assert targets.shape.shape == (1, 8 * 16)
    for thing in scene.things:
        assert targets.centre[0].view(8, 16)[thing.y // 8, thing.x // 8] == 1
    usual = vision_targets([make_scene("train", 0, 1)])
    assert usual.place.abs().max() <= 1


def test_all_kinds_of_batches_are_drawn_and_the_same_ones_again() -> None:
    layouts = [draw_layout(lesson_rng("train", 0, step)) for step in range(200)]
    assert {layout.kind for layout in layouts} == set(KINDS)
    assert {(one.width, one.height) for one in layouts if one.kind == "sized"} == set(OTHER_SIZES)
    for layout in LAYOUTS:
        one, other = (draw_lesson("train", 0, 7, layout=layout, rows=2) for _ in range(2))
        assert torch.equal(one.frames, other.frames)
        assert one.questions == other.questions
        assert all(one.questions)


def test_the_evaluation_is_not_among_the_lessons() -> None:
    asked = {text for part in ("forms", "descriptions") for row in build_more_rows(part) for text in row.scenes}
    lessons = [draw_lesson("train", 0, step, layout=LAYOUTS[0], rows=8) for step in range(40)]
    trained = {scene.to_json() for lesson in lessons for scene in lesson.scenes}
    assert not asked & trained


@pytest.mark.slow
def test_a_training_goes_on_where_it_stopped_and_leaves_a_model(tmp_path: Path) -> None:
    console = Console(quiet=True)

    def train(output: Path, until: int | None) -> list[float]:
        trainer, losses = Trainer(output, build_processor(), stages((2, 3)), seed=1, console=console), []
        for _, _, loss in trainer.run(1, 100):
            losses.append(loss)
            if len(losses) == until:
                break
        return losses

    whole = train(tmp_path / "whole", None)
    first = train(tmp_path / "parts", 4)
    # Its last step ended before it was saved.
    second = train(tmp_path / "parts", None)
    assert [*first[:3], *second] == pytest.approx(whole, rel=1e-5)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "parts")
    assert model.config.model_type == "qwen3_vl"
    with pytest.raises(VTPruneError, match="another"):
        Trainer(tmp_path / "whole", build_processor(), stages((2, 9)), seed=1, console=console)


def test_read_outs_learn_nothing_of_their_own() -> None:
    heads = TokenHeads()
    targets = vision_targets([make_scene("train", 0, 3)])
    tokens = torch.randn(1, 144, 128, requires_grad=True)
    heads(tokens, targets).backward()
    assert tokens.grad is not None
    assert tokens.grad.any()
    assert set(heads.accuracy(tokens, targets)) == {"shape", "color", "glyph"}


@pytest.mark.slow
def test_the_llavas_four_stages_leave_a_model_that_answers(tmp_path: Path) -> None:
    processor = llava_architecture.build_processor()
    trainer = llava_loop.Trainer(
        tmp_path / "llava", processor, llava_loop.stages((1, 1, 1, 1)), device="cpu", seed=0, compiled=False,
        console=Console(quiet=True),
    )  # fmt: skip
    assert [stage.name for stage, _, _ in trainer.run(10, 10)] == ["vision", "focus", "language", "joint"]
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "llava")
    assert model.config.model_type == "llava"
    assert len(answer(model, processor, [picture(make_scene("val", 0, 1))], ["is there a red circle?"])) == 1
