"""A model that is too large for one device is spread over several, and pruned there as anywhere."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from PIL import Image

import vtprune
from tests.checkpoint import random_checkpoint
from vtprune.errors import InputError
from vtprune.evals.lmms.gen_kwargs import read_generation
from vtprune.evals.lmms.generation import answer_batch
from vtprune.evals.lmms.model import VTPrune
from vtprune.loading.devices import accelerators_of, device_of, read_device_map
from vtprune.loading.model import load_model
from vtprune.loading.prompts import encode, question

REST = {"model.multi_modal_projector": "cpu", "lm_head": "cpu"}
TOWER_ON_DISK = {"model.vision_tower": "disk", "model.language_model": "cpu", **REST}


def layers_on_disk() -> dict[str, Any]:
    """Every second decoder layer waits on the disk."""
    inner = "model.language_model"
    layers = {f"{inner}.layers.{i}": ("cpu", "disk")[i % 2] for i in range(6)}
    ends = {f"{inner}.{name}": "cpu" for name in ("embed_tokens", "norm", "rotary_emb")}
    return {"model.vision_tower": "cpu", **layers, **ends, **REST}


def told(model: Any, processor: Any, method: str) -> list[Any]:
    picture = Image.radial_gradient("L").convert("RGB")
    inputs = encode(processor, [question(picture, text) for text in ("what color?", "how many circles are there?")])
    with vtprune.wrapped(model, method, keep=0.25):
        found = answer_batch(model, processor.tokenizer, inputs, generation=read_generation({"max_new_tokens": 5}, 5))
    return [(one.text, one.cost.kept_tokens, one.cost.flops, one.cost.kv_bytes_end) for one in found]


@pytest.mark.parametrize("spread", [TOWER_ON_DISK, layers_on_disk()], ids=["tower", "layers"])
def test_what_waits_on_a_disk_is_pruned_as_what_lies_in_memory(spread: dict[str, Any]) -> None:
    model, processor = load_model(random_checkpoint())
    parted, _ = load_model(random_checkpoint(), device_map=spread)
    assert any(weight.is_meta for weight in parted.parameters())
    assert device_of(parted) == torch.device("cpu")
    for method in ("flowcut", "fastv", "lazyllm", "d2o"):
        assert told(parted, processor, method) == told(model, processor, method)


@pytest.mark.parametrize("text", ["cpu", '{"": "cpu"}'])
def test_model_args_may_hold_a_map(text: str) -> None:
    lm = VTPrune.create_from_arg_string(f"pretrained={random_checkpoint()},device_map={text},method=grid,keep=0.5")
    assert lm.device == torch.device("cpu")
    assert vtprune.is_wrapped(lm.model)


def test_a_map_of_several_modules_stands_in_quotes() -> None:
    lm = VTPrune.create_from_arg_string(f"pretrained={random_checkpoint()},device_map='{json.dumps(TOWER_ON_DISK)}'")
    assert lm.model.device.type == "meta"
    assert lm.device == torch.device("cpu")


def test_a_map_and_a_device_exclude_each_other() -> None:
    with pytest.raises(InputError, match="leave out device=cpu"):
        load_model(random_checkpoint(), device="cpu", device_map="auto")
    with pytest.raises(InputError, match="leave out device=cpu"):
        VTPrune.create_from_arg_string("device_map=cpu", {"device": "cpu"})


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("gpu", "unknown device 'gpu'"),
        ("{cpu}", "no JSON object"),
        ("{}", "it is empty"),
        ({"lm_head": None}, "lm_head goes to a device"),
        ({"": "nowhere"}, "unknown device 'nowhere'"),
    ],
)
def test_what_is_no_map_is_refused(given: Any, reason: str) -> None:
    with pytest.raises(InputError, match=f"device_map: .*{reason}"):
        read_device_map(given)


def test_devices_are_those_that_compute() -> None:
    class Spread:
        device = torch.device("meta")
        hf_device_map = {"a": "disk", "b": 1, "c": "cpu", "d": 1, "e": "cuda:0"}  # noqa: RUF012

    assert accelerators_of(Spread()) == [torch.device("cuda:1"), torch.device("cuda:0")]
    assert device_of(Spread()) == torch.device("cuda:1")
