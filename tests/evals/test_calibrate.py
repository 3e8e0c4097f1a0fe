"""`vtprune calibrate`: heads are kept by the attention that they give to vision, as the model itself has it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import vtprune
from tests.evals.tuning import fails, private_environment, run  # noqa: F401 (a fixture of every test here)
from tests.models import IMAGE, ROWS, make, prompt
from vtprune.evals.calibrate.heads import measure, reading_heads


@pytest.mark.parametrize("kind", ["llava-clip", "qwen2.5-vl"])
def test_ratios_are_those_of_the_models_own_maps(kind: str) -> None:
    inputs = prompt(kind, ROWS[kind])
    found = measure(make(kind), [inputs])
    with torch.no_grad():
        maps = make(kind, "eager")(**inputs, output_attentions=True).attentions
    for row, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
        real = mask.bool()
        vision = (ids == IMAGE)[real]
        for layer, attention in enumerate(maps):
            own = attention[row][:, real][:, :, real]
            mass = (
                own[:, :, vision].sum(dim=(1, 2)).view(2, -1).sum(1),
                own[:, :, ~vision].sum(dim=(1, 2)).view(2, -1).sum(1),
            )
            torch.testing.assert_close(found[row, layer], mass[0] / mass[1], atol=1e-5, rtol=1e-4)


def test_a_head_stays_that_reads_vision_in_more_than_the_share_of_samples() -> None:
    # Of five samples, by layer and head.
    ratios = torch.tensor([[[0.0, 0.0]] * 2 + [[0.3, 0.1]]] * 2 + [[[0.0, 0.0]] * 2 + [[0.1, 0.3]]] * 3)
    assert reading_heads(ratios, threshold=0.2) == {2: [1]}
    assert reading_heads(ratios, threshold=0.2, agree=0.3) == {2: [0, 1]}
    assert reading_heads(ratios, threshold=0.4, whole=1) == {1: [], 2: []}


def test_a_wrapped_model_and_no_samples_are_refused() -> None:
    with pytest.raises(vtprune.VTPruneError, match="the model itself; call"):
        measure(vtprune.wrap(make("llava-clip"), "grid"), [])
    with pytest.raises(vtprune.VTPruneError, match="no samples that show anything"):
        measure(make("llava-clip"), [])


def test_the_command_writes_a_file_that_wrap_takes(tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    result = run("calibrate", "yopo", "--samples", "2", "--output", path)
    assert result.exit_code == 0, result.output
    written = json.loads(path.read_text())
    assert "0" not in written["kept"]
    assert set(written["kept"]) == {str(layer) for layer in range(2, written["depth"])}
    assert f"yopo:head_file={path}" in result.output.replace("\n", "")
    fails(run("calibrate", "grid", "--output", path), "method: auto and yopo are calibrated, got grid")
