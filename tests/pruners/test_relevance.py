"""Relevance to the question: what of a prompt is the question, and CLIPs beside the model."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
)

import vtprune
from tests.streams import stream
from vtprune.assets import EXAMPLE_IMAGE, TINY_LLAVA
from vtprune.errors import VTPruneError
from vtprune.pruners import CDPruner
from vtprune.pruners.cdpruner.clip_loading import find_clip
from vtprune.pruners.cdpruner.dpp import mean_cosine
from vtprune.pruners.cdpruner.question import question_of, question_text

WORDS = ["<pad>", "<s>", "</s>", "<image>", "user", ":", "assistant", "what", "is", "the", "circle", "?", "red", "sys"]
TEMPLATE = (
    "{% for m in messages %}user : {% for p in m['content'] %}"
    "{{ '<image> ' if p['type'] == 'image' else p['text'] }}{% endfor %}{% endfor %} assistant :"
)


# The question


def save_tokenizer(folder: Path, *, template: str | None = None, length: int = 77) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words in a folder, with start and end added, its image placeholder not special."""
    inner = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=length
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


def ids(text: str) -> Tensor:
    """Ids of words."""
    return torch.tensor([WORDS.index(word) for word in text.split()])


def words(row: Tensor, source: Path) -> tuple[str, str]:
    """The question's words and what they are said to be."""
    question = question_of(row, row.numel(), str(source))
    return " ".join(WORDS[one] for one in row[question.places].tolist()), question.kind


def test_the_chat_template_is_not_part_of_the_question(tmp_path):
    save_tokenizer(tmp_path, template=TEMPLATE)
    (tmp_path / "config.json").write_text(json.dumps({"image_token_index": WORDS.index("<image>")}))
    for row in ("<s> user : what is red ? assistant :", "user : what is red ? assistant : </s>"):
        assert words(ids(row), tmp_path) == ("what is red ?", "question tokens")
    # A question may begin or end as the template does; without the part that waits for an answer, too.
    assert words(ids("user : assistant is red assistant :"), tmp_path)[0] == "assistant is red"
    assert words(ids("user : is the assistant assistant :"), tmp_path)[0] == "is the assistant"
    assert words(ids("user : what is red ?"), tmp_path)[0] == "what is red ?"
    # Another system prompt is kept: nothing says where it ends.
    assert words(ids("sys user : what ? assistant :"), tmp_path)[0] == "sys user : what ?"


def test_a_prompt_without_a_question_is_used_whole(tmp_path):
    save_tokenizer(tmp_path, template=TEMPLATE)
    (tmp_path / "config.json").write_text(json.dumps({"image_token_id": WORDS.index("<image>")}))
    assert words(ids("user : assistant :"), tmp_path) == (
        "user : assistant :", "text tokens (the chat template leaves no question)",
    )  # fmt: skip


def test_without_a_template_only_special_tokens_go(tmp_path):
    save_tokenizer(tmp_path)
    found, kind = words(ids("<s> user : what ? </s>"), tmp_path)
    assert found == "user : what ?"
    assert "no chat template" in kind


def test_a_processors_template_will_do(tmp_path):
    save_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"image_token_index": WORDS.index("<image>")}))
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    assert words(ids("<s> user : what ? assistant :"), tmp_path) == ("what ?", "question tokens")


def test_a_template_that_takes_only_strings_will_do(tmp_path):
    save_tokenizer(tmp_path, template="user : {{ messages[0]['content'].strip() }} assistant :")
    assert words(ids("<s> user : what ? assistant :"), tmp_path) == ("what ?", "question tokens")


def test_without_ids_or_a_tokenizer_everything_counts(tmp_path):
    assert question_of(None, 3, str(TINY_LLAVA)).places.tolist() == [0, 1, 2]
    question = question_of(ids("<s> what"), 2, str(tmp_path))
    assert question.note == "2 text tokens (no tokenizer is known)"
    assert question_text(ids("<s> what"), question, str(tmp_path)) is None
    assert "no text" in CDPruner().select(replace(stream(), text=torch.zeros(0, 5))).note


def bundled_inputs(question: str = "What color is the circle?") -> tuple[Any, Any]:
    """The bundled LLaVA, and a prompt with the example image."""
    processor = AutoProcessor.from_pretrained(TINY_LLAVA)
    content = [{"type": "image", "image": Image.open(EXAMPLE_IMAGE)}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    return AutoModelForImageTextToText.from_pretrained(TINY_LLAVA), inputs


def notes(model: Any, inputs: Any) -> str:
    """What the report says of the image after a forward."""
    with torch.no_grad():
        model(**inputs)
    return str(vtprune.report(model).to_dict())


def test_the_report_says_where_relevance_came_from():
    model, inputs = bundled_inputs()
    with vtprune.wrapped(model, "cdpruner", keep=20):
        assert "relevance from the decoder's embeddings of 6 question tokens" in notes(model, inputs)


# CLIPs


def tiny_clip(folder: Path, length: int = 12) -> CLIPModel:
    """A random CLIP of 32 pixels and 4x4 patches, saved with its tokenizer."""
    save_tokenizer(folder, length=length)
    side = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={
            **side, "vocab_size": len(WORDS), "max_position_embeddings": length, "eos_token_id": 2,
            "bos_token_id": 1, "pad_token_id": 0,
        },
        vision_config={**side, "image_size": 32, "patch_size": 8},
        projection_dim=10,
    )  # fmt: skip
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    model.save_pretrained(folder)
    return model


def tiny_open_clip(folder: Path) -> Any:
    """A random open_clip CLIP of 32 pixels and 4x4 patches, saved as open_clip saves it."""
    import open_clip

    vision = {"image_size": 32, "layers": 3, "width": 32, "patch_size": 8, "head_width": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    torch.manual_seed(0)
    model = open_clip.model.CLIP(10, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text)).eval()
    config = {"embed_dim": 10, "vision_cfg": vision, "text_cfg": text}
    statistics = {"mean": [0.5] * 3, "std": [0.25] * 3}
    folder.joinpath("open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": statistics})
    )
    weights = {name: weight.contiguous() for name, weight in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    return model


@pytest.fixture
def no_network(monkeypatch):
    """Whoever opens a connection fails the test."""

    def refuse(*args: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@torch.no_grad()
def test_patches_and_texts_are_the_clips_own(tmp_path, no_network):
    model = tiny_clip(tmp_path)
    clip = find_clip(str(tmp_path))
    picture = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in clip.statistics)
    hidden = model.vision_model((picture - mean) / std, output_hidden_states=True).hidden_states[-2]
    expected = model.visual_projection(model.vision_model.post_layernorm(hidden[:, 1:]))
    assert torch.allclose(clip.patches(picture), expected, atol=1e-5)
    text = torch.tensor([[1, *ids("what is red").tolist(), 2]])
    expected = model.text_projection(model.text_model(input_ids=text).last_hidden_state[:, -1])
    assert torch.allclose(clip.texts("what is red"), expected, atol=1e-5)
    assert clip.cells == (4, 4)
    assert clip.flops(5) < clip.flops(13)


@torch.no_grad()
def test_long_questions_are_cut_into_segments(tmp_path):
    model = tiny_clip(tmp_path, length=5)
    texts = find_clip(str(tmp_path)).texts("what is the red circle ?")  # 8 ids with start and end
    assert texts.shape == (2, 10)
    first, second = (
        torch.tensor([1, *ids("what is the red").tolist()]),
        torch.tensor([*ids("circle ?").tolist(), 2, 0, 0]),
    )
    hidden = model.text_model(input_ids=torch.stack([first, second])).last_hidden_state
    pooled = torch.stack([hidden[0, first.argmax()], hidden[1, 2]])
    assert torch.allclose(texts, model.text_projection(pooled), atol=1e-5)


def test_a_clip_in_a_folder_decides_and_is_kept_off_the_model(tmp_path, no_network):
    tiny_clip(tmp_path)
    model, inputs = bundled_inputs()
    before = set(model.state_dict())
    pruner = CDPruner(keep=20, clip=str(tmp_path))
    with vtprune.wrapped(model, pruner):
        assert "relevance from CLIP, 6 question tokens in 1 segment" in notes(model, inputs)
        assert set(model.state_dict()) == before
        kept = vtprune.report(model).samples[0].images[0].kept
        assert vtprune.report(model).flops_breakdown.scoring > find_clip(str(tmp_path)).flops(6)
        vtprune.save_config(model, tmp_path / "config")
    assert vtprune.load_config(tmp_path / "config") == pruner
    with vtprune.wrapped(model, replace(pruner, negate=False)):
        notes(model, inputs)
        assert vtprune.report(model).samples[0].images[0].kept != kept
    with vtprune.wrapped(model, replace(pruner, negate=True)):
        notes(model, inputs)
        assert vtprune.report(model).samples[0].images[0].kept == kept


def test_relevance_is_resampled_to_the_tokens(tmp_path):
    tiny_clip(tmp_path)
    picture = torch.rand(1, 3, 48, 48)
    question = torch.tensor([WORDS.index("red")])
    save_tokenizer(tmp_path / "model")
    parts = {"picture": picture, "text_ids": question, "text": torch.zeros(1, 5), "source": str(tmp_path / "model")}
    pruner = CDPruner(clip=str(tmp_path))
    same, _ = pruner.text_relevance(replace(stream((1, 4, 4)), **parts))
    clip = find_clip(str(tmp_path))
    assert torch.allclose(same, mean_cosine(clip.patches(picture), clip.texts("red"))[0])
    finer, _ = pruner.text_relevance(replace(stream((1, 8, 8)), **parts))
    corners = finer.view(8, 8)[::7, ::7].flatten()  # of a finer grid they are those of the coarser one
    assert torch.allclose(corners, same.view(4, 4)[::3, ::3].flatten(), atol=1e-6)
    assert finer.min() >= same.min() - 1e-6
    assert finer.max() <= same.max() + 1e-6
    part = replace(stream((1, 8, 8)), **parts)
    left = torch.arange(5, 30)
    cut, _ = pruner.text_relevance(replace(part, features=part.features[left], indices=left))
    assert torch.equal(cut, finer[left])


def test_a_clip_in_memory_works_but_cannot_be_saved(tmp_path):
    tiny_clip(tmp_path)
    clip = CLIPModel.from_pretrained(tmp_path)
    model, inputs = bundled_inputs()
    with vtprune.wrapped(model, CDPruner(keep=20, clip=clip)):
        assert "relevance from CLIP" in notes(model, inputs)
        kept = vtprune.report(model).samples[0].images[0].kept
        with pytest.raises(VTPruneError, match="in memory cannot be written"):
            vtprune.save_config(model, tmp_path / "config")
    with vtprune.wrapped(model, CDPruner(keep=20, clip=str(tmp_path))):
        notes(model, inputs)
        assert vtprune.report(model).samples[0].images[0].kept == kept


@torch.no_grad()
def test_open_clip_from_a_folder_and_in_memory(tmp_path, no_network):
    model = tiny_open_clip(tmp_path)
    clip, around = find_clip(str(tmp_path)), find_clip(model)
    assert clip.statistics == ([0.5] * 3, [0.25] * 3)
    assert torch.equal(clip.texts("a red circle"), around.texts("a red circle"))
    assert clip.texts("red " * 100).shape == (2, 10)
    seen: list[Tensor] = []
    handle = model.visual.transformer.resblocks[-2].register_forward_hook(lambda *call: seen.append(call[-1]))
    picture = torch.rand(1, 3, 32, 32)
    model.encode_image((picture - 0.5) / 0.25)
    handle.remove()
    expected = model.visual.ln_post(seen[0][:, 1:]) @ model.visual.proj
    assert torch.allclose(clip.patches(picture), expected, atol=1e-5)
    llava, inputs = bundled_inputs()
    with vtprune.wrapped(llava, "cdpruner", keep=20, clip=str(tmp_path)):
        assert "relevance from CLIP" in notes(llava, inputs)


@pytest.mark.parametrize("name", ["openai/clip-vit-large-patch14-336", "hf-hub:laion/some-clip", "/no/such/folder"])
def test_a_clip_that_is_not_here_is_one_clear_error(name, no_network):
    model, _ = bundled_inputs()
    with pytest.raises(VTPruneError, match=r"no CLIP at .* nothing is downloaded here.*hf download") as raised:
        vtprune.wrap(model, "cdpruner", clip=name)
    assert "\n" not in str(raised.value)


def test_folders_that_hold_something_else_are_refused(tmp_path):
    with pytest.raises(VTPruneError, match="a model of type 'llava'"):
        find_clip(str(TINY_LLAVA))
    clip = tiny_clip(tmp_path / "whole")
    part = {name: weight for name, weight in clip.state_dict().items() if "visual_projection" not in name}
    clip.save_pretrained(tmp_path / "part", state_dict=part)
    with pytest.raises(VTPruneError, match=r"not a whole CLIP: visual_projection.weight is missing"):
        find_clip(str(tmp_path / "part"))
    clip.save_pretrained(tmp_path / "mute")
    with pytest.raises(VTPruneError, match="no tokenizer beside it"):
        find_clip(str(tmp_path / "mute"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "open_clip_config.json").write_text("{")
    with pytest.raises(VTPruneError, match=r"open_clip_config\.json is not the config of a CLIP"):
        find_clip(str(tmp_path / "empty"))
    with pytest.raises(VTPruneError, match="got a Linear"):
        find_clip(torch.nn.Linear(1, 1))
    with pytest.raises(VTPruneError, match="no tokenizer beside it"):
        find_clip(CLIPModel(clip.config))


def test_a_clip_needs_the_models_tokenizer_and_ids(tmp_path):
    tiny_clip(tmp_path)
    pruner = CDPruner(clip=str(tmp_path))
    with pytest.raises(VTPruneError, match="with the model's tokenizer, which is not on this machine"):
        pruner.select(stream())
    row = replace(stream(), source=str(TINY_LLAVA), picture=torch.rand(1, 3, 8, 8), text_ids=torch.tensor([1, 90_000]))
    with pytest.raises(VTPruneError, match="does not know all ids"):
        pruner.select(row)
    assert "no tokenizer is known" in CDPruner().select(row).note
    with pytest.raises(VTPruneError, match="as input_ids"):
        pruner.select(replace(stream(), source=str(TINY_LLAVA)))


@pytest.mark.parametrize("kind", ["transformers", "open_clip"])
def test_a_clip_whose_weights_are_pickled_is_refused(kind, tmp_path, no_network):
    (tiny_clip if kind == "transformers" else tiny_open_clip)(tmp_path)
    (weights,) = tmp_path.glob("*.safetensors")
    name = "pytorch_model.bin" if kind == "transformers" else "open_clip_pytorch_model.bin"
    torch.save(load_file(weights), tmp_path / name)
    weights.unlink()
    with pytest.raises(VTPruneError, match="safetensors"):
        find_clip(str(tmp_path))
