"""Models whose weights accelerate keeps away from them until they run, in every order of wrapping and offloading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model

import vtprune
from tests.differences import shake
from tests.matrix import label
from tests.models import ROWS, make, prompt
from vtprune.method.pruner import Pruner
from vtprune.wrap import load_weights, save

# Those that bring weights, read a layer's input norm, another layer's projections, or the last norm.
METHODS = [
    vtprune.PMoD(keep=0.6),
    vtprune.GammaMoD(keep=0.6),
    vtprune.CoViPAL(keep=9, width=16, heads=2),
    vtprune.IARED2(keep=0.3),
    vtprune.PyramidDrop(keep=0.4),
    vtprune.GemFilter(keep=0.25),
    vtprune.DART(keep=0.4),
]
BRINGING = METHODS[:4]
# Blocks that are loaded as one piece, so that their parts have no weights while the block does not run.
WHOLE = ["LlamaDecoderLayer", "LlamaAttention", "Qwen2_5_VLDecoderLayer"]


def _offloaded(model: Any, way: str, folder: Path) -> Any:
    if way == "cpu":
        return cpu_offload(model, execution_device="cpu")
    if way == "whole layers":
        return cpu_offload(model, execution_device="cpu", preload_module_classes=WHOLE)
    if way == "disk":
        return disk_offload(model, str(folder), execution_device="cpu")
    layers = {f"model.language_model.layers.{n}": "disk" if n in (1, 2, 3) else "cpu" for n in range(5)}
    others = {
        name: "cpu"
        for name, _ in [*model.named_children(), *(("model." + n, m) for n, m in model.model.named_children())]
        if name not in ("model", "model.language_model")
    }
    parts = {f"model.language_model.{name}": "cpu" for name, _ in model.model.language_model.named_children()}
    parts.pop("model.language_model.layers")
    return dispatch_model(model, {**others, **parts, **layers}, main_device="cpu", offload_dir=str(folder))


@pytest.mark.lean
@pytest.mark.parametrize("way", ["cpu", "whole layers", "disk", "spilled"])
@pytest.mark.parametrize("wrapped_first", [True, False], ids=["wrapped first", "offloaded first"])
@pytest.mark.parametrize("pruner", METHODS, ids=label)
def test_an_offloaded_model_answers_as_one_in_memory(
    pruner: Pruner, wrapped_first: bool, way: str, tmp_path: Path
) -> None:
    kind = "llava-clip"
    inputs = prompt(kind, ROWS[kind])
    with torch.no_grad():
        expected = vtprune.wrap(make(kind), pruner)(**inputs).logits
        plain = make(kind)(**inputs).logits
        model = make(kind)
        if wrapped_first:
            model = _offloaded(vtprune.wrap(model, pruner), way, tmp_path)
        else:
            model = vtprune.wrap(_offloaded(model, way, tmp_path), pruner)
        assert torch.allclose(model(**inputs).logits, expected, atol=1e-6)
        assert torch.allclose(vtprune.unwrap(model)(**inputs).logits, plain, atol=1e-6)


@pytest.mark.parametrize("pruner", BRINGING, ids=label)
def test_weights_of_an_offloaded_model_are_saved_and_read_again_by_another(pruner: Pruner, tmp_path: Path) -> None:
    kind = "qwen2.5-vl"
    inputs = prompt(kind, ROWS[kind])
    model = vtprune.wrap(make(kind), pruner)
    shake(model)
    with torch.no_grad():
        expected = model(**inputs).logits
        cpu_offload(model, execution_device="cpu")
        save(model, tmp_path)
        other = vtprune.wrap(cpu_offload(make(kind), execution_device="cpu"), tmp_path)
        assert torch.allclose(other(**inputs).logits, expected, atol=1e-6)
    with pytest.raises(vtprune.VTPruneError, match="offloaded"):
        load_weights(model, tmp_path)
