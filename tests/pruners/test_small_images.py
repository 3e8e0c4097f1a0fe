"""An image that cannot be cut to its budget is kept whole and said so; it stops neither its batch nor a cache."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import StaticCache

import vtprune
from tests.matrix import label
from tests.models import PAST, Row, make, prompt
from vtprune.method.pruner import Pruner

KIND = "qwen2.5-vl"
ROWS = [Row([3, 7], [(6, 6)], 1), Row([2, 4], [(1, 2)], 2), Row([2, 3], [(1, 1)], 3)]
# With the row whose image is out of reach.
OUT_OF_REACH: list[tuple[Pruner, int]] = [
    (vtprune.FastV(keep=0.3), 1),
    (vtprune.PyramidDrop(keep=0.4), 1),
    (vtprune.PyramidDrop(keep=0.4, schedule="entropy"), 1),
    (vtprune.SparseVLM(keep=0.3), 1),
    (vtprune.SparseVLM(keep=0.4, adaptive_rank=True), 1),
    (vtprune.LazyLLM(keep=0.5), 1),
    (vtprune.GammaMoD(keep=0.5), 1),
    (vtprune.PMoD(keep=0.35), 1),
    (vtprune.FastV(keep=7), 0),
    (vtprune.VFlowOpt(keep=5, first=2.2), 0),
    (vtprune.VFlowOpt(keep=5, first=2.2, variant="released"), 0),
    (vtprune.FoPru(keep=3, strategy="row"), 0),
    (vtprune.Turbo(keep=1, layers=4), 0),
]


@pytest.mark.parametrize(
    ("pruner", "whole"), OUT_OF_REACH, ids=lambda one: label(one) if not isinstance(one, int) else ""
)
def test_an_image_out_of_reach_is_kept_whole_and_its_neighbours_are_pruned(pruner: Pruner, whole: int) -> None:
    model = vtprune.wrap(make(KIND), pruner)
    model.generate(**prompt(KIND, ROWS), max_new_tokens=3, do_sample=False)
    samples = vtprune.report(model).samples
    for row, sample in enumerate(samples):
        image = sample.images[0]
        reasons = [note for note in image.notes if "kept whole" in note]
        assert len(reasons) == (row == whole)
        if reasons:
            assert image.kept_per_layer == [list(range(image.tokens))] * 5
        model.generate(**prompt(KIND, ROWS[row : row + 1]), max_new_tokens=3, do_sample=False)
        assert vtprune.report(model).samples[0].images[0].kept_per_layer == image.kept_per_layer
    # What rounds to everything is no exception to be noted.
    assert samples[2].images[0].tokens == 1


def test_what_is_kept_whole_is_warned_of_once() -> None:
    model = vtprune.wrap(make(KIND), "fastv", keep=7)
    with pytest.warns(vtprune.KeptWholeWarning, match="an image of 36 tokens is kept whole: fastv: "):
        model(**prompt(KIND, ROWS))
    with warnings.catch_warnings():
        warnings.simplefilter("error", vtprune.KeptWholeWarning)
        model(**prompt(KIND, ROWS))
    images = [sample.images[0] for sample in vtprune.report(model).samples]
    assert [bool(image.kept_whole) for image in images] == [True, False, False]


LATE: list[Pruner] = [
    vtprune.FastV(ratio=0.02),
    vtprune.PyramidDrop(factor=0.99),
    vtprune.GammaMoD(skip=0.02),
    vtprune.MustDrop(),
    vtprune.Turbo(keep=0.5),
    vtprune.IARED2(keep=0.3),
    vtprune.Grid(keep=9),
]


@pytest.mark.parametrize("pruner", LATE, ids=label)
def test_a_static_cache_is_refused_where_any_layer_drops_anything(pruner: Pruner) -> None:
    model = vtprune.wrap(make("llava-clip"), pruner)
    cache = StaticCache(model.config.get_text_config(), max_cache_len=80)
    with pytest.raises(vtprune.UnsupportedCacheError, match="a StaticCache cannot hold"), torch.no_grad():
        model(**prompt("llava-clip", ROWS[:1]), **{PAST: cache})
    assert not cache.layers[0].is_initialized


@pytest.mark.parametrize(
    "pruner", [vtprune.SparseVLM(ratio) for ratio in (0.99, 1.0)] + [vtprune.Grid(keep=99)], ids=label
)
def test_a_static_cache_is_taken_where_nothing_is_dropped(pruner: Pruner) -> None:
    inputs, logits = prompt("llava-clip", ROWS[:1]), []
    for model in (make("llava-clip"), vtprune.wrap(make("llava-clip"), pruner)):
        cache = StaticCache(model.config.get_text_config(), max_cache_len=80)
        with torch.no_grad():
            logits.append(model(**inputs, **{PAST: cache}).logits)
    assert torch.equal(*logits)


def test_methods_remember_where_their_mean_rounds_to_everything() -> None:
    model = vtprune.wrap(make(KIND), vtprune.SparseVLM())
    with torch.no_grad():
        model(**prompt(KIND, [Row([3, 7], [(1, 3)], 1), Row([2, 2], [(1, 2)], 2)]))
    assert vtprune.report(model).samples[0].images
