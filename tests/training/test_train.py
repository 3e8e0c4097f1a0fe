"""`vtprune train`: one run is one run, however it was cut into pieces, and what it leaves loads as any model does."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import vtprune
from tests.models import make
from tests.training.tiny_training import ask, load, processor, run
from vtprune.errors import RunError, VTPruneError
from vtprune.training import TrainConfig
from vtprune.training.state import FILE, FOLDER


class Stopped(Exception):
    """An interruption."""


def _stop_before(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    from vtprune.training.loop import Run

    real = Run._step

    def stopping(self: Any) -> Any:
        if self.progress.step == step:
            raise Stopped
        return real(self)

    monkeypatch.setattr(Run, "_step", stopping)


def _results(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors") | load_file(folder / "vtprune_weights.safetensors")


def test_an_interrupted_run_that_goes_on_equals_one_that_was_not(tmp_path: Path, monkeypatch: Any) -> None:
    options: dict[str, Any] = {"steps": 4, "save_every": 1, "accumulate": 2, "batch_size": 2}
    run(tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        _stop_before(patch, 2)
        with pytest.raises(Stopped):
            run(tmp_path / "cut", **options)
    assert sorted(path.name for path in (tmp_path / "cut" / FOLDER).iterdir()) == [FILE]
    run(tmp_path / "cut", **options)
    whole, cut = _results(tmp_path / "whole"), _results(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    logs = [json.loads((tmp_path / name / "training.json").read_text()) for name in ("whole", "cut")]
    assert logs[0]["curve"] == logs[1]["curve"]
    assert [point["step"] for point in logs[0]["curve"]] == [1, 2, 3, 4]
    assert not (tmp_path / "cut" / FOLDER).exists()


def test_random_routing_that_is_interrupted_draws_on_as_it_would_have(tmp_path: Path, monkeypatch: Any) -> None:
    options: dict[str, Any] = {"method": "random_ltd", "steps": 2, "save_every": 1}
    run(tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        _stop_before(patch, 1)
        with pytest.raises(Stopped):
            run(tmp_path / "cut", **options)
    trained = run(tmp_path / "cut", **options)
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    inputs = ask(processor())
    with torch.no_grad():
        logits = trained.eval()(**inputs).logits
        assert torch.equal(vtprune.unwrap(trained)(**inputs).logits, logits)


def test_what_was_trained_loads_as_any_model_does_and_brings_the_method(tmp_path: Path) -> None:
    trained = run(tmp_path, steps=3)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "vtprune" in name]
    model, processor = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    inputs = ask(processor)
    vtprune.wrap(model, tmp_path)
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
        assert torch.equal(logits, trained.eval()(**inputs).logits)
        assert not torch.allclose(logits, vtprune.wrap(load(), "pmod")(**inputs).logits, atol=1e-3)
    assert any(weight.any() for weight in model.vtprune_weights.parameters())
    for name in ("loss.png", "routed.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    shares = json.loads((tmp_path / "training.json").read_text())["computed"]
    assert shares[0] == 1 > shares[-1]


def test_a_full_disk_leaves_the_checkpoint_before_whole(tmp_path: Path, monkeypatch: Any) -> None:
    real, calls = safetensors.torch.save_file, []

    def full(tensors: Any, path: Any, **options: Any) -> None:
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, **options)

    options: dict[str, Any] = {"steps": 3, "save_every": 1}
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full)
        with pytest.raises(RunError, match="No space left"):
            run(tmp_path, **options)
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == [FILE]
    lines: list[str] = []
    run(tmp_path, lines=lines, **options)
    assert any("going on from step 1" in line for line in lines)


def test_a_full_disk_at_the_end_keeps_the_checkpoint(tmp_path: Path, monkeypatch: Any) -> None:
    def full(self: Any, folder: Any, **options: Any) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedModel.save_pretrained", full)
        with pytest.raises(RunError, match="No space left"):
            run(tmp_path, steps=1)
    assert not (tmp_path / "model.safetensors").exists()
    run(tmp_path, steps=1)
    assert (tmp_path / "model.safetensors").exists()


def test_a_checkpoint_that_was_cut_short_gives_one_clear_error(tmp_path: Path, monkeypatch: Any) -> None:
    with monkeypatch.context() as patch:
        _stop_before(patch, 1)
        with pytest.raises(Stopped):
            run(tmp_path, steps=2, save_every=1)
    path = tmp_path / FOLDER / FILE
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(VTPruneError, match="not a whole checkpoint"):
        run(tmp_path, steps=2, save_every=1)


def test_the_folder_of_another_run_is_refused_by_what_differs(tmp_path: Path) -> None:
    run(tmp_path, steps=1, train="routers")
    assert not (tmp_path / "model.safetensors").exists()
    lines: list[str] = []
    run(tmp_path, steps=1, train="routers", lines=lines)
    assert any("finished" in line for line in lines)
    with pytest.raises(VTPruneError, match=r"lr was 0.001 and is now 0.002"):
        run(tmp_path, steps=1, train="routers", lr=2e-3)
    with pytest.raises(VTPruneError, match="method was"):
        run(tmp_path, "none", steps=1)


@pytest.mark.parametrize("what", ["decoder", "routers", "all"])
def test_only_what_was_asked_for_is_trained(tmp_path: Path, what: str) -> None:
    before = {name: tensor.clone() for name, tensor in vtprune.wrap(load(), "pmod").state_dict().items()}
    after = run(tmp_path, steps=2, train=what).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    parts = {"vtprune_weights": "vtprune_weights", "vision": "vision_tower", "decoder": "language_model"}
    found = {part for part, mark in parts.items() if any(mark in name for name in changed)}
    assert (
        found
        == {
            "routers": {"vtprune_weights"},
            "decoder": {"vtprune_weights", "decoder"},
            "all": {"vtprune_weights", "decoder", "vision"},
        }[what]
    )


def test_a_method_without_weights_has_no_routers_to_train(tmp_path: Path) -> None:
    with pytest.raises(VTPruneError, match="brings no weights"):
        run(tmp_path, "flowcut", train="routers", steps=1)


def _gradients(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[list[torch.Tensor]]:
    """Those that each step hands to the optimiser, the weights being in fp64 and, but for rounding, standing still."""
    found: list[list[torch.Tensor]] = []
    real = torch.optim.AdamW.step

    def step(self: Any) -> Any:
        weights = [weight for group in self.param_groups for weight in group["params"]]
        found.append([weight.grad.clone() for weight in weights if weight.grad is not None])
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "float", torch.nn.Module.double)
        patch.setattr(torch.optim.AdamW, "step", step)
        run(folder, lr=1e-12, **options)
    return found


def test_gradient_checkpointing_and_micro_batches_train_the_same(tmp_path: Path, monkeypatch: Any) -> None:
    # Not the weights after the steps: Adam divides a gradient near zero by itself, so that its rounding decides.
    plain = _gradients(tmp_path / "a", monkeypatch, steps=2, batch_size=4)
    options: dict[str, Any] = {"batch_size": 2, "accumulate": 2, "gradient_checkpointing": True}
    pieces = _gradients(tmp_path / "b", monkeypatch, steps=2, **options)
    assert len(plain) == len(pieces) == 2
    for whole, parts in zip(plain, pieces, strict=True):
        assert {gradient.dtype for gradient in whole} == {torch.float64}
        for gradient, other in zip(whole, parts, strict=True):
            # Losses and scores are in fp32; the rest in fp64.
            torch.testing.assert_close(other, gradient, rtol=0, atol=5e-6 * float(gradient.abs().max()))
    assert sum(bool(gradient.any()) for gradient in plain[0]) > 60


@pytest.mark.parametrize(("method", "message"), [("none", "not finite at step 2"), ("pmod", "step 2: .*NaN")])
def test_a_run_that_diverges_ends_with_the_step_at_which_it_did(tmp_path: Path, method: str, message: str) -> None:
    with pytest.raises(RunError, match=message):
        run(tmp_path, method, steps=3, lr=1e30)


def test_what_was_trained_is_refused_on_another_base(tmp_path: Path) -> None:
    run(tmp_path, steps=1, train="routers")
    with pytest.raises(VTPruneError, match="another base model"):
        vtprune.wrap(make("llava-clip"), tmp_path)


def test_a_folder_that_holds_a_model_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(VTPruneError, match="holds a model"):
        run(tmp_path, steps=1)


def test_the_rate_rises_and_falls_as_half_a_cosine(tmp_path: Path) -> None:
    config = TrainConfig(output=tmp_path, warmup=0.1)
    rates = [config.rate_at(step, 100) for step in range(101)]
    assert rates[0] == 1 / 11
    assert max(rates) == rates[10] == 1
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == 0
    assert config.rate_at(0, 1) == 1


@pytest.mark.parametrize(
    "bad", [{"lr": 0}, {"batch_size": True}, {"steps": 0}, {"warmup": 1}, {"dtype": "float16"}, {"seed": -1}]
)
def test_settings_that_cannot_be_are_refused(tmp_path: Path, bad: dict[str, Any]) -> None:
    with pytest.raises(VTPruneError, match=next(iter(bad))):
        TrainConfig(output=tmp_path, **bad)
