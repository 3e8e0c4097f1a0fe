"""Decoders with linear attention in most layers: dropping is deleting there, and all other properties hold."""

from __future__ import annotations

import pytest
import torch

import vtprune
from tests import test_properties as properties
from tests.deleted import run_deleted
from tests.flop_helper import counter
from tests.matrix import DROPS, GATED, PRUNERS, label
from tests.models import HYBRID_ATTENTION, HYBRID_DEPTH, HYBRIDS, ROWS, make, prompt
from tests.oracle import TOLERANCE, compare, image_features, run_wrapped
from vtprune.adapters import adapter_for
from vtprune.errors import UnsupportedModelError
from vtprune.method.pruner import Pruner
from vtprune.method.stages import InLayers
from vtprune.report.generation import acts_at

# Every method and these decoders meet in tests/test_support.py: here one of each place to act is enough.
pytestmark = pytest.mark.lean(by="stages")

# What the list of all models has with layers, schedules and methods that these decoders have no place for, and why.
REFUSED: dict[str, tuple[list[Pruner], str]] = {
    "tokens return": ([one for one in PRUNERS if one.name == "lazyllm"][:2], "lets tokens return"),
    "routed layers": (
        [
            *[one for one in PRUNERS if isinstance(one, InLayers) and one.name != "yopo"],
            *GATED,
            vtprune.YOPO(mlp=1, variant="released"),
        ],
        "skip decoder layers",
    ),
    "less attention": (
        [vtprune.YOPO(mlp=2), vtprune.YOPO(mlp=1, window=3)],
        "narrows the attention of decoder layers",
    ),
    "every layer": ([vtprune.FastV(keep=0.4, schedule="linear")], "schedule 'linear' ranks tokens before every"),
    "layers before which tokens drop": ([vtprune.FastV(layers=(3,))], "fastv .*: layers may hold 2, 5, got 3"),
    "by the next layer": (
        [vtprune.PyramidDrop(keep=0.5, schedule="entropy", layers=(1, 2, 4))],
        "pyramid_drop .*: layers may hold 1, 4, 6, got 2",
    ),
    "layers after which tokens drop": ([vtprune.MustDrop(layers=(1, 3))], "mustdrop .*: layers may hold 1, 4, got 3"),
    "a probe": ([vtprune.GemFilter(layer=3)], "gemfilter .*: layer may hold 1, 4, 6, got 3"),
    "a guide": ([vtprune.CoViPAL(stage="guide", guide=2)], "covipal .*: guide may hold 1, 4, 6, got 2"),
}
NAMES = {type(one) for reason in ("tokens return", "routed layers") for one in REFUSED[reason][0]}


def _has_a_place(pruner: Pruner) -> bool:
    """Whether one of the list of all models acts here as it stands."""
    layers, schedule = getattr(pruner, "layers", None), getattr(pruner, "schedule", None)
    return (type(pruner) not in NAMES or pruner.name == "yopo") and schedule != "linear" and layers is None


SUPPORTED: list[Pruner] = [
    *filter(_has_a_place, PRUNERS),
    vtprune.FastV(keep=0.4, schedule="steps", layers=(2, 5)),
    vtprune.PyramidDrop(keep=0.5, schedule="entropy", layers=(1, 4)),
    vtprune.MustDrop(keep=0.5, layers=(4,)),
]
BATCHES = {"alone": [0], "ragged": [0, 1, 2]}
every_model = pytest.mark.parametrize("kind", HYBRIDS)
every_pruner = pytest.mark.parametrize("pruner", DROPS[-1:] + SUPPORTED, ids=label)
every_attention = pytest.mark.parametrize("attention", ["sdpa", "eager"])


# Of the list of all models `tests/test_support.py` shows the same; here are settings of these decoders' own, too.
@pytest.mark.slow
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("pruner", DROPS + SUPPORTED[:-3], ids=label)
@every_attention
@every_model
def test_dropping_equals_deleting_in_prefill_and_decode(kind: str, attention: str, pruner: Pruner, batch: str) -> None:
    inputs = prompt(kind, [ROWS[kind][row] for row in BATCHES[batch]])
    model = vtprune.wrap(make(kind, attention), pruner)
    logits, report, _ = run_wrapped(kind, model, inputs)
    features = image_features(model, inputs)
    expected = run_deleted(kind, vtprune.unwrap(model), inputs, report, features)
    assert compare(logits, expected, inputs) < TOLERANCE


@pytest.mark.parametrize("pruner", SUPPORTED[-3:], ids=label)
@every_model
def test_layers_that_are_given_drop_exactly(kind: str, pruner: Pruner) -> None:
    test_dropping_equals_deleting_in_prefill_and_decode(kind, "sdpa", pruner, "ragged")


@every_model
def test_the_oracle_notices_a_wrong_selection(kind: str) -> None:
    inputs = prompt(kind, ROWS[kind])
    model = vtprune.wrap(make(kind), vtprune.Random(keep=9))
    logits, report, _ = run_wrapped(kind, model, inputs)
    image = report.samples[0].images[0]
    for kept in image.kept_per_layer:
        kept[0] = next(token for token in range(image.tokens) if token not in kept)
    assert compare(logits, run_deleted(kind, vtprune.unwrap(model), inputs, report), inputs) > 50 * TOLERANCE


@every_model
@every_attention
@pytest.mark.parametrize("pruner", SUPPORTED, ids=label)
def test_keeping_everything_is_the_unpruned_model_bit_for_bit(kind: str, attention: str, pruner: Pruner) -> None:
    whole = properties._whole(pruner)
    properties.test_keeping_everything_is_the_unpruned_model_bit_for_bit(kind, attention, whole)


@every_model
@every_pruner
def test_a_ragged_batch_equals_each_row_alone(kind: str, pruner: Pruner) -> None:
    properties.test_a_ragged_batch_equals_each_row_alone(kind, pruner)


@every_model
@every_pruner
def test_sdpa_and_eager_keep_the_same_tokens_and_agree(kind: str, pruner: Pruner) -> None:
    properties.test_sdpa_and_eager_keep_the_same_tokens_and_agree(kind, pruner)


@every_model
@every_pruner
def test_unwrap_leaves_nothing_behind(kind: str, pruner: Pruner) -> None:
    properties.test_unwrap_leaves_nothing_behind(kind, pruner)


@every_model
@every_pruner
def test_a_prompt_without_images_is_left_alone(kind: str, pruner: Pruner) -> None:
    properties.test_a_prompt_without_images_is_left_alone(kind, pruner)


@pytest.mark.parametrize("reason", REFUSED)
@every_model
def test_what_such_a_decoder_has_no_place_for_is_refused_by_name(kind: str, reason: str) -> None:
    pruners, says = REFUSED[reason]
    model = make(kind)
    for pruner in pruners:
        with pytest.raises(UnsupportedModelError, match=says) as found:
            vtprune.wrap(model, pruner)
        assert pruner.name in str(found.value)


@pytest.mark.parametrize(
    ("pruner", "where"),
    [
        (vtprune.FastV(), "after decoder layer 1"),
        (vtprune.PyramidDrop(), "after decoder layers 3, 5"),
        (vtprune.SparseVLM(), "after decoder layers 1, 4"),
        (vtprune.FlowCut(keep=8, stages=2), "encoder; after decoder layer 1"),
        (vtprune.MustDrop(merge=False), "before decoder; after decoder layers 1, 4"),
        (vtprune.GemFilter(keep=9), "before decoder, by decoder layer 4"),
        # Reads no attention of the decoder.
        (vtprune.VFlowOpt(keep=0.25), "before decoder; after decoder layers 1, 3"),
    ],
    ids=lambda value: value if isinstance(value, str) else label(value),
)
def test_published_layers_move_on_to_the_next_one_with_attention(pruner: Pruner, where: str) -> None:
    assert acts_at(pruner.bind(adapter_for(make("qwen3.5")).facts()), []) == where


COUNTED = [vtprune.Random(keep=9), *SUPPORTED[-3:-1], vtprune.VisionZip(keep=0.25)]


@every_attention
@pytest.mark.parametrize("pruner", COUNTED, ids=label)
@every_model
def test_the_report_counts_what_the_forward_computes_and_the_cache_holds(
    kind: str, pruner: Pruner, attention: str
) -> None:
    model, inputs = make(kind, attention), prompt(kind, ROWS[kind][:1])
    if kind.endswith("moe"):
        # One expert after the other, whose products the counter knows.
        model.set_experts_implementation("eager")
    vtprune.wrap(model, pruner)
    with torch.no_grad(), counter() as count:
        cache = model(**inputs, logits_to_keep=1).past_key_values
    report = vtprune.report(model)
    assert report.flops == pytest.approx(count.get_total_flops(), rel=0.01)
    if pruner.name == "random":
        assert report.flops == count.get_total_flops()
    assert report.flops < report.flops_full
    states = {layer for layer, entries in enumerate(report.kv_tokens_per_layer) if entries == [0]}
    assert states == set(range(HYBRID_DEPTH)) - set(HYBRID_ATTENTION)
    assert all(bool(cached) != (layer in states) for layer, cached in enumerate(_cached(report)))
    real = sum(
        cache.layers[layer].nbytes if layer in states else cache.layers[layer].keys.nbytes * 2
        for layer in range(HYBRID_DEPTH)
    )
    assert report.kv_bytes == report.kv_bytes_allocated == real < report.kv_bytes_full


def _cached(report: vtprune.Report) -> list[list[int]]:
    return report.samples[0].images[0].cached_per_layer


@every_model
def test_bytes_of_a_batch_are_logical_and_allocated(kind: str) -> None:
    model = vtprune.wrap(make(kind), "random:keep=9")
    _, first, cache = run_wrapped(kind, model, prompt(kind, ROWS[kind]))
    now = vtprune.report(cache)
    assert first.kv_bytes == first.kv_bytes_prefill == now.kv_bytes_prefill < now.kv_bytes
    # Eight steps: keys and values of two heads of 16 numbers, in each of three layers, for each of three rows.
    assert now.kv_bytes - first.kv_bytes == 8 * 3 * 3 * 2 * 2 * 16 * 4
    assert now.kv_bytes_full - first.kv_bytes_full == now.kv_bytes - first.kv_bytes
    assert now.kv_bytes_allocated >= now.kv_bytes
