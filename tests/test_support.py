"""Every method on every family and every kind of prompt: what is dropped is what the unpruned model does without.

`make test-all` runs all of it, and writes the support table (`docs/support.md`) from what it saw.
"""

from __future__ import annotations

import pytest
import torch

import vtprune
from tests.matrix import CACHE, DROPS, GATED, PRUNERS, RELEASED, TEMPORAL, label
from tests.models import MODELS, SHOWN, make, prompt, takes
from tests.oracle import TOLERANCE, compare, image_features, run_masked, run_wrapped
from vtprune.method.pruner import Pruner
from vtprune.method.stages import revives

# What heads hold, or gates weigh, is no mask of whole tokens: these have references of their own.
UNMASKED = CACHE + GATED


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("shown", SHOWN)
@pytest.mark.parametrize("pruner", DROPS + PRUNERS + RELEASED + TEMPORAL, ids=label)
@pytest.mark.parametrize("kind", MODELS)
def test_dropping_equals_masking_whatever_is_shown(kind: str, pruner: Pruner, shown: str, padding: str) -> None:
    if not takes(kind, shown):
        pytest.skip("this family takes no videos")
    inputs = prompt(kind, SHOWN[shown], padding)
    model = vtprune.wrap(make(kind), pruner)
    logits, report, cache = run_wrapped(kind, model, inputs)
    features = image_features(model, inputs)
    vtprune.unwrap(model)
    if revives(pruner):
        report = vtprune.report(cache)
    # Released code numbers positions anew where they are 1-D.
    compact = pruner.renumbers and not kind.startswith("qwen")
    expected = run_masked(kind, model, inputs, report, features, compact=compact)
    assert compare(logits, expected, inputs) < TOLERANCE
    for sample in report.samples:
        for image in sample.images:
            assert sum(image.kept_per_part) == len(image.kept)


@pytest.mark.parametrize("shown", SHOWN)
@pytest.mark.parametrize("pruner", UNMASKED, ids=label)
@pytest.mark.parametrize("kind", MODELS)
def test_what_no_mask_describes_is_the_same_in_a_batch_as_alone(kind: str, pruner: Pruner, shown: str) -> None:
    if not takes(kind, shown):
        pytest.skip("this family takes no videos")
    model = vtprune.wrap(make(kind), pruner)
    rows = SHOWN[shown]
    together, _, _ = run_wrapped(kind, model, prompt(kind, rows))
    steps = together.shape[1] - prompt(kind, rows)["input_ids"].shape[1]
    for number, row in enumerate(rows):
        alone, _, _ = run_wrapped(kind, model, prompt(kind, [row]), row=number)
        assert float((alone[0, -steps:] - together[number, -steps:]).abs().max()) < TOLERANCE


@pytest.mark.parametrize("shown", SHOWN)
@pytest.mark.parametrize("pruner", PRUNERS + CACHE + TEMPORAL, ids=label)
@pytest.mark.parametrize("kind", MODELS)
def test_keeping_everything_generates_what_the_unpruned_model_does(kind: str, pruner: Pruner, shown: str) -> None:
    if not takes(kind, shown):
        pytest.skip("this family takes no videos")
    inputs, model = prompt(kind, SHOWN[shown]), make(kind)
    options = {"max_new_tokens": 3, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    expected = model.generate(**inputs, **options).scores
    with vtprune.wrapped(model, pruner.name, keep=1.0):
        actual = model.generate(**inputs, **options).scores
    assert all(map(torch.equal, actual, expected))
