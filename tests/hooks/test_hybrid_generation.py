"""Generation on a decoder with linear attention: its states go with their rows, and what they cannot do is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, Qwen3_5ForConditionalGeneration

import vtprune
from tests.hooks import test_generation as everywhere
from tests.matrix import Drops
from tests.models import HYBRIDS, IMAGE, PAST, ROWS, TEXT, Row, make, prompt
from tests.oracle import TOLERANCE
from vtprune.cache.states import StateLayer
from vtprune.errors import VTPruneError
from vtprune.method.answers import Selection

PRUNER = Drops(encoder=(0, 2), first=True, layers=(0, 2))
SECOND = Row([2, 4], [(4, 5)], seed=8)
every_model = pytest.mark.parametrize("kind", HYBRIDS)
encoded_ahead = pytest.mark.skipif(
    "image" not in Qwen3_5ForConditionalGeneration.input_modalities,
    reason="generate of this release of transformers repeats the patches of this model's images one by one",
)


@every_model
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"num_beams": 3, "num_return_sequences": 2, "do_sample": False}, marks=encoded_ahead, id="beams"),
        pytest.param({"num_return_sequences": 3, "do_sample": True}, marks=encoded_ahead, id="samples"),
        pytest.param({"do_sample": False}, id="greedy"),
    ],
)
def test_decoding_from_the_cache_equals_recomputing_the_prompt(kind: str, options: dict[str, Any]) -> None:
    everywhere.test_decoding_from_the_cache_equals_recomputing_the_prompt(kind, options)


@encoded_ahead
@every_model
def test_a_row_with_beams_is_that_row_alone(kind: str) -> None:
    model = vtprune.wrap(make(kind), PRUNER)
    options = {"num_beams": 2, "do_sample": False, "max_new_tokens": 6, **everywhere.NO_MEDIA}
    together = prompt(kind, ROWS[kind])
    rows = model.generate(**together, **options)[:, together["input_ids"].shape[1] :]
    for row, answer in zip(ROWS[kind], rows, strict=True):
        alone = prompt(kind, [row])
        assert torch.equal(model.generate(**alone, **options)[0, alone["input_ids"].shape[1] :], answer)


@encoded_ahead
@every_model
def test_the_report_has_the_rows_of_the_expanded_batch(kind: str) -> None:
    everywhere.test_the_report_has_the_rows_of_the_expanded_batch(kind)


@every_model
def test_images_that_would_be_repeated_patch_by_patch_are_refused(kind: str) -> None:
    model = vtprune.wrap(make(kind), "none")
    inputs = prompt(kind, ROWS[kind])
    ids, _ = model._expand_inputs_for_generation(expand_size=1, **inputs)
    assert torch.equal(ids, inputs["input_ids"])
    with pytest.raises(VTPruneError, match="would repeat each patch of an image"):
        model._expand_inputs_for_generation(expand_size=2, **inputs)


@every_model
def test_later_turns_continue_the_cache_and_prune_new_images(kind: str) -> None:
    everywhere.test_later_turns_continue_the_cache_and_prune_new_images(kind)


@every_model
def test_interleaved_generations_keep_their_own_state(kind: str) -> None:
    everywhere.test_interleaved_generations_keep_their_own_state(kind)


@every_model
def test_threads_on_one_model_do_not_mix(kind: str) -> None:
    everywhere.test_threads_on_one_model_do_not_mix(kind)


@every_model
def test_a_probe_in_a_later_turn_leaves_the_states_as_they_are(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words, later = prompt(kind, [TEXT]), prompt(kind, [SECOND])
    with torch.no_grad():
        model = vtprune.wrap(make(kind), "gemfilter:keep=5")
        cache = model(**words).past_key_values
        probed = model(**later, **{PAST: cache}).logits
        kept = torch.tensor(vtprune.report(cache).samples[0].images[0].kept)
        # The same choice without a probe.
        monkeypatch.setattr(vtprune.Random, "select", lambda self, stream: Selection(kept))
        model = vtprune.wrap(make(kind), "random:keep=5")
        cache = model(**words).past_key_values
        assert torch.equal(model(**later, **{PAST: cache}).logits, probed)


@pytest.mark.parametrize("fresh", [False, True], ids=["typed", "empty"])
@every_model
def test_any_dynamic_cache_is_adopted(kind: str, fresh: bool) -> None:
    model, inputs = vtprune.wrap(make(kind), PRUNER), prompt(kind, ROWS[kind])
    given = DynamicCache() if fresh else DynamicCache(config=model.config.get_text_config())
    with torch.no_grad():
        expected = model(**inputs)
        actual = model(**inputs, **{PAST: given})
    assert torch.equal(actual.logits, expected.logits)
    kinds = [isinstance(layer, StateLayer) for layer in given.layers]
    assert kinds == [kind == "linear_attention" for kind in model.config.text_config.layer_types]


def test_a_cache_that_the_unwrapped_model_filled_goes_on() -> None:
    kind = "qwen3.5"
    model, inputs, later = make(kind), prompt(kind, [TEXT]), prompt(kind, [SECOND])
    with torch.no_grad():
        cache = model(**inputs).past_key_values
        one, two = copy.deepcopy(cache), copy.deepcopy(cache)
        expected = vtprune.wrap(model, "none")(**later, **{PAST: one}).logits
        vtprune.wrap(vtprune.unwrap(model), "random:keep=9")
        actual = model(**later, **{PAST: two}).logits
    assert not torch.equal(actual, expected)
    assert vtprune.report(two).samples[0].images[0].kept_per_layer[-1] != list(range(20))


@torch.no_grad()
def _feed(model: Any, cache: Any, mask: Tensor) -> Tensor:
    """Logits (B, 3, V) of three steps, one token after the other."""
    logits = []
    for token in (5, 6, 7):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        ids = torch.full((len(mask), 1), token)
        logits.append(model(input_ids=ids, attention_mask=mask, **{PAST: cache}).logits[:, -1])
    return torch.stack(logits, dim=1)


def _filled(kind: str, rows: list[int]) -> tuple[Any, Any, dict[str, Tensor]]:
    model, inputs = vtprune.wrap(make(kind), PRUNER), prompt(kind, [ROWS[kind][row] for row in rows])
    with torch.no_grad():
        return model, model(**inputs).past_key_values, inputs


@every_model
def test_states_go_with_the_rows_of_the_cache(kind: str) -> None:
    model, cache, inputs = _filled(kind, [0, 1, 2])
    mask = inputs["attention_mask"]
    expected = _feed(model, copy.deepcopy(cache), mask)
    order = torch.tensor([2, 0])
    selected = copy.deepcopy(cache)
    selected.batch_select_indices(order)
    assert float((_feed(model, selected, mask[order]) - expected[order]).abs().max()) < TOLERANCE
    reordered = copy.deepcopy(cache)
    reordered.reorder_cache(torch.tensor([1, 0, 1]))
    assert torch.allclose(_feed(model, reordered, mask[[1, 0, 1]]), expected[[1, 0, 1]], atol=TOLERANCE)
    cache.batch_repeat_interleave(2)
    twice = _feed(model, cache, mask.repeat_interleave(2, dim=0))
    assert torch.allclose(twice, expected.repeat_interleave(2, dim=0), atol=TOLERANCE)


@every_model
def test_a_state_has_no_way_back(kind: str) -> None:
    _, cache, _ = _filled(kind, [0])
    length = cache.get_seq_length()
    cache.crop(0)
    with pytest.raises(VTPruneError, match="recurrent states of linear-attention layers"):
        cache.crop(-2)
    assert cache.get_seq_length() == length
    cache.reset()
    assert cache.get_seq_length() == 0
    states = [state for layer in cache.layers if isinstance(layer, StateLayer) for state in layer.held()]
    assert states
    assert not any(bool(state.any()) for state in states)


@every_model
@pytest.mark.parametrize("way", ["prompt_lookup_num_tokens", "assistant_model"])
def test_assisted_decoding_is_refused(kind: str, way: str) -> None:
    model, inputs = vtprune.wrap(make(kind), PRUNER), prompt(kind, ROWS[kind][:1])
    given = {way: 3 if way == "prompt_lookup_num_tokens" else make(kind)}
    # By the model itself, as unwrapped.
    with pytest.raises(ValueError, match="not supported with stateful models"):
        model.generate(**inputs, **given, max_new_tokens=4, do_sample=False)


# ---- padding


@every_model
def test_nothing_follows_a_prompt_that_was_padded_on_the_right(kind: str) -> None:
    inputs = prompt(kind, ROWS[kind], padding="right")
    model = vtprune.wrap(make(kind), "random:keep=9")
    with torch.no_grad():
        right = model(**inputs)
        for row in range(3):
            alone = model(**prompt(kind, ROWS[kind][row : row + 1])).logits[0]
            text = prompt(kind, ROWS[kind][row : row + 1])["input_ids"][0] != IMAGE
            ours = right.logits[row, : len(alone)]
            assert float((ours - alone)[text].abs().max()) < TOLERANCE
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], dim=1)
        with pytest.raises(VTPruneError, match="padded on the right"):
            model(input_ids=torch.full((3, 1), 5), attention_mask=mask, **{PAST: right.past_key_values})


@every_model
def test_padding_between_tokens_is_refused_where_something_is_dropped(kind: str) -> None:
    inputs = prompt(kind, ROWS[kind][:1])
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, 1] = 0
    model = make(kind)
    with torch.no_grad():
        expected = model(**inputs, attention_mask=mask).logits
        assert torch.equal(vtprune.wrap(model, "random:keep=1.0")(**inputs, attention_mask=mask).logits, expected)
        vtprune.wrap(vtprune.unwrap(model), "random:keep=9")
        with pytest.raises(VTPruneError, match="padding stands between tokens of a row"):
            model(**inputs, attention_mask=mask)


@every_model
def test_rows_that_go_on_with_unequal_counts_are_refused(kind: str) -> None:
    model = vtprune.wrap(make(kind), "random:keep=0.5")
    same = Row([2, 4], [(4, 4)], seed=1)
    later = prompt(kind, [Row([2, 4], [(4, 4)], seed=2), Row([2, 12], [(4, 2)], seed=3)])
    with torch.no_grad():
        cache = model(**prompt(kind, [same, same])).past_key_values
        equal = prompt(kind, [Row([2, 4], [(4, 4)], seed=2), Row([3, 3], [(4, 4)], seed=3)])
        assert model(**equal, **{PAST: copy.deepcopy(cache)}).logits.isfinite().all()
        with pytest.raises(VTPruneError, match="left with different numbers of tokens"):
            model(**later, **{PAST: cache})


@every_model
def test_conversations_in_one_row_are_refused(kind: str) -> None:
    one = prompt(kind, ROWS[kind][:1])
    inputs = {name: torch.cat([part, part], dim=0 if name in ("pixel_values", "image_grid_thw") else 1)
              for name, part in one.items()}  # fmt: skip
    length = one["input_ids"].shape[1]
    positions = torch.arange(length).repeat(2).expand(4, 1, -1)
    model = vtprune.wrap(make(kind), "random:keep=5")
    with torch.no_grad(), pytest.raises(VTPruneError, match="packed into one row"):
        model(**inputs, position_ids=positions, use_cache=False)
