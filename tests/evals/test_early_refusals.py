"""What would be ignored, or fail on the way, is refused by name before a model runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tenacity import RetryError, retry, stop_after_attempt

import vtprune
from tests.checkpoint import png, random_checkpoint, random_qwen_checkpoint
from tests.cli.test_cli import fails, run
from tests.models import make
from vtprune.errors import InputError, explain, first_line
from vtprune.evals.bench.suite import open_suite
from vtprune.loading.model import load_model
from vtprune.loading.prompts import check_text
from vtprune.training.config import TrainConfig


def test_none_with_a_keep_is_refused() -> None:
    for keep in (64, 1, 0.5):
        with pytest.raises(vtprune.VTPruneError, match="none prunes nothing"):
            vtprune.wrap(make("llava-clip"), "none", keep=keep)
    vtprune.wrap(make("llava-clip"), "none", keep=1.0)


def test_the_cause_of_a_retry_is_named() -> None:
    @retry(stop=stop_after_attempt(2))
    def fetch() -> None:
        raise ConnectionError("no route to the hub")

    with pytest.raises(RetryError) as caught:
        fetch()
    assert first_line(caught.value) == "no route to the hub"
    assert explain(caught.value) == "ConnectionError: no route to the hub"
    outer = RuntimeError("cannot generate the data set")
    outer.__cause__ = OSError("the file is gone")
    assert explain(outer) == "RuntimeError: cannot generate the data set (because of OSError: the file is gone)"


def test_data_that_cannot_be_loaded_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "vtprune_gone.yaml").write_text(
        "task: vtprune_gone\ndataset_path: parquet\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path}/gone.parquet\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: question\ndoc_to_target: answer\n"
    )
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    refused = pytest.raises(
        InputError, match=r"tasks: cannot load the data of vtprune_gone \(parquet\): .*gone\.parquet"
    )
    with refused, open_suite(["vtprune_gone"], None, 0, tmp_path):
        pass


@pytest.mark.parametrize(
    ("checkpoint", "mark"), [(random_checkpoint, "<image>"), (random_qwen_checkpoint, "<|image_pad|>")]
)
def test_the_mark_of_a_picture_in_a_text_is_named(checkpoint: object, mark: str) -> None:
    _, processor = load_model(checkpoint())  # type: ignore[operator]
    with pytest.raises(InputError, match="its text holds"):
        check_text(processor, f"what does {mark} mean?", "question")
    check_text(processor, "what is < image > and <image 1>?", "question")


def test_commands_refuse_what_they_would_ignore(tmp_path: Path) -> None:
    image, model = tmp_path / "image.png", ["--model", random_checkpoint()]
    image.write_bytes(png(96, 96))
    vtprune.save_config(vtprune.Grid(keep=4), tmp_path / "config")
    out = ["--output", tmp_path / "out"]
    fails(run("ask", image, "what does <image> mean?", *model), 2, "question: its text holds '<image>'")
    fails(run("ask", image, "what?", *model, "--method", tmp_path / "config", "--keep", "9"), 2, "leave out --keep")
    fails(run("ask", image, "what?", *model, "--method", "grid:keep=4", "--keep", "9"), 2, "leave out --keep")
    fails(run("bench", *out, *model, "--methods", "none", "--keep", "9"), 2, "keep: none of none takes '9'")
    fails(run("bench", *out, *model, "--methods", "grid:keep=3", "--keep", "9"), 2, "takes '9'")
    fails(run("bench", *out, *model, "--methods", "none:keep=9"), 2, "none prunes nothing")
    fails(run("bench", *out, *model, "--methods", "grid", "--all"), 2, "--all runs every method")
    fails(run("tune", "holov", "--keep", "9", "--question", "what?", *out), 2, "question: --question goes with")
    fails(run("tune", str(tmp_path / "config"), "--keep", "9", *out), 2, "is a folder")
    fails(run("tune", "grid+fastv", "--keep", "9", *out), 2, "is a list of methods")
    fails(run("arank", "--question", "what?", "--output", tmp_path / "a.json"), 2, "question: --question goes with")
    fails(run("train", "pmod", *out, "--lora-rank", "4"), 2, "goes with --train lora")
    fails(run("train", "pmod", *out, "--questions", "4", "--data", tmp_path / "x.json"), 2, "is for drawn pictures")
    with pytest.raises(vtprune.VTPruneError, match="lr is of the base"):
        TrainConfig(output=tmp_path, train="routers", lr=1e-3, router_lr=1e-3)


def test_training_data_with_the_mark_of_a_picture_in_its_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(96, 96))
    turns = [{"from": "human", "value": "<image>\nwhat is <|image_pad|>?"}, {"from": "gpt", "value": "red"}]
    (tmp_path / "data.json").write_text(json.dumps([{"id": "7", "image": "a.png", "conversations": turns}]))
    result = run(
        "train",
        "pmod",
        "--output",
        tmp_path / "out",
        "--model",
        random_qwen_checkpoint(),
        "--data",
        tmp_path / "data.json",
    )
    fails(result, 2, "record 0 (id 7): its text holds '<|image_pad|>'")
