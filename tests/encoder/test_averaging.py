"""Where tokens become means of one another, the next layer is given the means of what the last one put out, whatever
anybody else makes of it, and who holds what is what each layer said."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import vtprune
from tests.models import ROWS, make, prompt
from vtprune.adapters.llava import LlavaAdapter
from vtprune.adapters.qwen_vl import Qwen2VLAdapter
from vtprune.encoder.encoding import Encoding
from vtprune.encoder.merging import Zeros, through
from vtprune.hooks.records import RECORD

KINDS = ["llava-clip", "llava-siglip", "qwen2.5-vl", "qwen3-vl"]


def features(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    grids = {"image_grid_thw": inputs["image_grid_thw"]} if "image_grid_thw" in inputs else {}
    return torch.cat(list(model.model.get_image_features(inputs["pixel_values"], **grids).pooler_output))


def layers_of(model: Any) -> Any:
    tower = getattr(model.model, "visual", None)
    return model.model.vision_tower.encoder.layers if tower is None else tower.blocks


def written_into(output: Tensor) -> Tensor:
    return output.mul_(1.5)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "nobody": lambda layer: None,
    "the layer's output": lambda layer: layer.register_forward_hook(lambda module, args, output: output * 1.5),
    "its own tensor": lambda layer: layer.register_forward_hook(lambda module, args, output: written_into(output)),
    "what the MLP puts out": lambda layer: layer.mlp.register_forward_hook(lambda module, args, output: output * 1.5),
}


@pytest.mark.parametrize("changed", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_short_way_to_the_next_layer_is_the_long_one(
    kind: str, changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = prompt(kind, ROWS[kind][:1])
    added, ways = Encoding.added, list[bool]()

    def noted(self: Encoding, states: Tensor) -> Tensor | None:
        found = added(self, states)
        ways.append(found is not None)
        return found

    monkeypatch.setattr(Encoding, "added", noted)
    found = []
    for short in (True, False):
        for adapter in (LlavaAdapter, Qwen2VLAdapter):
            monkeypatch.setattr(adapter, "adds_mlp", short)
        model = vtprune.wrap(make(kind), "tome", keep=0.3)
        CHANGES[changed](layers_of(model)[1])
        ways.clear()
        with torch.no_grad():
            found.append(features(model, inputs))
        assert any(ways) == short
        assert all(ways) == (short and changed == "nobody")
    assert torch.allclose(*found, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_hands_on_a_row_for_each_token_that_it_began_with(kind: str) -> None:
    inputs, model = prompt(kind, ROWS[kind][:1]), vtprune.wrap(make(kind), "tome", keep=0.3)
    seen: list[tuple[Tensor, Tensor]] = []
    for layer in list(layers_of(model))[:2]:
        layer.register_forward_pre_hook(lambda module, args: seen.append((args[0], args[0])))
        layer.register_forward_hook(lambda module, args, output: seen.append((seen.pop()[0], output)))
    with torch.no_grad():
        features(model, inputs)
    for given, made in seen:
        assert given.shape == made.shape
    assert seen[1][0].shape[-2] < seen[0][0].shape[-2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
def test_other_modes_give_the_same(kind: str, mode: Any) -> None:
    inputs, model = prompt(kind, ROWS[kind][:1]), vtprune.wrap(make(kind), "turbo", keep=0.3)
    with torch.no_grad():
        expected = features(model, inputs)
    with mode():
        assert torch.allclose(features(model, inputs).detach(), expected, atol=1e-5)


def test_images_that_become_equally_long_on_the_way_merge_as_they_do_alone() -> None:
    # Of 30 tokens and of 25 the first of four layers leaves 16, if they are to leave 2.
    model = vtprune.wrap(make("qwen2.5-vl"), "tome", keep=2, layers=4)
    width = prompt("qwen2.5-vl", ROWS["qwen2.5-vl"])["pixel_values"].shape[1]
    grids = torch.tensor([[1, 10, 12], [1, 10, 10]])
    parts = torch.randn(220, width, generator=torch.Generator().manual_seed(2)).split([120, 100])
    with torch.no_grad():
        together = model.model.get_image_features(torch.cat(parts), image_grid_thw=grids).pooler_output
        for number, (part, found) in enumerate(zip(parts, together, strict=True)):
            (alone,) = model.model.get_image_features(part, image_grid_thw=grids[number, None]).pooler_output
            assert torch.allclose(found, alone, atol=1e-5)
            mine, others = (getattr(one, RECORD).merges() for one in (found, alone))
            assert [(one.into, one.members) for one in mine] == [(one.into, one.members) for one in others]
            for one, other in zip(mine, others, strict=True):
                assert one.weights == pytest.approx(other.weights)


@pytest.mark.parametrize("count", range(1, 10))
def test_maps_are_looked_through_as_one_by_one(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    widths = [20 - own for own in range(count + 1)]
    maps = [
        torch.nn.functional.pad(torch.randint(1, after, (2, before - 1), generator=generator), (1, 0))
        for before, after in itertools.pairwise(widths)
    ]
    expected = maps[0]
    for one in maps[1:]:
        expected = one.gather(1, expected)
    assert torch.equal(through(maps, widths[-1]), expected[:, 1:] - 1)


def test_zeros_that_were_written_into_are_not_handed_out_again() -> None:
    like = torch.ones(9, 2)
    for zeros in (Zeros(3, alone=False), Zeros(3, alone=True)):
        for count in (9, 8, 4, 4, 2):
            taken = zeros.take(like, count)
            assert taken.shape == (count, 2)
            assert not bool(taken.any())
            taken += 1
        assert zeros.take(torch.ones(9, 3, dtype=torch.double), 5).dtype == torch.double
