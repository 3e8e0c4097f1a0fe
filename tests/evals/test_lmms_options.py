"""Options that reach the lmms-eval model are carried out, or refused by name before anything is answered."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

import vtprune
from tests.checkpoint import png, random_checkpoint, write_task
from vtprune.assets import TRAINED
from vtprune.errors import InputError, SampleError
from vtprune.evals.lmms.gen_kwargs import read_generation
from vtprune.evals.lmms.model import VTPrune
from vtprune.loading.prompts import encode, question

TASK = "vtprune_options"


@pytest.fixture
def manager(tmp_path: Path) -> TaskManager:
    write_task(tmp_path, TASK, [png(96, 96)], max_new_tokens=6)
    return TaskManager("ERROR", include_path=str(tmp_path), include_defaults=False)


def run(model: Any, manager: TaskManager, **options: Any) -> dict[str, Any]:
    return simple_evaluate(
        model=model, tasks=[TASK], task_manager=manager, bootstrap_iters=0, log_samples=True, **options
    )


def made(arguments: str, **flags: Any) -> VTPrune:
    """As lmms-eval makes the model, its own default for the batch size among the flags."""
    return VTPrune.create_from_arg_string(arguments, {"batch_size": 1, "device": None, **flags})


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `generate` was asked for by a model that `spied` returns."""
    return []


def spied(calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> VTPrune:
    lm = VTPrune(random_checkpoint())
    lm._warm = True
    generate = lm.model.generate

    def noted(**inputs: Any) -> Any:
        calls.append(inputs)
        return generate(**inputs)

    monkeypatch.setattr(lm.model, "generate", noted)
    return lm


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ({}, {"do_sample": False, "num_beams": 1, "max_new_tokens": 128, "temperature": None}),
        ({"temperature": 0, "do_sample": False, "top_p": 1.0, "num_beams": 1}, {"do_sample": False, "num_beams": 1}),
        ({"temperature": 0.7}, {"do_sample": True, "temperature": 0.7}),
        ({"do_sample": True, "top_p": 0.9, "top_k": 5}, {"do_sample": True, "top_p": 0.9, "top_k": 5}),
        ({"num_beams": 3, "length_penalty": 0.5}, {"num_beams": 3, "length_penalty": 0.5, "do_sample": False}),
        ({"max_new_tokens": 7, "repetition_penalty": 1.2}, {"max_new_tokens": 7, "repetition_penalty": 1.2}),
        ({"image_aspect_ratio": "original", "until": None}, {"do_sample": False}),
    ],
)  # fmt: skip
def test_generation_options_reach_generate(given: dict[str, Any], asked: dict[str, Any]) -> None:
    arguments = read_generation(given, 128).arguments
    assert {name: arguments[name] for name in asked} == asked
    assert "image_aspect_ratio" not in arguments


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is a whole number of at least 1, got 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens"),
        ({"num_beams": 0}, "num_beams is a whole number of at least 1"),
        ({"temperature": -1}, "temperature is a number of at least 0"),
        ({"do_sample": "yes"}, "do_sample is True or False"),
        ({"top_p": 1.5}, r"top_p is a number in \[0, 1\]"),
        ({"do_sample": False, "temperature": 0.7}, "temperature=0.7 would do nothing"),
        ({"top_p": 0.5}, "top_p=0.5 would do nothing"),
        ({"do_sample": True, "temperature": 0}, "exclude each other"),
        ({"length_penalty": 2}, "length_penalty is for beams"),
        ({"num_return_sequences": 2}, "does not take num_return_sequences; it takes do_sample"),
        ({"image_aspect_ratio": "pad"}, "image_aspect_ratio='pad' is not carried out"),
        ({"until": 3}, "until is a text or a list of texts"),
    ],
)
def test_generation_options_that_would_be_dropped_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_generation(given, 128)


def test_sampling_beams_and_repeats_are_carried_out(
    manager: TaskManager, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = spied(calls, monkeypatch)
    result = run(lm, manager, gen_kwargs="do_sample=True,temperature=5.0", repeats=4)
    assert [(call["do_sample"], call["temperature"]) for call in calls] == [(True, 5.0)] * 4
    (sample,) = result["samples"][TASK]
    assert len(set(sample["resps"][0])) > 1
    calls.clear()
    greedy = run(lm, manager, repeats=2)
    assert len(set(greedy["samples"][TASK][0]["resps"][0])) == 1
    calls.clear()
    run(lm, manager, gen_kwargs="num_beams=3")
    assert [call["num_beams"] for call in calls] == [3]


def test_options_are_refused_before_anything_is_answered(
    manager: TaskManager, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = spied(calls, monkeypatch)
    for options, message in (
        ({"gen_kwargs": "max_new_tokens=0"}, "max_new_tokens"),
        ({"gen_kwargs": "visual_cot=True"}, "does not take visual_cot"),
        ({"apply_chat_template": True}, "apply_chat_template: leave it out"),
        ({"system_instruction": "see <image>"}, "system_instruction: its text holds '<image>'"),
    ):
        with pytest.raises(InputError, match=message):
            run(lm, manager, **options)
    assert not calls


def test_a_system_instruction_reaches_the_model(
    manager: TaskManager, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = spied(calls, monkeypatch)
    run(lm, manager, system_instruction="how many shapes")
    run(lm, manager)
    document = manager.load_task_or_group([TASK], "chat")[TASK].eval_docs[0]
    asked = question(document["image"], document["question"])
    system = {"role": "system", "content": [{"type": "text", "text": "how many shapes"}]}
    for call, chat in zip(calls, ([system, *asked], asked), strict=True):
        assert torch.equal(call["input_ids"], encode(lm.processor, [chat])["input_ids"])


def test_a_template_without_a_place_for_a_system_instruction_is_named(manager: TaskManager) -> None:
    lm = VTPrune(random_checkpoint())
    lm.processor.chat_template = (
        "{% for message in messages %}{% if message['role'] != 'system' %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
        "{% endfor %}"
    )
    with pytest.raises(InputError, match=r"system_instruction: .* no place for a system message"):
        run(lm, manager, system_instruction="Be brief.")


@pytest.mark.parametrize(
    ("arguments", "flags", "message"),
    [
        ("", {"batch_size": "auto"}, "batch_size: a whole number of rows.*'auto'"),
        ("", {"batch_size": "lots"}, "batch_size: .*'lots'"),
        ("batch_size=0", {}, "batch_size: .*'0'"),
        ("batch_size=2", {"batch_size": "4"}, "batch_size: --batch_size says 4 and --model_args 2"),
        ("device=cpu", {"device": "cuda"}, "device: --device says cuda and --model_args cpu"),
        ("", {"max_batch_size": 8}, "max_batch_size"),
        ("max_new_tokens=0", {}, "max_new_tokens"),
        ("keep=16", {}, "keep=16: no method is given"),
        ("keep=1", {}, "keep=1: no method is given"),
        ("method=none,keep=16", {}, "none prunes nothing"),
        ("method=grid,max_pixels=3", {}, "grid has no option max_pixels"),
        ("max_pixels=3", {}, "max_pixels=3: no method is given"),
        ("model=x,method=grid", {}, "model is handed in from Python alone"),
        ("method=grid,keep=2,keep=3", {}, "keep is given twice"),
        ("grid", {}, "cannot read 'grid'"),
        ("config=nowhere", {}, "nowhere is not a folder"),
    ],
)
def test_model_arguments_that_would_be_dropped_are_refused(
    arguments: str, flags: dict[str, Any], message: str
) -> None:
    with pytest.raises(vtprune.VTPruneError, match=message):
        made(f"pretrained={random_checkpoint()},{arguments}", **flags)


def test_a_model_that_is_handed_in_takes_no_method() -> None:
    lm = VTPrune(random_checkpoint())
    with pytest.raises(InputError, match="leave out method, keep"):
        VTPrune(model=lm.model, processor=lm.processor, method="grid", keep=4)


def test_layers_and_lists_are_set_in_model_args() -> None:
    lm = made(f"pretrained={random_checkpoint()},method=fastv,keep=0.5,layers=(2,),batch_size=3")
    assert lm.model._vtprune.given == [vtprune.FastV(keep=0.5, layers=(2,))]
    assert lm.batch_size == 3
    lm = made(f"pretrained={random_checkpoint()},method=visionzip:keep=64+fastv:keep=0.2,layers=[1]")
    assert lm.model._vtprune.given == [vtprune.VisionZip(keep=64), vtprune.FastV(keep=0.2, layers=(1,))]


def test_a_trained_folder_runs_as_it_was_trained(tmp_path: Path) -> None:
    folder = TRAINED[0]
    for arguments in (f"pretrained={folder}", f"method={folder}", f"pretrained={folder},method={folder}"):
        model = made(arguments).model
        assert [one.name for one in model._vtprune.given] == ["pmod"]
        assert any(weight.abs().max() > 0 for weight in model.vtprune_weights.parameters())
    assert [one.name for one in made(f"pretrained={folder},method=none").model._vtprune.given] == ["none"]
    with pytest.raises(InputError, match="brings its own method with all options"):
        made(f"pretrained={folder},keep=4")
    alone = tmp_path / "weights"
    alone.mkdir()
    for name in ("vtprune_config.json", "vtprune_weights.safetensors"):
        shutil.copy(folder / name, alone)
    with pytest.raises(vtprune.VTPruneError, match="trained on another base model"):
        made(f"method={alone}")


def test_a_question_that_holds_the_mark_of_a_picture_is_named_before_anything_is_answered(
    tmp_path: Path, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_task(tmp_path, TASK, [png(96, 96)] * 2)
    task = tmp_path / f"{TASK}.yaml"
    task.write_text(
        task.read_text().replace("!function vtprune.evals.lmms.shapes_task.doc_to_text", '"{{id}} <image>?"')
    )
    manager = TaskManager("ERROR", include_path=str(tmp_path), include_defaults=False)
    with pytest.raises(SampleError, match=r"vtprune_options, sample 0 \(picture-0\): its text holds '<image>'"):
        run(spied(calls, monkeypatch), manager)
    assert not calls


@pytest.mark.parametrize("arguments", ["pretrianed=x,method=grid", "method=grid,bach_size=2", "metod=grid,keep=3"])
def test_a_misspelt_argument_is_not_taken_for_an_option(arguments: str) -> None:
    with pytest.raises(InputError, match=r"did you mean (pretrained|batch_size|method)\?.*vtprune list --options"):
        made(arguments)


def test_a_misspelt_option_is_the_methods_own_matter() -> None:
    with pytest.raises(vtprune.VTPruneError, match=r"fastv has no option schedul; .*did you mean schedule"):
        made("method=fastv,schedul=linear")


def test_answers_are_counted_as_they_come(manager: TaskManager, capsys: pytest.CaptureFixture[str]) -> None:
    run(VTPrune(random_checkpoint()), manager)
    assert "answers: 100%" in capsys.readouterr().err
