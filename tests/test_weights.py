"""The weights that methods bring: written whole, read back, and refused where they do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import vtprune
from tests.models import MODELS, ROWS, make, prompt
from tests.oracle import run_wrapped
from tests.test_pmod import trained
from vtprune.routing import PMoD

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

    monkeypatch.setattr("vtprune.weights.save_file", full)
    with pytest.raises(vtprune.VTPruneError, match="No space left"):
        vtprune.save(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
