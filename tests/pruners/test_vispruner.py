"""VisPruner: what attention chooses, what the rounds leave of the others, and FasterVLM."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.layers import batch_layer, image_states, naive_saliency
from tests.streams import few
from vtprune.errors import ScoreError, VTPruneError
from vtprune.evals.speed.launches import counting
from vtprune.method.facts import Work
from vtprune.method.stages import Read
from vtprune.method.views import EncoderLayer
from vtprune.pruners import VisPruner, vispruner
from vtprune.pruners.vispruner import without_duplicates


def vectors(tokens: int, seed: int = 0, width: int = 6) -> Tensor:
    """Random vectors."""
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


def reference(features: Tensor, count: int) -> list[int]:
    """The rounds, as they are described."""
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    rest = list(range(len(features)))
    while len(rest) > count:
        second, between = rest[::2], rest[1::2]
        likeness = {token: max(float(unit[token] @ unit[other]) for other in between) for token in second}
        falling = sorted(second, key=lambda token: -likeness[token])
        rest = falling[min(8, len(rest) - count) :] + between
    return rest


# The rounds


@few
@given(tokens=st.integers(1, 60), data=st.data(), seed=st.integers(0, 99))
def test_duplicates_go_as_described(tokens: int, data: Any, seed: int) -> None:
    count = data.draw(st.integers(1, tokens))
    features = vectors(tokens, seed)
    assert without_duplicates(features, count).tolist() == reference(features, count)


@pytest.mark.parametrize("near", [1, 4])
def test_whoever_is_compared_with_none_of_its_likes_is_compared_with_all(near: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(vispruner, "NEAR", near)
    assert without_duplicates(vectors(70), 9).tolist() == reference(vectors(70), 9)


def test_too_many_tokens_for_all_cosines_go_by_the_same_rounds(monkeypatch: Any) -> None:
    monkeypatch.setattr(vispruner, "fits", lambda tokens: False)
    assert without_duplicates(vectors(70), 9).tolist() == reference(vectors(70), 9)


def test_of_two_that_are_the_same_one_goes() -> None:
    features = vectors(12)
    left = without_duplicates(features.repeat_interleave(2, dim=0), 16)
    assert {token // 2 for token in left.tolist()} == set(range(12))


# A layer


def layer_of(images: list[Tensor], budgets: list[int], *, prefix: int, group: int) -> tuple[EncoderLayer, Tensor]:
    """A layer of these images with hidden states, and these (B, P + N * group, D)."""
    layer = batch_layer(images, budgets, prefix=prefix, group=group)
    hidden = vectors(layer.key.shape[0] * layer.key.shape[2], 3, 5).view(layer.key.shape[0], -1, 5)
    return replace(layer, hidden=hidden), hidden


@few
@given(
    sizes=st.lists(st.integers(2, 30), min_size=1, max_size=3),
    keep=st.integers(1, 12),
    layout=st.sampled_from([(1, 1), (0, 1), (0, 4)]),
    ratio=st.sampled_from([0.0, 0.5, 0.75, 1.0]),
    seed=st.integers(0, 999),
)
def test_each_image_of_a_batch_keeps_the_important_and_what_is_not_alike(sizes, keep, layout, ratio, seed):
    prefix, group = layout
    images = [image_states(n, prefix=prefix, group=group, seed=seed + row) for row, n in enumerate(sizes)]
    layer, hidden = layer_of(images, [keep] * len(sizes), prefix=prefix, group=group)
    selection = VisPruner(important_ratio=ratio).prune_encoder(layer)
    for row, image in enumerate(images):
        scores = naive_saliency(image, prefix=prefix, group=group)
        order = sorted(range(sizes[row]), key=lambda token: -float(scores[token]))
        count = min(keep, sizes[row])
        important = int(count * ratio)
        features = hidden[row, prefix : prefix + sizes[row] * group].reshape(sizes[row], -1)
        rest = order[important:]
        others = [] if count == important else [rest[one] for one in reference(features[rest], count - important)]
        assert selection.keep[row].nonzero().flatten().tolist() == sorted(order[:important] + others)
        assert selection.counts[row] == count


def test_fastervlm_is_attention_alone() -> None:
    assert VisPruner().encoder_reads == {Read.HIDDEN}
    assert not VisPruner(important_ratio=1).encoder_reads


def test_images_of_a_batch_wait_together() -> None:
    found = []
    for images in (1, 3):
        layer, _ = layer_of([image_states(30, prefix=1, group=1, seed=1)] * images, [6] * images, prefix=1, group=1)
        with counting() as counts:
            VisPruner().prune_encoder(layer)
        found.append(counts.read)
    assert found[0] == found[1]


def test_nan_raises_wherever_it_is_but_in_padding() -> None:
    images = [image_states(n, prefix=0, group=1, seed=n) for n in (12, 9)]
    layer, hidden = layer_of(images, [4, 4], prefix=0, group=1)
    layer.key[1, :, 9:] = hidden[1, 9:] = float("nan")
    assert not bool(VisPruner().prune_encoder(layer).keep[1, 9:].any())
    hidden[0, 3] = float("nan")
    with pytest.raises(ScoreError, match="vispruner"):
        VisPruner(important_ratio=0).prune_encoder(layer)
    layer.key[0, 0, 3] = float("nan")
    with pytest.raises(ScoreError, match="vispruner"):
        VisPruner(important_ratio=1).prune_encoder(layer)


@pytest.mark.parametrize("ratio", [-0.1, 1.5, float("nan"), True, "half"])
def test_a_share_that_makes_no_sense_is_refused(ratio: Any) -> None:
    with pytest.raises(VTPruneError, match="vispruner: important_ratio is a number from 0 to 1"):
        VisPruner(important_ratio=ratio)


def test_scoring_is_one_row_and_the_similarities_of_the_rest() -> None:
    work = Work(
        patches=576, tokens=576, shown=576, kept=64,
        encoder_width=1024, encoder_heads=16, decoder_width=4096, decoder_heads=32,
        prompt=600, text=24, encoder_patches=(577,) * 24, encoder_layers=(22,), decoder_layers=(), has_cls=True,
    )  # fmt: skip
    assert VisPruner(keep=64).flops(work) == 2 * 577 * 1024 + 2 * 544**2 * 1024
    assert VisPruner(keep=64, important_ratio=1).flops(work) == 2 * 577 * 1024


def test_each_round_of_a_large_picture_is_counted() -> None:
    method = VisPruner(keep=4490, important_ratio=0.0)
    work = Work(
        patches=4500, tokens=4500, shown=4490, kept=4490, encoder_width=16, encoder_heads=2, decoder_width=16,
        decoder_heads=2, prompt=4500, text=0, encoder_patches=(4501,), encoder_layers=(0,), decoder_layers=(),
    )  # fmt: skip
    # Eight go in the first round, two in the second.
    assert method.flops(work) == 2 * 16 * (4501 + 2250 * 2250 + 2246 * 2246)
