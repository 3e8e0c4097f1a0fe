"""The weights that methods bring: written whole, read back, and refused where they do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import vtprune
from tests.matrix import CACHE, GATED, PRUNERS, label
from tests.models import MODELS, ROWS, make, prompt
from tests.oracle import run_wrapped
from tests.pruners.test_pmod import trained
from vtprune.method.pruner import Pruner
from vtprune.pruners import PMoD

every_model = pytest.mark.parametrize("kind", MODELS)


@every_model
def test_weights_come_back_from_their_folder(kind: str, tmp_path: Path) -> None:
    inputs, model = prompt(kind, ROWS[kind]), trained(kind, PMoD())
    vtprune.save(model, tmp_path)
    expected, _, _ = run_wrapped(kind, model, inputs)
    again = vtprune.wrap(make(kind), str(tmp_path))
    found, _, _ = run_wrapped(kind, again, inputs)
    assert torch.equal(found, expected)
    assert not any("vtprune" in name for name in vtprune.unwrap(again).state_dict())
    other = trained(kind, PMoD(), seed=9)
    vtprune.load_weights(other, tmp_path)
    assert torch.equal(run_wrapped(kind, other, inputs)[0], expected)


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    vtprune.save(trained("llava-clip", PMoD()), tmp_path)
    with pytest.raises(vtprune.VTPruneError, match="trained on another base model"):
        vtprune.wrap(make("qwen2.5-vl"), str(tmp_path))
    with pytest.raises(vtprune.VTPruneError, match="does not fit the methods"):
        vtprune.load_weights(vtprune.wrap(make("llava-clip"), PMoD(keep=9)), tmp_path)
    file = tmp_path / "vtprune_weights.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(vtprune.VTPruneError, match="cut short"):
        vtprune.wrap(make("llava-clip"), str(tmp_path))
    with pytest.raises(vtprune.VTPruneError, match="no vtprune_weights"):
        vtprune.load_weights(vtprune.wrap(make("llava-clip"), PMoD()), tmp_path / "elsewhere")


def test_a_full_disk_leaves_the_weights_that_were_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained("llava-clip", PMoD())
    vtprune.save(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(vtprune.VTPruneError, match="No space left"):
        vtprune.save(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("pruner", {one.name: one for one in PRUNERS + CACHE + GATED}.values(), ids=label)
def test_wrapping_leaves_torch_s_random_state_alone(pruner: Pruner) -> None:
    first, second = make("llava-clip"), make("llava-clip")
    torch.manual_seed(11)
    before = torch.get_rng_state()
    vtprune.wrap(first, pruner)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    vtprune.wrap(second, pruner)
    weights = dict(second.named_parameters())
    assert all(torch.equal(weight, weights[name]) for name, weight in first.named_parameters())


@pytest.mark.parametrize(
    "pruner",
    [vtprune.PMoD(), vtprune.GammaMoD(), vtprune.CoViPAL(width=16, heads=2), vtprune.IARED2()],
    ids=label,
)
def test_wrapping_seeds_no_device(pruner: Pruner, monkeypatch: pytest.MonkeyPatch) -> None:
    def seeds(*args: object) -> None:
        raise AssertionError("torch.manual_seed moves the random state of every device")

    monkeypatch.setattr(torch, "manual_seed", seeds)
    model = make("llava-clip")
    with torch.device("meta"):
        # Where new modules are made by default is no matter either.
        vtprune.wrap(model, pruner)
    assert not any(weight.is_meta for weight in model.parameters())
