"""VTW: all vision tokens leave before one decoder layer."""

from __future__ import annotations

import pytest
import torch

import vtprune
from tests.matrix import at_depth
from tests.models import ROWS, Row, make, prompt

KIND = "llava-clip"


@pytest.mark.parametrize(("depth", "keep", "first"), [(32, None, 16), (40, None, 20), (32, 0.25, 8), (6, 0.4, 2)])
def test_the_share_of_layers_that_see_the_image_is_what_is_kept(depth: int, keep: float | None, first: int) -> None:
    vtw = at_depth(vtprune.VTW(keep=keep), depth)
    assert vtw.first_without(576, 576) == first
    assert [vtw.drop_budget(576, layer, 576) for layer in (first - 2, first - 1)] == [576, 0]


def test_a_count_is_a_mean_over_layers_of_what_entered() -> None:
    vtw = at_depth(vtprune.VTW(keep=64), 32)
    assert vtw.first_without(576, 576) == 3  # three layers of 576 are a mean of 54, four of 72
    assert vtw.first_without(576, 128) == 16
    assert vtw.first_without(576, 64) == 32
    with pytest.raises(vtprune.VTPruneError, match="one layer of 32 with 4096 tokens is above a mean of 64"):
        vtw.first_without(4096, 4096)


def test_layers_behind_compute_and_cache_text_alone() -> None:
    model = vtprune.wrap(make(KIND), vtprune.VTW(layer=2))
    inputs = prompt(KIND, ROWS[KIND])
    with torch.no_grad():
        model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    report = vtprune.report(model)
    images = [image for sample in report.samples for image in sample.images]
    for image in images:
        counts = [len(kept) for kept in image.kept_per_layer]
        assert counts == [image.tokens] * 2 + [0] * (len(counts) - 2)
    text = [int(row.sum()) - sum(image.tokens for image in sample.images) + 2
            for row, sample in zip(inputs["attention_mask"], report.samples, strict=True)]  # fmt: skip
    assert report.kv_tokens_per_layer[-1] == text
    assert all(rows == [0] * len(text) for rows in report.tokens_per_layer[2:])


def test_a_prompt_that_ends_with_an_image_that_left_says_where_its_answer_starts() -> None:
    model = vtprune.wrap(make(KIND), vtprune.VTW(layer=2))
    with torch.no_grad():
        model(**prompt(KIND, [Row([5, 0], ROWS[KIND][0].grids, seed=1)]))
    (note,) = vtprune.report(model).samples[0].images[0].notes
    assert note == "the prompt ends with this image, which left: the answer starts from the text before it"


@pytest.mark.parametrize("rows", [[Row([0, 0], [(6, 6)])], [Row([0, 0], [(6, 6)]), Row([2, 4], [(6, 6)])]])
def test_a_row_that_is_an_image_and_no_text_is_refused_by_name(rows: list[Row]) -> None:
    model, inputs = make(KIND), prompt(KIND, rows)
    with torch.no_grad():
        expected = model(**inputs).logits
        vtprune.wrap(model, vtprune.VTW(layer=2))
        with pytest.raises(vtprune.VTPruneError, match=r"vtw takes the whole image out, and row 0 .* give it text"):
            model(**inputs)
        # What it left behind disturbs nothing.
        assert torch.equal(vtprune.unwrap(model)(**inputs).logits, expected)


def test_the_image_may_leave_behind_another_method_and_before_one_that_cuts_caches() -> None:
    model = vtprune.wrap(make(KIND), [vtprune.Grid(keep=9), vtprune.VTW(layer=3), vtprune.D2O(keep=4)])
    with torch.no_grad():
        model.generate(**prompt(KIND, ROWS[KIND]), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    counts = vtprune.report(model).samples[0].images[0].kept_per_layer
    assert [len(kept) for kept in counts[:4]] == [9, 9, 9, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 40}, "vtw: layer=40, but the decoder has"),
        ({"layer": 0}, "layer"),
        ({"layer": 2, "keep": 0.5}, "layer=2 decides how much is kept, so keep=0.5 contradicts it"),
        ({"keep": 0.01}, "the first of .* layers alone is .* of the mean, and keep=0.01 is below it"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(vtprune.VTPruneError, match=message):
        vtprune.wrap(make(KIND), "vtw", **options)


def test_nothing_may_be_selected_between_layers_alone() -> None:
    nothing = vtprune.Selection.nothing(torch.ones(4))
    nothing.check(4)
    with pytest.raises(vtprune.VTPruneError, match="keeps at least one token of 4"):
        vtprune.Selection(torch.empty(0, dtype=torch.long)).check(4)
