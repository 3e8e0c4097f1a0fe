"""The attention that a token of an encoder layer gets, where images differ in length or not all of one is seen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import vtprune
from tests.layers import batch_layer, image_states, naive_saliency
from tests.models import CROPPED, make, prompt
from vtprune.method.views import EncoderLayer
from vtprune.pruners import visionzip
from vtprune.pruners.parts.patches import saliency

LAYOUTS = [(1, 1), (0, 1), (0, 4)]


@pytest.mark.parametrize(("prefix", "group"), LAYOUTS)
def test_each_image_is_scored_without_the_padding_behind_it(prefix: int, group: int) -> None:
    images = [image_states(n, prefix=prefix, group=group, seed=n) for n in (12, 9, 12)]
    found = saliency(batch_layer(images, [4, 4, 4], prefix=prefix, group=group))
    for row, image in enumerate(images):
        expected = naive_saliency(image, prefix=prefix, group=group)
        torch.testing.assert_close(found[row, : len(expected)], expected)
        assert not found[row, len(expected) :].any()


@pytest.mark.parametrize(("prefix", "group"), LAYOUTS)
def test_what_the_decoder_never_sees_gives_and_gets_attention_and_counts_nothing(prefix: int, group: int) -> None:
    images = [image_states(n, prefix=prefix, group=group, seed=n) for n in (12, 9)]
    layer = batch_layer(images, [4, 4], prefix=prefix, group=group)
    seen = layer.valid.clone()
    seen[0, [0, 1, 4, 5, 8, 9]] = False
    found = saliency(replace(layer, valid=seen, alive=(6, 9), columns=(12, 9), unseen=(6, 0)))
    for row, image in enumerate(images):
        expected = naive_saliency(image, prefix=prefix, group=group)
        torch.testing.assert_close(found[row, : len(expected)], expected.where(seen[row, : len(expected)], 0))


def test_a_crop_that_is_padded_around_its_picture_shows_all_its_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[EncoderLayer, Tensor]] = []

    def watched(layer: EncoderLayer) -> Tensor:
        seen.append((layer, saliency(layer)))
        return seen[-1][1]

    monkeypatch.setattr(visionzip, "saliency", watched)
    model = vtprune.wrap(make("llava-next"), "visionzip", keep=0.3)
    with torch.no_grad():
        model(**prompt("llava-next", CROPPED[:1]))
    ((layer, found),) = seen
    assert any(layer.unseen)
    assert set(layer.columns) == {36}
    for row in range(len(found)):
        image = torch.stack([layer.query[row], layer.key[row], layer.value[row]])
        expected = naive_saliency(image, prefix=1, group=1, scale=layer.scale)
        torch.testing.assert_close(found[row], expected.where(layer.valid[row], 0))


@pytest.mark.parametrize("method", ["tome:r=3", "turbo:r=3"])
def test_rates_are_of_each_crop_by_itself(method: str) -> None:
    model = vtprune.wrap(make("llava-next"), method)
    with torch.no_grad():
        model(**prompt("llava-next", CROPPED[:1]))
    (image,) = vtprune.report(model).samples[0].images
    # Five crops, in five layers of the tower.
    assert (image.tokens, len(image.kept)) == (132, 132 - 5 * 5 * 3)
