"""What Qwen3-VL adds to vision tokens after its first decoder layers stays with them, wherever they go.

The oracle (`tests/test_support.py`) reads these planes from the wrapped tower; here they are held against those of the
unwrapped one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtprune
from tests.models import ANY_SIZE, make, prompt, qwen3, spread
from tests.oracle import difference_from_masked
from vtprune.method.pruner import Pruner
from vtprune.report.report import ImageReport

KIND = "qwen3-vl"
INSIDE = [
    vtprune.FlowCut(keep=0.3),
    vtprune.VisionZip(keep=0.3),
    vtprune.VisionZip(keep=0.3, merge=False),
    vtprune.Turbo(keep=0.4),
    vtprune.Turbo(keep=0.5, layers=2),
    vtprune.MustDrop(keep=0.5, merge_threshold=0.1),
]


@torch.no_grad()
def planes_of(model: Any, inputs: dict[str, Tensor]) -> list[list[Tensor]]:
    """Of each plane the values of each image."""
    out = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    return [list(plane) for plane in out.deepstack_features]


def images_of(model: Any, inputs: dict[str, Tensor]) -> list[ImageReport]:
    with torch.no_grad():
        model(**inputs)
    return [image for sample in vtprune.report(model).samples for image in sample.images]


@pytest.mark.parametrize("pruner", INSIDE, ids=repr)
def test_no_token_that_the_tower_keeps_is_without_its_planes(pruner: Pruner) -> None:
    model, inputs = vtprune.wrap(make(KIND), pruner), prompt(KIND, ANY_SIZE)
    for plane in planes_of(model, inputs):
        for values, image in zip(plane, images_of(model, inputs), strict=True):
            assert values[image.kept].abs().sum(dim=-1).min() > 0


@pytest.mark.parametrize("merge", [True, False])
def test_what_flows_together_after_the_planes_were_made_adds_them_up(merge: bool) -> None:
    inputs = prompt(KIND, ANY_SIZE)
    whole = planes_of(make(KIND), inputs)
    # Chooses after the last block, behind those that make planes.
    model = vtprune.wrap(make(KIND), "visionzip", keep=0.3, merge=merge)
    found, images = planes_of(model, inputs), images_of(model, inputs)
    assert any(image.merged for image in images) is merge
    for own, plain in zip(found, whole, strict=True):
        for values, before, image in zip(own, plain, images, strict=True):
            expected = before.clone()
            for one in image.merged:
                expected[one.into] = (before[one.members] * torch.tensor(one.weights)[:, None]).sum(dim=0)
            assert torch.allclose(values[image.kept], expected[image.kept], atol=1e-5)


def test_what_merged_before_a_plane_was_made_has_the_plane_of_the_merged_vector() -> None:
    inputs, seen = prompt(KIND, ANY_SIZE[:1]), list[tuple[Tensor, Tensor]]()
    model = vtprune.wrap(make(KIND), vtprune.Turbo(keep=0.5, layers=1))
    merger = model.model.visual.deepstack_merger_list[0]
    handle = merger.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    found, images = planes_of(model, inputs), images_of(model, inputs)
    handle.remove()
    kept = images[0].kept
    # The merger is given one group for each token that is left, in their order.
    assert seen[0][0].shape[0] == 4 * len(kept)
    with torch.no_grad():
        alone = vtprune.unwrap(model).model.visual.deepstack_merger_list[0](seen[0][0])
    # Their names follow the heaviest of what flowed into them, so they may stand in another order.
    far = torch.cdist(found[0][0][kept], alone)
    assert far.min(dim=1).values.max() < 1e-4
    assert sorted(far.argmin(dim=1).tolist()) == list(range(len(kept)))


@pytest.mark.parametrize("indexes", [[], [2], [0, 1, 2, 3, 4]], ids=["none", "one", "as many as layers"])
@pytest.mark.parametrize("pruner", [vtprune.Pool(keep=0.3), vtprune.PyramidDrop(keep=0.5)], ids=repr)
def test_any_number_of_planes_is_exact(indexes: list[int], pruner: Pruner) -> None:
    torch.manual_seed(0)
    model = spread(qwen3(indexes))
    model.generation_config.eos_token_id = None
    inputs = prompt(KIND, ANY_SIZE)
    difference, _ = difference_from_masked(KIND, vtprune.wrap(model, pruner), inputs)
    assert difference < 2e-5


def test_planes_of_tokens_that_may_return_go_with_the_rows_of_the_cache() -> None:
    model, inputs = vtprune.wrap(make(KIND), "lazyllm", keep=0.6), prompt(KIND, ANY_SIZE)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    length, before = inputs["input_ids"].shape[1], [layer.aux["planes"] for layer in cache.layers[:3]]
    assert [tuple(values.shape) for values in before] == [(3, length, 32)] * 3
    assert all("planes" not in layer.aux for layer in cache.layers[3:])
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.crop(-4)
    for layer, values in zip(cache.layers, before, strict=False):
        assert torch.equal(layer.aux["planes"], values[[2, 0], : length - 4])
