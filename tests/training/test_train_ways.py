"""Other ways to train: adapters, several processes, transformers' own Trainer, half precision, the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import Subset
from typer.testing import CliRunner

import vtprune
from tests.models import IMAGE, MODELS, ROWS, make, prompt
from tests.training.tiny_training import ask, load, processor, run
from vtprune.cli.app import app
from vtprune.errors import VTPruneError
from vtprune.training import Collator, ShapesData
from vtprune.training.objective import Objective, count_targets


@pytest.mark.parametrize("kind", MODELS)
def test_the_objective_is_the_models_own_loss_summed_over_the_answers(kind: str) -> None:
    inputs = prompt(kind, ROWS[kind], "right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :-4] = labels[:, :-4].masked_fill(torch.arange(labels.shape[1] - 4) % 3 > 0, -100)
    labels = labels.masked_fill(inputs["input_ids"] == IMAGE, -100)
    labels[:, 0] = -100
    batch = {**inputs, "labels": labels}
    model = vtprune.wrap(make(kind), "pmod")
    with torch.no_grad():
        loss, extra = Objective(model, torch.float32)(batch)
        expected = model(**batch).loss
    assert extra == 0
    assert abs(loss / count_targets(batch) - expected) < 1e-5


def test_lora_trains_adapters_and_routers_and_peft_reads_them_back(tmp_path: Path) -> None:
    from peft import PeftModel

    trained = run(tmp_path, steps=2, train="lora", lora_rank=4).eval()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert "model.safetensors" not in names
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    model = PeftModel.from_pretrained(load(), tmp_path / "adapter")
    vtprune.wrap(model, tmp_path)
    inputs = ask(processor())
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
        assert torch.equal(logits, trained(**inputs).logits)
        assert not torch.allclose(logits, vtprune.wrap(load(), "pmod").eval()(**inputs).logits, atol=1e-3)
    before = load().state_dict()
    after = {name.replace(".base_layer", ""): tensor for name, tensor in trained.state_dict().items()}
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_lora_without_peft_says_what_to_install(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(VTPruneError, match=r"vtprune\[train\]"):
        run(tmp_path, steps=1, train="lora")


@pytest.mark.parametrize("train", ["decoder", "lora"])
def test_half_precision_computes_in_it_and_keeps_what_is_trained_in_full(tmp_path: Path, train: str) -> None:
    model = run(tmp_path, steps=2, train=train, dtype="bfloat16")
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    frozen = [weight for weight in model.parameters() if not weight.requires_grad]
    assert {weight.dtype for weight in trained} == {torch.float32}
    assert {weight.dtype for weight in frozen} == {torch.bfloat16 if train == "lora" else torch.float32}


def test_the_trainer_of_transformers_trains_a_wrapped_model(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = vtprune.wrap(load(), "pmod")
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        remove_unused_columns=False,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    samples = Subset(ShapesData(questions=2), range(8))
    Trainer(model, arguments, train_dataset=samples, data_collator=Collator(processor())).train()
    inputs = ask(processor())
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    vtprune.save(model, tmp_path)
    vtprune.unwrap(model).save_pretrained(tmp_path)
    assert any(weight.any() for weight in load_file(tmp_path / "vtprune_weights.safetensors").values())
    again = vtprune.wrap(type(model).from_pretrained(tmp_path), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, logits)


def test_the_command_trains_with_options_and_holds_out_validation(tmp_path: Path) -> None:
    command = [
        *("train", "pmod", "--output", str(tmp_path), "--steps", "2", "--batch-size", "2", "--questions", "2"),
        *("--keep", "80%", "--set", "scale=0.3", "--log-every", "1", "--eval-limit", "1", "--device", "cpu"),
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "step 2/2" in result.output
    log = json.loads((tmp_path / "training.json").read_text())
    assert log["state"] == "finished"
    assert len(log["validation"]) == 1
    method = vtprune.load_config(tmp_path)
    assert (method.keep, method.scale) == (0.8, 0.3)
    assert sum(log["computed"]) / len(log["computed"]) <= 0.8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pmodd"], "unknown pruner 'pmodd'"),
        (["flowcut", "--train", "routers"], "brings no weights"),
        (["pmod", "--train", "everything"], "train is one of"),
        (["pmod", "--steps", "2", "--epochs", "1"], "give one of them"),
        (["pmod", "--epochs", "1"], "drawn data has no epochs"),
        (["pmod", "--set", "scale"], "name=value"),
        (["pmod", "--lr", "nan"], "lr is a number above 0"),
        (["pmod", "--images", "."], "go with --data"),
        (["pmod", "--data", "absent.json"], "cannot read absent.json"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["train", *arguments, "--output", str(tmp_path), "--device", "cpu"])
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())


@pytest.mark.slow
def test_two_processes_train_to_the_same_weights_as_one_with_twice_the_batch(tmp_path: Path) -> None:
    common = ["--steps", "3", "--questions", "2", "--lr", "1e-3", "--log-every", "1", "--device", "cpu"]
    train = ["-m", "vtprune.cli", "train", "pmod", *common]
    # On CPUs `accelerate launch` starts several processes through MPI only.
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    one = [*train, "--batch-size", "4", "--output", str(tmp_path / "one")]
    two = [*launch, *train, "--batch-size", "1", "--accumulate", "2", "--output", str(tmp_path / "two")]
    for command in (one, two):
        result = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert result.returncode == 0, result.stderr[-2000:]
    curves = [json.loads((tmp_path / name / "training.json").read_text())["curve"] for name in ("one", "two")]
    for first, second in zip(*curves, strict=True):
        assert abs(first["loss"] - second["loss"]) < 1e-5
    for name in ("model.safetensors", "vtprune_weights.safetensors"):
        weights = [load_file(tmp_path / folder / name) for folder in ("one", "two")]
        assert max((weights[0][key] - weights[1][key]).abs().max() for key in weights[0]) < 1e-4
