"""SpAtten's cascade of heads: it equals a slow masked reference, and costs what it says."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

import vtprune
from tests.flop_helper import measured_flops
from tests.matrix import at_depth
from tests.models import DECODER_LAYERS, IMAGE, PAST, ROWS, make, prompt, spread
from tests.oracle import TOLERANCE, next_tokens, run_wrapped
from tests.pruners.slow_spatten import slow_cascades
from vtprune.decoder.heads import HeadCascade
from vtprune.pruners import SpAtten
from vtprune.pruners.spatten import HEADS, ramp

# One with as many key-value heads as heads, so that there is a cascade, and one with grouped queries.
KINDS = ("every head", "qwen2.5-vl")
SETTINGS: tuple[dict[str, Any], ...] = (
    {"heads": 0.25},
    {"heads": 0.5, "keep": 0.6},
    {"heads": 0.25, "keep": 1.0},
)


def family(kind: str) -> str:
    return "llava-clip" if kind == "every head" else kind


def load(kind: str, attention: str = "sdpa") -> Any:
    if kind != "every head":
        return make(kind, attention)
    model = copy.deepcopy(every_head())
    model.set_attn_implementation(attention)
    return model


@functools.cache
def every_head() -> Any:
    config = copy.deepcopy(make(family("every head")).config)
    config.text_config.num_key_value_heads = config.text_config.num_attention_heads
    return spread(LlavaForConditionalGeneration(config))


def left(kind: str, share: float) -> list[int]:
    """How many key-value heads each layer has left by hand: 30% of 5 layers, rounded up, have all."""
    heads = 4 if kind == "every head" else 2
    return [max(1, int(heads * ratio + 1e-6)) for ratio in (1, 1, *(1 - (1 - share) * n / 3 for n in (1, 2, 3)))]


def reading(cache: Any, layer: int, row: int, vision: Tensor) -> list[int]:
    """The heads whose values of vision, in the columns (n,), are not 0."""
    values = cache.layers[layer].values[row][:, : len(vision)]
    return values[:, vision].ne(0).any(dim=2).any(dim=1).nonzero().flatten().tolist()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("options", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_both_cascades_are_what_masking_everything_else_gives(
    kind: str, options: dict[str, Any], attention: str
) -> None:
    plain, heads = load(kind, attention), left(kind, options["heads"])
    for place, row in enumerate(ROWS[family(kind)]):
        inputs, later = prompt(family(kind), [row]), next_tokens(place + 1)[place]
        with vtprune.wrapped(load(kind, attention), SpAtten(**options)) as model:
            logits, report, cache = run_wrapped(family(kind), model, inputs, row=place)
        kept = [[image.kept_per_layer[n] for image in report.samples[0].images] for n in range(DECODER_LAYERS)]
        counts = [[len(image) for image in layer] for layer in kept]
        slow = slow_cascades(family(kind), plain, inputs, later, tokens=counts, heads=heads)
        assert kept == slow.kept
        for layer, heads_left in enumerate(slow.reading):
            gone = [set(range(len(first))) - set(now) for first, now in zip(kept[0], kept[layer], strict=True)]
            numbers = [token not in one for one, total in zip(gone, counts[0], strict=True) for token in range(total)]
            alive = inputs["input_ids"][0] != IMAGE
            alive[~alive] = torch.tensor(numbers)
            assert reading(cache, layer, 0, (inputs["input_ids"][0] == IMAGE)[alive]) == heads_left
        text = torch.cat([inputs["input_ids"][0], later]) != IMAGE
        torch.testing.assert_close(logits[0, text], slow.logits[text], atol=TOLERANCE, rtol=1e-4)


@pytest.mark.parametrize("kind", ["every head", "llava-clip", "qwen3-vl"])
def test_each_row_of_a_ragged_batch_has_heads_of_its_own(kind: str) -> None:
    rows = ROWS[family(kind)]
    model, inputs = vtprune.wrap(load(kind), SpAtten(heads=0.25, keep=0.5)), prompt(family(kind), rows)
    together, _, _ = run_wrapped(family(kind), model, inputs)
    real = inputs["attention_mask"].bool()
    for place, row in enumerate(rows):
        alone, _, _ = run_wrapped(family(kind), model, prompt(family(kind), [row]), row=place)
        shown = torch.cat([real[place], real.new_ones(together.shape[1] - real.shape[1])])
        torch.testing.assert_close(together[place, shown][-9:], alone[0][-9:], atol=TOLERANCE, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_share_of_all_heads_is_the_cascade_of_tokens_bit_for_bit(kind: str) -> None:
    inputs, found = prompt(family(kind), ROWS[family(kind)]), []
    for heads in (1.0, None):
        with torch.no_grad(), vtprune.wrapped(load(kind), SpAtten(heads=heads)) as model:
            found.append(model(**inputs).logits)
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_cut_no_head_yet_are_the_models_own_bit_for_bit(kind: str) -> None:
    inputs, model = prompt(family(kind), ROWS[family(kind)]), load(kind)
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True).hidden_states
        found = vtprune.wrap(model, SpAtten(heads=0.25, keep=1.0))(**inputs, output_hidden_states=True).hidden_states
    assert all(torch.equal(*pair) for pair in zip(found[:3], expected[:3], strict=True))
    assert not torch.equal(found[3], expected[3])


def test_scores_cost_the_products_of_the_heads_that_are_left() -> None:
    kind, heads = "every head", left("every head", 0.25)
    with torch.no_grad():
        model = vtprune.wrap(load(kind), SpAtten(heads=0.25, keep=0.6))
        model(**prompt(family(kind), ROWS[family(kind)][:1]))
    report = vtprune.report(model)
    tokens = [row[0] + report.samples[0].text_tokens for row in report.tokens_per_layer]
    expected = sum(2 * tokens[layer] ** 2 * 8 * heads[layer] for layer in range(DECODER_LAYERS - 1))
    assert report.flops_breakdown.scoring == expected


def test_heads_save_what_a_count_by_hand_says() -> None:
    kind = "every head"
    inputs = prompt(family(kind), ROWS[family(kind)][:1])
    vision = int((inputs["input_ids"] == IMAGE).sum())
    text = inputs["input_ids"].shape[1] - vision
    model = vtprune.wrap(load(kind), SpAtten(heads=0.25, keep=1.0))
    measured = measured_flops(model, inputs)
    report = vtprune.report(model)
    # Queries, values and the output of 1, 2 and 3 of 4 heads, 8 wide each, and what vision sees with them.
    saved = sum(2 * vision * cut * 8 * (3 * 32 + 2 * (vision + text)) for cut in (1, 2, 3))
    assert report.flops == report.flops_full - saved == measured


def test_a_head_leaves_by_the_sums_of_all_layers_and_never_comes_back() -> None:
    cascade, pruner = HeadCascade(), at_depth(SpAtten(heads=0.5), 32)
    cascade.narrow(pruner.rank_heads(torch.tensor([[[5.0, 1.0, 2.0, 3.0]], [[0.0, 1.0, 0.0, 4.0]]])), 3)
    assert cascade.left is not None
    assert (cascade.left.reading.tolist(), cascade.left.cut.tolist()) == ([[0, 1, 3]], [[2]])
    cascade.narrow(torch.tensor([[1.0, 1.0, 9.0, 1.0]]), 2)
    assert (cascade.left.reading.tolist(), cascade.left.cut.tolist()) == ([[0, 1]], [[2, 3]])


def test_a_later_turn_has_heads_of_its_own() -> None:
    kind = "llava-clip"
    model = vtprune.wrap(make(kind), SpAtten(heads=0.5, keep=0.6))
    one, two = (prompt(kind, [row]) for row in ROWS[kind][:2])
    for inputs in (one, two):
        inputs.pop("attention_mask", None)
    with torch.no_grad():
        cache = model(**one, use_cache=True).past_key_values
        found = model(**two, **{PAST: cache}, use_cache=True, logits_to_keep=1).logits
    assert not found.isnan().any()
    assert vtprune.report(model).flops < vtprune.report(model).flops_full


def test_gradients_are_the_same_with_checkpoints() -> None:
    inputs, found = prompt("llava-clip", ROWS["llava-clip"]), []
    for checkpoints in (False, True):
        model = vtprune.wrap(load("every head"), SpAtten(heads=0.25, keep=0.6))
        model.train()
        if checkpoints:
            model.gradient_checkpointing_enable()
        model(**inputs, use_cache=False).logits.float().pow(2).mean().backward()
        found.append({name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, atol=1e-6, rtol=1e-4)


def test_shares_of_heads_fall_from_the_paper_s_layer_on_or_as_a_table_says() -> None:
    pruner = at_depth(SpAtten(heads=0.5), 32)
    counts = [pruner.vision_plan(layer).count for layer in range(32)]
    assert counts == [int(ratio * 32 + 1e-6) for ratio in ramp(32, 10, 0.5)]
    assert pruner.planned_layers() == tuple(range(10, 32))
    # The last layer has as many as the one before it, so that nobody has to ask.
    assert (counts[30], counts[31], pruner.watched_layers()) == (16, 16, tuple(range(30)))
    table = at_depth(SpAtten(heads="gpt2_medium"), 24)
    assert [table.vision_plan(layer).count for layer in range(24)] == [
        int(32 * share) for share in HEADS["gpt2_medium"]
    ]
    assert at_depth(SpAtten(), 32).planned_layers() == at_depth(SpAtten(), 32).watched_layers() == ()
    assert at_depth(SpAtten(heads=0.001), 32).vision_plan(31).count == 1


def test_what_cannot_be_is_refused_by_name() -> None:
    for heads in (0, -1, 1.5, "gpt2_small"):
        with pytest.raises(vtprune.VTPruneError, match="spatten: heads is the share of them that read vision"):
            SpAtten(heads=heads)
    with pytest.raises(vtprune.UnsupportedModelError, match="spatten"):
        vtprune.wrap(make("qwen3.5"), SpAtten(heads=0.5, schedule="constant"))
    with pytest.raises(vtprune.VTPruneError, match="spatten changes what decoder layers compute of vision"):
        vtprune.wrap(make("llava-clip"), [SpAtten(heads=0.5), vtprune.D2O(keep=0.2)])


def test_a_row_of_several_conversations_is_refused() -> None:
    one = {name: part[:1] for name, part in prompt("llava-clip", ROWS["llava-clip"][:1]).items()}
    ids, length = one["input_ids"].repeat(1, 2), one["input_ids"].shape[1]
    model = vtprune.wrap(make("llava-clip"), SpAtten(heads=0.5))
    with torch.no_grad(), pytest.raises(vtprune.VTPruneError, match="spatten ranks the heads of a row by its prompt"):
        model(
            input_ids=ids,
            pixel_values=one["pixel_values"].repeat(2, 1, 1, 1),
            position_ids=torch.arange(length).repeat(2)[None],
            use_cache=False,
        )
