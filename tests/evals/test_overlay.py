"""The picture of `vtprune ask`: which patches are gone from which decoder layer on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vtprune
from tests.models import ROWS, make, prompt
from vtprune.evals.ask.depth import depth_plot, gone_at, layer_colours
from vtprune.evals.ask.overlay import compare, draw_kept
from vtprune.report.report import ImageReport, MergeReport

CELL = 48
WHITE = (255, 255, 255)


def _image(kept: list[list[int]], merged: list[MergeReport] | None = None) -> ImageReport:
    return ImageReport((1, 2, 3), 6, kept[0], kept, merged or [])


def _colours(picture: Image.Image) -> list[Any]:
    """The colour in the middle of each of the six patches."""
    return [picture.getpixel((CELL * column + 24, CELL * row + 24)) for row in range(2) for column in range(3)]


def test_a_patch_is_gone_from_the_first_layer_without_it() -> None:
    report = _image([[0, 1, 2, 3, 4], [0, 1, 2], [0, 1, 2], [0, 1]])
    assert gone_at(report).tolist() == [4, 4, 3, 1, 1, 0]
    assert gone_at(ImageReport((1, 1, 3), 3, [1], [], [])).tolist() == [0, 1, 0]


def test_later_layers_are_lighter_and_drops_before_the_decoder_have_no_colour() -> None:
    colours = layer_colours(_image([[0, 1, 2, 3, 4], [0, 1, 2], [0, 1, 2], [0, 1]]))
    assert list(colours) == [1, 3]
    assert sum(colours[1]) < sum(colours[3])
    assert layer_colours(_image([[0, 1], [0, 1]])) == {}
    many = [list(range(1000 - layer)) for layer in range(40)]
    shades = layer_colours(ImageReport((1, 25, 40), 1000, many[0], many, []))
    assert list(shades) == list(range(1, 40))
    assert len(set(shades.values())) == 39
    light = [0.2126 * red + 0.7152 * green + 0.0722 * blue for red, green, blue in shades.values()]
    assert light == sorted(light)


def test_patches_take_the_colour_of_their_layer_and_kept_ones_stay_as_they_are() -> None:
    report = _image([[0, 1, 2, 3, 4], [0, 1, 2], [0, 1, 2], [0, 1]])
    picture = draw_kept(Image.new("RGB", (3, 2), "white"), report)
    assert picture.size == (3 * CELL, 2 * CELL)
    kept, also, third, first, second, dimmed = _colours(picture)
    assert kept == also == WHITE
    assert first == second
    colours = layer_colours(report)
    for found, layer in ((first, 1), (third, 3)):
        assert np.allclose(found, 0.28 * 255 + 0.72 * np.array(colours[layer]), atol=1)
    assert dimmed[0] == dimmed[1] == dimmed[2] < 60


def test_a_gone_patch_carries_the_number_of_its_layer() -> None:
    report = _image([[0, 1, 2, 3, 4, 5], [0, 1, 2]])
    cells = np.asarray(draw_kept(Image.new("RGB", (3, 2), "white"), report))
    corner = cells[CELL : CELL + 20, :20].reshape(-1, 3)
    assert len(np.unique(corner, axis=0)) > 1
    assert len(np.unique(cells[:CELL].reshape(-1, 3), axis=0)) == 1


def test_merged_patches_share_one_tint_wherever_they_go() -> None:
    merge = MergeReport(into=0, members=[0, 4], weights=[0.5, 0.5], layer=0)
    report = _image([[0, 1, 2, 3], [0, 1], [1]], [merge])
    into, kept, second, third, member, dimmed = _colours(draw_kept(Image.new("RGB", (3, 2), "white"), report))
    assert kept == WHITE
    assert second == third != dimmed
    assert into == member
    assert into[0] > into[1] == into[2]  # the first tint is red


@pytest.mark.parametrize("pruner", [vtprune.FastV(keep=0.5), vtprune.FlowCut(keep=8), vtprune.Pool(keep=0.25)])
@pytest.mark.parametrize("size", [(24, 24), (600, 20), (5, 400)])
def test_the_plot_stands_below_the_pictures(pruner: Any, size: tuple[int, int]) -> None:
    model = vtprune.wrap(make("llava-clip"), pruner)
    with torch.no_grad():
        model(**prompt("llava-clip", ROWS["llava-clip"][:1]))
    report = vtprune.report(model)
    plot = depth_plot(report, 720)
    picture = compare(Image.new("RGB", size, "grey"), report)
    assert plot.width == 720 <= picture.width
    assert picture.height > plot.height + 6 * CELL
    assert np.asarray(picture)[-plot.height // 2 :].std() > 0


def test_methods_that_drop_nothing_inside_the_decoder_need_no_key() -> None:
    heights = []
    for pruner in (vtprune.FastV(keep=0.5), vtprune.FlowCut(keep=8)):
        model = vtprune.wrap(make("llava-clip"), pruner)
        with torch.no_grad():
            model(**prompt("llava-clip", ROWS["llava-clip"][:1]), use_cache=pruner.name == "fastv")
        heights.append(depth_plot(vtprune.report(model), 720).height)
    assert heights[0] > heights[1]
