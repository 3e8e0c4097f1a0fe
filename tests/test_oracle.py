"""What the oracle is worth, and positions that are numbered anew; that dropping equals masking, whatever is shown, is
the matrix of `tests/test_support.py`."""

from __future__ import annotations

import pytest

import vtprune
from tests.matrix import DROPS, PRUNERS, RELEASED, label
from tests.models import MODELS, ROWS, make, prompt
from tests.oracle import TOLERANCE, compare, image_features, run_masked, run_wrapped
from vtprune.method.pruner import Pruner

BATCHES = {"alone": ([0], "left"), "ragged-left": ([0, 1, 2], "left"), "ragged-right": ([0, 1, 2], "right")}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("pruner", RELEASED + DROPS[-1:] + PRUNERS[1:2], ids=label)
@pytest.mark.parametrize("kind", ["llava-clip", "llava-siglip"])
def test_renumbered_positions_have_no_gaps_at_any_layer(kind: str, pruner: Pruner, batch: str) -> None:
    rows, padding = BATCHES[batch]
    inputs = prompt(kind, [ROWS[kind][row] for row in rows], padding)
    model = make(kind)
    options = {} if pruner.renumbers else {"positions": "compact"}
    vtprune.wrap(model, pruner, **options)
    logits, report, _ = run_wrapped(kind, model, inputs)
    features = image_features(model, inputs)
    vtprune.unwrap(model)
    expected = run_masked(kind, model, inputs, report, features, compact=True)
    assert compare(logits, expected, inputs) < TOLERANCE


@pytest.mark.parametrize("pruner", RELEASED, ids=label)
def test_released_variants_keep_m_rope_positions(pruner: Pruner) -> None:
    kind = "qwen2.5-vl"
    inputs = prompt(kind, ROWS[kind])
    model = vtprune.wrap(make(kind), pruner)
    logits, report, _ = run_wrapped(kind, model, inputs)
    features = image_features(model, inputs)
    expected = run_masked(kind, vtprune.unwrap(model), inputs, report, features)
    assert compare(logits, expected, inputs) < TOLERANCE


@pytest.mark.parametrize("kind", MODELS)
def test_the_oracle_notices_a_wrong_selection(kind: str) -> None:
    inputs = prompt(kind, ROWS[kind])
    model = make(kind)
    vtprune.wrap(model, vtprune.Random(keep=9))
    logits, report, _ = run_wrapped(kind, model, inputs)
    vtprune.unwrap(model)
    image = report.samples[0].images[0]
    for kept in image.kept_per_layer:
        kept[0] = next(token for token in range(image.tokens) if token not in kept)
    assert compare(logits, run_masked(kind, model, inputs, report), inputs) > 100 * TOLERANCE
