"""MuE: which images stop after which layer, that text goes on reading them, and what it costs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

import vtprune
from tests.flop_helper import measured_flops
from tests.models import DECODER_LAYERS, IMAGE, ROWS, make, prompt
from vtprune.pruners import MuE
from vtprune.pruners.mue import image_cosines

KIND = "qwen2.5-vl"


def depths(model: Any, inputs: dict[str, Tensor]) -> list[int]:
    """How many layers each image ran through, by the report."""
    with torch.no_grad():
        model(**inputs)
    images = [image for sample in vtprune.report(model).samples for image in sample.images]
    ran = [[len(kept) for kept in image.kept_per_layer] for image in images]
    assert all(set(counts) <= {0, image.tokens} for counts, image in zip(ran, images, strict=True))
    assert all(counts == sorted(counts, reverse=True) for counts in ran)
    return [sum(count > 0 for count in counts) for counts in ran]


def cosines_by_hand(inputs: dict[str, Tensor]) -> list[list[float]]:
    """By image, the cosine of each decoder layer of the unpruned model."""
    with torch.no_grad():
        states = make(KIND).model(**inputs, output_hidden_states=True).hidden_states
    found = []
    for row, ids in enumerate(inputs["input_ids"]):
        places = (ids == IMAGE).nonzero().flatten()
        for own in places.tensor_split((places.diff() > 1).nonzero().flatten() + 1):
            pairs = itertools.pairwise(states[:-1])
            found.append(
                [float(cosine_similarity(a[row, own].flatten(), b[row, own].flatten(), dim=0)) for a, b in pairs]
            )
    return found


def test_an_image_stops_after_the_first_layer_that_hardly_turns_it() -> None:
    inputs = prompt(KIND, ROWS[KIND])
    by_hand = cosines_by_hand(inputs)
    different = set()
    for theta in (0.4, 0.8, 0.83, 0.87, 0.9):
        expected = [next((n for n, cosine in enumerate(own, 1) if cosine > theta), DECODER_LAYERS) for own in by_hand]
        assert depths(vtprune.wrap(make(KIND), MuE(theta=theta)), inputs) == expected
        different |= set(expected)
    assert len(different) >= 3


def test_images_stop_later_where_theta_is_higher() -> None:
    inputs = prompt(KIND, ROWS[KIND])
    found = [depths(vtprune.wrap(make(KIND), MuE(theta=theta)), inputs) for theta in (-1, 0.5, 0.8, 0.85, 0.9, 1)]
    assert all(low <= high for one, two in itertools.pairwise(found) for low, high in zip(one, two, strict=True))
    assert set(found[0]) == {1}
    assert set(found[-1]) == {DECODER_LAYERS}


def test_cosines_take_an_image_as_one_vector_and_leave_text_out() -> None:
    states, before = torch.randn(2, 7, 4).unbind()[0][None].expand(1, 7, 4), torch.randn(1, 7, 4)
    image = torch.tensor([[-1, 0, 0, 0, -1, 1, 1]])
    found = image_cosines(states, before, image, 3)
    expected = [
        cosine_similarity(states[0, a:b].flatten(), before[0, a:b].flatten(), dim=0) for a, b in ((1, 4), (5, 7))
    ]
    torch.testing.assert_close(found[0, :2], torch.stack(expected))
    assert float(found[0, 2]) == 0
    torch.testing.assert_close(image_cosines(states, states, image, 2), torch.ones(1, 2))


@pytest.mark.parametrize("keep", [0.4, 0.5, 0.79, 1.0, 20])
def test_a_keep_stops_every_image_after_the_last_layer_that_the_mean_has_room_for(keep: int | float) -> None:
    inputs = prompt(KIND, ROWS[KIND])
    model = vtprune.wrap(make(KIND), MuE(keep=keep))
    with torch.no_grad():
        model(**inputs)
    for sample in vtprune.report(model).samples:
        for image in sample.images:
            most = min(keep, image.tokens) if isinstance(keep, int) else round(keep * image.tokens)
            ran = sum(bool(kept) for kept in image.kept_per_layer)
            assert image.achieved_tokens <= most < (ran + 1) * image.tokens / DECODER_LAYERS
            assert not image.kept_whole


def test_an_image_that_even_one_layer_exceeds_is_kept_whole() -> None:
    model = vtprune.wrap(make(KIND), MuE(keep=2))
    with torch.no_grad():
        model(**prompt(KIND, ROWS[KIND][:1]))
    (image,) = vtprune.report(model).samples[0].images
    assert image.achieved_tokens == image.tokens
    assert "the first of 5 layers computes all" in image.kept_whole


def test_flops_are_those_of_a_hand_count_and_of_torch() -> None:
    inputs = prompt("llava-clip", ROWS["llava-clip"][:1])
    model = vtprune.wrap(make("llava-clip"), MuE(theta=-1))
    measured = measured_flops(model, inputs)
    report = vtprune.report(model)
    config = model.config.text_config
    d, m, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    image, text = 36, report.samples[0].text_tokens

    def layer(n: int) -> int:
        return 2 * n * (2 * d * d + 2 * d * kv + 3 * d * m) + 4 * d * n * n

    saving = layer(image + text) - layer(text) - 4 * d * kv * image - 4 * d * text * image
    assert report.flops == measured == report.flops_full - (DECODER_LAYERS - 1) * saving
    assert report.kv_bytes == report.kv_bytes_full


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"theta": "high"}, "theta is a cosine"),
        ({"theta": 1.01}, "theta is a cosine"),
        ({"theta": True}, "theta is a cosine"),
        ({"theta": 0.9, "keep": 0.5}, "contradict each other"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(vtprune.VTPruneError, match=message):
        MuE(**options)


def test_states_that_are_not_numbers_are_refused() -> None:
    model = vtprune.wrap(make(KIND), MuE(theta=0.9))
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.down_proj.weight.fill_(float("nan"))
        with pytest.raises(vtprune.ScoreError, match="mue"):
            model(**prompt(KIND, ROWS[KIND]))
