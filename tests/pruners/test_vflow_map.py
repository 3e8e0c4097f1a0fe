"""VFlowOpt's map: the entropy of patches, and the importance of tokens."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from tests.streams import picture_stream
from vtprune.errors import ScoreError
from vtprune.method.stages import Read
from vtprune.method.views import LayerSignals
from vtprune.pruners import VFlowOpt
from vtprune.pruners.vflowopt.importance import (
    RELEASED_EPS,
    global_attention,
    grey_levels,
    importance_map,
    level_entropy,
    patch_levels,
    released_entropy,
    wrapped_levels,
)
from vtprune.tensors.attention import CPU_BYTES


def random_signals(tokens: int = 36, *, prefix: int = 0, group: int = 1, seed: int = 0) -> LayerSignals:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(3, 2, prefix + tokens * group, 4, generator=generator)
    return LayerSignals(*states.unbind(), scale=0.5, prefix=prefix, group=group)


# Entropy


def test_a_flat_patch_has_no_entropy_and_noise_has_much():
    noise = torch.rand(1, 3, 16, 32, generator=torch.Generator().manual_seed(0))
    noise[..., 16:] = 0.3
    found = level_entropy(patch_levels(grey_levels(noise), (1, 1, 2)))
    assert found[1] == 0
    assert 6 < found[0] <= math.log2(256)


def test_entropy_counts_bits():
    levels = torch.tensor([[0, 0, 7, 7], [1, 2, 3, 255], [9, 9, 9, 9]])
    assert torch.allclose(level_entropy(levels), torch.tensor([1.0, 2.0, 0.0]))
    assert torch.allclose(level_entropy(levels, RELEASED_EPS), torch.tensor([1.0, 2.0, 0.0]), atol=1e-6)


def test_grey_is_the_rounded_mean_of_the_colours():
    picture = torch.tensor([10, 20, 34]).view(1, 3, 1, 1) / 255
    assert grey_levels(picture).item() == 21
    assert grey_levels(torch.ones(1, 3, 1, 1)).item() == 255


def test_each_token_has_the_pixels_of_its_own_area_and_the_rest_is_left_out():
    levels = torch.arange(2 * 5 * 7).reshape(2, 5, 7)
    found = patch_levels(levels, (2, 2, 3))
    assert found.shape == (12, 4)
    assert found[0].tolist() == [0, 1, 7, 8]
    assert found[-1].tolist() == levels[1, 2:4, 4:6].flatten().tolist()


def test_released_levels_wrap_around_in_a_byte():
    pixels = torch.tensor([[-0.5] * 3, [1.0] * 3, [0.0] * 3]).T[None]
    assert wrapped_levels(pixels).tolist() == [[129, 255, 0]]


def test_released_entropy_reads_images_and_lists_of_patches_alike():
    image = torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(0))
    # Qwen's layout: the four patches of a token, each repeated in time.
    patches = image.reshape(3, 2, 2, 2, 3, 2, 2).permute(1, 4, 2, 5, 0, 3, 6).reshape(24, 3, 1, 4)
    listed = patches.expand(-1, -1, 2, -1).reshape(24, -1)
    assert torch.allclose(released_entropy(listed, (1, 2, 3)), released_entropy(image, (1, 2, 3)), atol=1e-6)


# Importance


def naive_importance(signals: LayerSignals, entropy: torch.Tensor, threshold: float, alpha: float) -> torch.Tensor:
    """From the full map of all heads."""
    logits = torch.einsum("hqd,hkd->hqk", signals.query, signals.key) * signals.scale
    full = logits.softmax(dim=-1).mean(dim=0)[signals.prefix :, signals.prefix :]
    received = full.mean(dim=0)
    rows = [j for j in range(len(received)) if received[j] > threshold * received.mean()] or [int(received.argmax())]
    attention = full[rows].mean(dim=0).reshape(-1, signals.group).mean(dim=1)
    return attention + alpha * (entropy.exp() / entropy.exp().sum()) / signals.group


@pytest.mark.parametrize("threshold", [0, 1.0, 1.2, 50])
@pytest.mark.parametrize(("prefix", "group"), [(0, 1), (1, 1), (0, 4)])
def test_importance_is_that_of_the_full_map(threshold, prefix, group, monkeypatch):
    signals = random_signals(prefix=prefix, group=group)
    entropy = torch.rand(36, generator=torch.Generator().manual_seed(1)) * 8
    expected = naive_importance(signals, entropy, threshold, -0.7)
    assert torch.allclose(importance_map(signals, entropy, threshold, -0.7), expected, atol=1e-7)
    # The same in chunks of a few rows.
    monkeypatch.setattr("vtprune.tensors.attention.CPU_BYTES", CPU_BYTES >> 14)
    assert torch.allclose(importance_map(signals, entropy, threshold, -0.7), expected, atol=1e-7)


def test_without_a_global_patch_the_one_that_receives_most_decides():
    signals = random_signals()
    full = (signals.query @ signals.key.mT * signals.scale).softmax(dim=-1).mean(dim=0)
    assert torch.allclose(global_attention(signals, 1e9), full[full.mean(dim=0).argmax()], atol=1e-7)


def test_without_alpha_no_pixels_are_read():
    assert Read.PICTURE in VFlowOpt().input_reads
    for pruner in (VFlowOpt(alpha=0.0), VFlowOpt(variant="released"), VFlowOpt(variant="released", alpha=1.0)):
        assert Read.PICTURE not in pruner.input_reads


def test_the_entropy_of_tokens_that_an_encoder_stage_dropped_does_not_count():
    whole = picture_stream()
    left = torch.tensor([1, 4, 7, 30])
    part = dataclasses.replace(whole, indices=left, features=whole.features[left], signals=random_signals(4))
    entropy = level_entropy(patch_levels(grey_levels(whole.picture), whole.grid))[left]
    found = VFlowOpt(alpha=1.0, threshold=0).remember(part)["importance"]
    assert torch.allclose(found, importance_map(part.signals, entropy, 0, 1.0))


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_nan_in_the_encoder_raises(variant):
    bad = picture_stream()
    bad.signals.key[0, -1, 0] = float("nan")
    with pytest.raises(ScoreError, match="vflowopt"):
        VFlowOpt(variant=variant).remember(bad)
