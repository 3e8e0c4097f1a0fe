"""Renumbered positions where caches are cut after the prompt: one rule for every layer, whoever else is in the batch.

At each decoder layer a prompt's tokens are numbered without gaps, and a later token by how many tokens of its row the
layer's cache holds.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtprune
from tests.matrix import Drops, label
from tests.models import ROWS, make, prompt
from tests.oracle import TOLERANCE, compare, feed, image_features, next_tokens, run_masked, run_wrapped
from vtprune.cache.names import SHIFT
from vtprune.method.pruner import Pruner

CUT: list[Pruner] = [
    Drops(layers=(1, 3), cut=(0, 1, 3)),
    Drops(layers=(2,), cut=(0, 1, 2)),
    vtprune.MustDrop(keep=0.4, merge=False),
    vtprune.MustDrop(keep=0.4),
    vtprune.MustDrop(merge=False, global_threshold=0.03, individual_threshold=0.2),
    vtprune.MustDrop(variant="released", merge_threshold=0.05, global_threshold=0.03, individual_threshold=0.2),
    vtprune.MustDrop(variant="released", keep=0.4, cut_cache=False),
]
LLAVA = ["llava-clip", pytest.param("llava-siglip", marks=pytest.mark.slow)]


def _wrap(kind: str, pruner: Pruner) -> Any:
    return vtprune.wrap(make(kind), pruner, positions="original" if pruner.renumbers else "compact")


@pytest.mark.parametrize("rows", [[2], [0, 1, 2]], ids=["two images", "batch"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("pruner", CUT, ids=label)
@pytest.mark.parametrize("kind", LLAVA)
def test_later_tokens_are_numbered_by_what_each_layers_cache_holds(
    kind: str, pruner: Pruner, padding: str, rows: list[int]
) -> None:
    inputs = prompt(kind, [ROWS[kind][row] for row in rows], padding)
    model = _wrap(kind, pruner)
    logits, report, _ = run_wrapped(kind, model, inputs)
    features = image_features(model, inputs)
    expected = run_masked(kind, vtprune.unwrap(model), inputs, report, features, compact=True)
    assert compare(logits, expected, inputs) < TOLERANCE


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("pruner", [*CUT[:-2], vtprune.D2O(keep=0.3)], ids=label)
@pytest.mark.parametrize("kind", LLAVA)
def test_a_row_whose_neighbour_lost_tokens_is_numbered_as_alone(kind: str, pruner: Pruner, padding: str) -> None:
    model = _wrap(kind, pruner)
    together, report, _ = run_wrapped(kind, model, prompt(kind, ROWS[kind], padding))
    tokens = next_tokens(len(ROWS[kind])).tolist()
    for index, row in enumerate(ROWS[kind]):
        with torch.no_grad():
            cache = model(**prompt(kind, [row])).past_key_values
        assert vtprune.report(cache).samples[0].images == report.samples[index].images
        alone = feed(model, cache, tokens[index])[0]
        assert float((together[index, -len(alone) :] - alone).abs().max()) < TOLERANCE


@pytest.mark.parametrize("pruner", CUT[:3], ids=label)
def test_a_cropped_cache_numbers_as_if_the_cropped_tokens_had_never_come(pruner: Pruner) -> None:
    inputs = prompt("llava-clip", ROWS["llava-clip"][:1])
    model = _wrap("llava-clip", pruner)
    with torch.no_grad():
        fresh, cropped = model(**inputs).past_key_values, model(**inputs).past_key_values
        feed(model, cropped, [5, 6])
        cropped.crop(-2)
        assert torch.equal(feed(model, cropped, [7, 8]), feed(model, fresh, [7, 8]))
        # Into the prompt, behind the image: one token fewer stands before the next.
        fresh.crop(-3)
    for layer in fresh.layers:
        shift = layer.at_end(SHIFT)
        assert layer.length - (0 if shift is None else int(shift)) == layer.keys.shape[2]


def test_a_released_stage_that_renumbers_is_refused_beside_tokens_that_return() -> None:
    model = make("llava-clip")
    stages = [vtprune.DivPrune(keep=0.5, variant="released"), vtprune.LazyLLM(keep=0.4)]
    with pytest.raises(vtprune.VTPruneError, match=r"variant='released' of divprune numbers .* lazyllm .* return"):
        vtprune.wrap(model, stages)
    # On M-RoPE models released code keeps positions, so nothing is in the way.
    vtprune.wrap(make("qwen2.5-vl"), stages)
    with pytest.raises(vtprune.VTPruneError, match="not wrapped"):
        vtprune.unwrap(model)


def test_a_stage_that_does_nothing_hides_no_setting_that_cannot_be_met() -> None:
    for pruner in (vtprune.FastV(keep=0.1), vtprune.GammaMoD(keep=0.2)):
        with pytest.raises(vtprune.VTPruneError, match="cannot keep"):
            vtprune.wrap(make("llava-clip"), [vtprune.NoPruning(), pruner])
