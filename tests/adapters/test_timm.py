"""timm's ViT alone: dropping equals masking, in the blocks and in what pools."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vtprune
from tests.adapters.test_open_clip import METHODS, traces
from tests.clip_towers import masked, random_timm, watched

# How a tower pools, and whether it has a CLS token.
POOLS = [("avg", False), ("avg", True), ("token", True), ("map", False), ("map", True)]


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("pool", "cls"), POOLS)
def test_dropping_equals_masking(
    pool: str, cls: bool, fused: bool, pixels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_timm(pool, cls=cls, qk_norm=fused)
    for module in model.visual.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    alive = watched(monkeypatch, len(pixels), layers=6, tokens=36)
    with vtprune.wrapped(model, "flowcut", keep=7):
        found = model.encode_image(pixels)
        report = vtprune.report(model)
    assert [one.images[0].kept for one in report.samples] == [row.nonzero().flatten().tolist() for row in alive[-1]]
    assert {len(one.images[0].kept) for one in report.samples} == {7}
    torch.testing.assert_close(found, masked(model, pixels, alive), atol=2e-6, rtol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("pool", "cls"), POOLS)
def test_a_batch_is_its_rows_alone_and_keeping_everything_changes_no_bit(
    method: str, pool: str, cls: bool, pixels: Tensor
) -> None:
    model = random_timm(pool, cls=cls)
    plain, before = model.encode_image(pixels), traces(model)
    with vtprune.wrapped(model, method, keep=1.0):
        assert torch.equal(model.encode_image(pixels), plain)
    with vtprune.wrapped(model, method, **METHODS[method]):
        alone = torch.cat([model.encode_image(image[None]) for image in pixels])
        torch.testing.assert_close(model.encode_image(pixels), alone, atol=5e-6, rtol=0)
    assert not torch.allclose(alone, plain)
    assert traces(model) == before


@pytest.mark.parametrize(("pool", "cls"), [("avg", True), ("map", False)])
def test_what_pools_counts_a_merged_patch_as_often_as_it_stands(pool: str, cls: bool, pixels: Tensor) -> None:
    model = random_timm(pool, cls=cls)
    trunk, caught = model.visual.trunk, dict[str, Tensor]()
    with vtprune.wrapped(model, "turbo", keep=9):
        hook = trunk.norm.register_forward_hook(lambda module, args, output: caught.update(states=output))
        found = trunk(pixels)
        images = [sample.images[0] for sample in vtprune.report(model).samples]
        hook.remove()
    for row, image in enumerate(images):
        sizes = dict.fromkeys(image.kept, 1) | {merge.into: len(merge.members) for merge in image.merged}
        assert sum(sizes.values()) == 36
        # Each as often as it stands for a patch.
        every = [token for token, size in sizes.items() for _ in range(size)]
        patches = caught["states"][row, trunk.num_prefix_tokens :][every]
        before = caught["states"][row, : trunk.num_prefix_tokens]
        pooled = trunk.head(trunk.fc_norm(trunk.pool(torch.cat([before, patches])[None])))
        torch.testing.assert_close(found[row], pooled[0], atol=2e-6, rtol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("pool", "cls"), [("token", True), ("map", False)])
def test_flops_are_what_torch_counts(method: str, pool: str, cls: bool, pixels: Tensor) -> None:
    # torch's counter follows gradients where it can.
    model = random_timm(pool, cls=cls).requires_grad_(False)
    for given in ({}, METHODS[method]):
        counter = FlopCounterMode(display=False)
        with vtprune.wrapped(model, method if given else "none", **given), sdpa_kernel(SDPBackend.MATH), counter:
            model.encode_image(pixels[:1])
            report = vtprune.report(model)
        own = report.flops - report.flops_breakdown.scoring
        assert own <= counter.get_total_flops() <= 1.01 * own + report.flops_breakdown.scoring


def test_its_parts_are_wrapped_alone_and_texts_know_nothing_of_it(pixels: Tensor) -> None:
    model = random_timm("map")
    texts = torch.randint(1, 99, (4, 16), generator=torch.Generator().manual_seed(0))
    text = model.encode_text(texts)
    with vtprune.wrapped(model, "turbo", keep=9):
        whole = model.encode_image(pixels)
        assert torch.equal(model.encode_text(texts), text)
    with vtprune.wrapped(model.visual, "turbo", keep=9):
        assert torch.equal(model.encode_image(pixels), whole)
    trunk = model.visual.trunk
    with vtprune.wrapped(trunk, "turbo", keep=9):
        assert torch.equal(model.visual.head(trunk(pixels)), whole)
        with pytest.raises(vtprune.VTPruneError, match="pixels alone"):
            trunk(pixels, attn_mask=torch.zeros(36, 36))


def test_methods_that_choose_by_features_run_on_what_a_tower_makes(pixels: Tensor) -> None:
    model = random_timm("map", qk_norm=True)
    plain = model.visual.trunk.get_intermediate_layers(pixels, n=[4])[0]
    for row, tokens in enumerate(vtprune.encoder_tokens(model, pixels, layer=-2)):
        torch.testing.assert_close(tokens.features, plain[row])
        chosen = vtprune.select(tokens.features, "fopru", keep=9, grid=tokens.grid, signals=tokens.signals)
        assert len(chosen.kept) == 9
        query = tokens.signals.query
        torch.testing.assert_close(query.mean(dim=-1), torch.zeros(query.shape[:-1]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("tower", "word"),
    [
        ({"pool": "avgmax"}, "pool"),
        ({"reg_tokens": 2}, "register"),
        ({"patch_drop_rate": 0.5}, "patch_drop_rate"),
        ({"dynamic_img_pad": True}, "pads"),
    ],
)
def test_towers_that_cannot_be_right_are_refused(tower: dict[str, Any], word: str) -> None:
    with pytest.raises(vtprune.UnsupportedModelError, match=word):
        vtprune.wrap(random_timm(**tower), "flowcut")


def test_what_is_no_vit_of_timms_is_refused() -> None:
    model = random_timm()
    model.visual.trunk = torch.nn.Conv2d(3, 4, 2)
    with pytest.raises(vtprune.UnsupportedModelError, match="Conv2d"):
        vtprune.wrap(model, "flowcut")


def test_gradient_checkpointing_is_refused_where_it_would_run_blocks_again(pixels: Tensor) -> None:
    model = random_timm()
    model.set_grad_checkpointing(True)
    grad, wrapped = torch.enable_grad(), vtprune.wrapped(model, "flowcut", keep=9)
    with grad, wrapped, pytest.raises(vtprune.VTPruneError, match="checkpointing"):
        model.encode_image(pixels)


@pytest.mark.parametrize("size", [(24, 24), (32, 20), (48, 48)])
@pytest.mark.parametrize("pool", ["avg", "map"])
def test_pictures_of_another_size_cost_what_torch_counts(pool: str, size: tuple[int, int]) -> None:
    trunk = random_timm(pool, dynamic_img_size=True).visual.trunk.requires_grad_(False)
    counter = FlopCounterMode(display=False)
    with vtprune.wrapped(trunk, "flowcut", keep=0.3), sdpa_kernel(SDPBackend.MATH), counter:
        trunk(torch.randn(1, 3, *size))
        report = vtprune.report(trunk)
    own = report.flops - report.flops_breakdown.scoring
    assert own <= counter.get_total_flops() <= 1.01 * own + report.flops_breakdown.scoring
    assert report.samples[0].images[0].grid == (1, size[0] // 4, size[1] // 4)


def test_a_mean_of_many_patches_does_not_overflow_in_half_precision() -> None:
    trunk = random_timm("avg", img_size=96, fc_norm=True).visual.trunk
    trunk.blocks[-1].mlp.fc2.bias[0] = 400.0
    trunk, pixels = trunk.half(), torch.randn(1, 3, 96, 96).half()
    assert trunk(pixels).isfinite().all()
    with vtprune.wrapped(trunk, "turbo", keep=400):
        assert trunk(pixels).isfinite().all()
