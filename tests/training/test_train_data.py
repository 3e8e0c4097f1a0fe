"""What training reads: drawn pictures and LLaVA's files, labels on the answers alone, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from transformers import AutoProcessor

import vtprune
from tests.checkpoint import random_qwen3_checkpoint, random_qwen_checkpoint
from tests.cli.test_cli import fails, run
from tests.clips import write_clip, write_frames
from tests.training.tiny_training import processor
from vtprune.errors import VTPruneError
from vtprune.loading.model import load_model
from vtprune.loading.videos import open_video
from vtprune.training import (
    Collator,
    Conversation,
    LlavaData,
    ShapesData,
)
from vtprune.training.data import Order, hold_out


def _write(folder: Path, rows: list[dict[str, Any]], *, lines: bool = False) -> Path:
    for number in range(3):
        pixels = np.full((20 + number, 30, 3), 40 * number, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    path = folder / "data.json"
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    return path


def _row(*images: str, turns: int = 1) -> dict[str, Any]:
    marks = "<image>\n" * len(images)
    asked: list[dict[str, str]] = []
    for turn in range(turns):
        asked.append({"from": "human", "value": f"{'' if turn else marks}is there a red circle?"})
        asked.append({"from": "gpt", "value": f"yes {turn}"})
    row = {"id": "a", "conversations": asked}
    return {**row, "image": images[0] if len(images) == 1 else list(images)} if images else row


def test_drawn_batches_are_those_of_the_processor_with_labels_on_answers_and_ends() -> None:
    of, data = processor(), ShapesData(questions=4)
    samples = [data[index] for index in range(3)]
    batch = Collator(of)(samples)
    for row, sample in enumerate(samples):
        text = of.apply_chat_template(list(sample.messages), tokenize=False)
        alone = of(text=text, images=sample.images[0], return_tensors="pt", add_special_tokens=False)
        length = alone["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][row, :length], alone["input_ids"][0])
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (batch["labels"].shape[1] - length)
        assert torch.equal(batch["pixel_values"][row], alone["pixel_values"][0])
        labels = batch["labels"][row]
        answers = [message["content"][0]["text"] for message in sample.messages[1::2]]
        learnt = of.decode(labels[labels >= 0]).split("</s>")
        assert [text.strip() for text in learnt] == [*answers, ""]
    assert not (batch["labels"] == of.image_token_id).any()


def test_a_drawn_sample_depends_on_split_seed_and_index_alone() -> None:
    def pixels(data: ShapesData, index: int) -> bytes:
        return data[index].images[0].tobytes()

    assert pixels(ShapesData(3), 5) == pixels(ShapesData(3), 5)
    others = [(ShapesData(3), 6), (ShapesData(4), 5), (ShapesData(3, "val"), 5)]
    assert len({pixels(*one) for one in [(ShapesData(3), 5), *others]}) == 4


def test_an_epoch_sees_every_sample_once_in_an_order_of_its_own() -> None:
    order = Order(7, seed=1)
    epochs = [[order[place] for place in range(start, start + 7)] for start in (0, 7)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(7))
    assert epochs[0] != epochs[1]
    assert Order(7, seed=1)[9] == epochs[1][2]
    assert Order(None, seed=1)[9] == 9


@pytest.mark.parametrize("lines", [False, True])
def test_llava_files_become_conversations(tmp_path: Path, lines: bool) -> None:
    data = LlavaData(_write(tmp_path, [_row("0.png", turns=2), _row("1.png", "2.png"), _row()], lines=lines))
    assert [len(data[index].images) for index in range(3)] == [1, 2, 0]
    batch = Collator(processor())([data[index] for index in range(3)])
    of = processor()
    assert (batch["input_ids"] == of.image_token_id).sum(1).tolist() == [144, 288, 0]
    assert batch["pixel_values"].shape[0] == 3
    texts = [of.decode(row[row >= 0]) for row in batch["labels"]]
    assert texts == ["yes 0</s> yes 1</s>", "yes 0</s>", "yes 0</s>"]
    kept, held = hold_out(data, 1, seed=0)
    assert sorted([*kept.indices, *held.indices]) == [0, 1, 2]
    with pytest.raises(VTPruneError, match="held out"):
        hold_out(data, 3, seed=0)


@pytest.mark.parametrize("lenient", [False, True])
def test_missing_and_broken_images_are_found_before_training(
    tmp_path: Path, lenient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What lmms-eval sets for the whole process.
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    path = _write(tmp_path, [_row("0.png"), _row("gone.png"), _row("1.png"), _row("2.png")])
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(VTPruneError, match=r"2 images .*gone.png \(not there\); 1.png .*--skip-missing"):
        LlavaData(path)
    told: list[str] = []
    data = LlavaData(path, skip_missing=True, tell=told.append)
    assert (data.size, data.skipped) == (2, 2)
    assert "2 records were left out, 2 are left" in told[0]
    with pytest.raises(VTPruneError, match="No record with an image or a video is left"):
        LlavaData(path, tmp_path / "elsewhere", skip_missing=True)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no record"),
        ([_row()], "has an image"),
        ([{**_row("0.png"), "conversations": []}], "record 0 .*turns"),
        (
            [_row("0.png"), {**_row("0.png"), "image": "0.png", "id": 7}, {**_row(), "image": "0.png"}],
            "record 2.*0 <im",
        ),
        ([{**_row("0.png"), "image": 3}], "path or a list"),
        ([{**_row("0.png"), "conversations": _row()["conversations"][::-1]}], "turn 0 should be"),
        (["x"], "record 0: a record is"),
    ],
)
def test_records_that_cannot_be_learnt_from_are_refused_by_number(tmp_path: Path, rows: Any, message: str) -> None:
    with pytest.raises(VTPruneError, match=message):
        LlavaData(_write(tmp_path, rows))


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    path = _write(tmp_path, [_row("0.png")])
    path.write_text(path.read_text()[:-5])
    with pytest.raises(VTPruneError, match="cut short"):
        LlavaData(path)
    with pytest.raises(VTPruneError, match="cannot read"):
        LlavaData(tmp_path / "absent.json")


class Shouting:
    """A processor whose template writes a turn differently once another one follows."""

    def __init__(self) -> None:
        self.real = processor()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def __call__(self, **options: Any) -> Any:
        return self.real(**options)

    def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> str:
        text: str = self.real.apply_chat_template(messages, **options)
        return text.replace("circle", "square") if len(messages) > 2 else text


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    def turn(role: str, text: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": text}]}

    messages = (turn("user", "circle?"), turn("assistant", "yes"), turn("user", "red?"), turn("assistant", "no"))
    with pytest.raises(VTPruneError, match="sample 3: the chat template"):
        Collator(Shouting())([Conversation((), messages, "sample 3")])


QWEN = (
    "{% for m in messages %}{% if loop.first %}<|im_start|>system\nyou are helpful.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{% for p in m['content'] %}{% if p['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ p['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAVA = (
    "{% for m in messages %}{{ 'USER: ' if m['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% for p in m['content'] if p['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def _qwen() -> Any:
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    tokenizer = processor().tokenizer
    marks = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks, "eos_token": "<|im_end|>"})
    images = Qwen2VLImageProcessor(min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 16)
    return Qwen2_5_VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(), chat_template=QWEN)


def _llava() -> Any:
    """A tokenizer that adds the first token itself, and a template that ends no answer."""
    from tokenizers.processors import TemplateProcessing

    of = processor()
    first = (of.tokenizer.bos_token, of.tokenizer.bos_token_id)
    of.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[first])
    of.chat_template = LLAVA
    return of


def _talk(*turns: str) -> tuple[dict[str, Any], ...]:
    """User and assistant in turn; "*" stands for an image, "+" for a video."""

    def part(word: str) -> dict[str, str]:
        kind = {"*": "image", "+": "video"}.get(word)
        return {"type": kind} if kind else {"type": "text", "text": word}

    return tuple(
        {"role": ("user", "assistant")[at % 2], "content": [part(word) for word in text.split("|")]}
        for at, text in enumerate(turns)
    )


@pytest.mark.parametrize(
    ("make", "learnt"),
    [
        (_qwen, ["no<|im_end|>yes yes<|im_end|>", "b<|im_end|>", "circle<|im_end|>"]),
        (_llava, ["no yes yes</s>", "b</s>", "circle</s>"]),
    ],
)
def test_other_families_templates_are_learnt_from_alike(make: Any, learnt: list[str]) -> None:
    of, picture = make(), Image.new("RGB", (60, 90))
    conversations = [
        Conversation((picture, picture), _talk("*|red?", "no", "*|and blue?", "yes yes")),
        Conversation((), _talk("a?", "b")),
        Conversation((picture,), _talk("*|what?", "circle")),
    ]
    batch = Collator(of)(conversations)
    for row, text in zip(batch["labels"], learnt, strict=True):
        assert of.decode(row[row >= 0]).replace(" ", "") == text.replace(" ", "")
    begins = batch["input_ids"][:, 0] == of.tokenizer.bos_token_id
    assert begins.all() or make is _qwen


@pytest.mark.parametrize("checkpoint", [random_qwen_checkpoint, lambda: random_qwen3_checkpoint(experts=False)])
def test_placeholders_of_videos_and_the_times_beside_them_are_not_learnt(tmp_path: Path, checkpoint: Any) -> None:
    of = AutoProcessor.from_pretrained(checkpoint())
    video = open_video(write_clip(tmp_path / "clip.mp4", 30, 10, (96, 64)), 6)
    other = open_video(write_frames(tmp_path / "frames", 3, (64, 96)))
    picture = Image.new("RGB", (60, 90))
    conversations = [
        Conversation((), _talk("+|red?", "no", "+|and blue?", "yes yes"), "a", (video, other)),
        Conversation((picture,), _talk("*|a?", "b", "+|c?", "d"), "b", (other,)),
        Conversation((), _talk("a?", "b"), "c"),
    ]
    batch = Collator(of)(conversations)
    learnt = ["no<|im_end|>yes yes<|im_end|>", "b<|im_end|>d<|im_end|>", "b<|im_end|>"]
    assert [of.decode(row[row >= 0]) for row in batch["labels"]] == learnt
    assert batch["video_grid_thw"][:, 0].tolist() == [3, 2, 2]
    placeholders = batch["input_ids"] == of.video_token_id
    assert torch.equal(batch["mm_token_type_ids"] == 2, placeholders)
    assert int(placeholders.sum()) == int(batch["video_grid_thw"].prod(dim=1).sum()) // 4
    with pytest.raises(VTPruneError, match="llava takes images; a video needs a model of the Qwen-VL families"):
        Collator(processor())(conversations[:1])


def _clips(folder: Path) -> Path:
    write_clip(folder / "clip.mp4", 30, 10, (96, 64))
    write_frames(folder / "frames", 3, (64, 96))
    return folder


@pytest.mark.parametrize("mark", ["<video>", "<image>"])
def test_records_show_videos_by_either_mark(tmp_path: Path, mark: str) -> None:
    row = {**_row(turns=2), "video": "clip.mp4"}
    row["conversations"][0]["value"] = f"{mark}\nwhat moves?"
    both = {**_row("0.png"), "video": ["frames"]}
    both["conversations"][0]["value"] = "<image>\n<video>\nis it in it?"
    word = _row("1.png")
    word["conversations"][0]["value"] += " <video> is a word"
    data = LlavaData(_write(_clips(tmp_path), [row, both, word]), frames=4)
    first, second, third = (data[index] for index in range(3))
    assert [len(one.videos) for one in (first, second, third)] == [1, 1, 0]
    assert (len(first.videos[0].frames), len(second.images)) == (4, 1)
    kinds = [[part["type"] for part in one.messages[0]["content"]] for one in (first, second, third)]
    assert kinds == [["video", "text"], ["image", "video", "text"], ["image", "text"]]
    assert data.videos
    assert hold_out(data, 1, seed=0)[0].videos
    assert data.identity()["frames"] == 4
    assert not LlavaData(_write(tmp_path, [word])).videos


def test_missing_and_broken_videos_are_found_before_training(tmp_path: Path) -> None:
    row = {**_row(turns=1), "video": "clip.mp4"}
    row["conversations"][0]["value"] = "<video>\nwhat moves?"
    path = _write(_clips(tmp_path), [row, {**row, "video": "gone.mp4"}, {**row, "video": "frames"}])
    with pytest.raises(VTPruneError, match=r"1 files are missing or broken .*gone.mp4 \(not there\)"):
        LlavaData(path)
    content = (tmp_path / "clip.mp4").read_bytes()
    (tmp_path / "clip.mp4").write_bytes(content[: len(content) // 2])
    data = LlavaData(path, skip_missing=True)
    assert (data.size, data.skipped) == (1, 2)
    for change, message in (
        ({"video": 3}, "video is a path or a list"),
        ({"video": ["frames", "frames"]}, "1 <video> in its text, but 2 videos"),
        ({"image": "0.png"}, "0 <image> in its text, but 1 images"),
    ):
        with pytest.raises(VTPruneError, match=message):
            LlavaData(_write(tmp_path, [{**row, **change}]))


def test_the_command_trains_on_videos_where_the_model_takes_them(tmp_path: Path) -> None:
    row = {**_row(turns=2), "video": "clip.mp4"}
    row["conversations"][0]["value"] = "<video>\nwhat moves?"
    path, folder = _write(_clips(tmp_path), [row, {**row, "video": "frames"}, _row("0.png")]), tmp_path / "out"
    options = ["--data", path, "--frames", "2", "--steps", "1", "--batch-size", "3", "--train", "routers"]
    result = run("train", "pmod", "--model", random_qwen_checkpoint(), "--output", folder, *options)
    assert result.exit_code == 0, result.output
    assert json.loads((folder / "training.json").read_text())["settings"]["frames"] == 2
    with vtprune.wrapped(load_model(random_qwen_checkpoint())[0], folder) as model:
        assert vtprune.is_wrapped(model)
    result = run("train", "pmod", "--output", tmp_path / "other", *options)
    fails(result, 2, "data: llava takes images; a video needs a model of the Qwen-VL families")
    fails(run("train", "pmod", "--output", folder, "--frames", "2"), 2, "--frames go with --data")


def test_an_end_token_that_the_template_leaves_out_is_learnt_all_the_same() -> None:
    of = processor()
    of.chat_template = of.chat_template.replace("{{ eos_token }}", "")
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("user", "red?"), ("assistant", "no"), ("user", "blue?"), ("assistant", "yes"))
    ]
    labels = Collator(of)([Conversation((), tuple(messages))])["labels"][0]
    assert of.decode(labels[labels >= 0]).split() == ["no", "yes</s>"]


def test_a_picture_that_the_first_draw_has_no_question_for_gets_one() -> None:
    conversation = ShapesData(questions=6)[6644]
    assert len(conversation.messages) >= 2
    assert conversation.messages[0]["content"][0] == {"type": "image"}
