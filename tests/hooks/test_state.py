"""Decode state follows the cache through everything that is done to it, and nothing outlives its call."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import vtprune
from tests.matrix import Drops
from tests.models import IMAGE, MODELS, PAST, ROWS, Row, make, prompt, text_positions
from tests.oracle import TOLERANCE, feed
from vtprune.decoder.run import DecoderRun

EVERYWHERE = Drops(encoder=(0, 2), first=True, layers=(0, 2))
every_model = pytest.mark.parametrize("kind", MODELS)
TOKEN = torch.tensor([[7]])


@pytest.mark.parametrize("name", ["none", "random"])
def test_a_padded_text_batch_decodes_at_each_rows_own_positions(name: str) -> None:
    kind = "qwen2.5-vl"
    rows = [Row([9], [], 31), Row([5], [], 32)]
    model = vtprune.wrap(make(kind), name)
    inputs = prompt(kind, rows)
    with torch.no_grad():
        cache = model(**inputs).past_key_values
    together = feed(model, cache, [7, 8], inputs["attention_mask"])
    stock = make(kind)
    with torch.no_grad():
        cache = stock(**inputs).past_key_values
    expected = feed(stock, cache, [7, 8], inputs["attention_mask"])
    assert float((together - expected).abs().max()) < TOLERANCE


@pytest.mark.parametrize(
    ("kind", "positions"), [*((kind, "original") for kind in MODELS), *((kind, "compact") for kind in MODELS[:2])]
)
def test_cropping_below_an_image_gives_the_shorter_prompts_state(kind: str, positions: str) -> None:
    model = vtprune.wrap(make(kind), EVERYWHERE, positions=positions)
    grid = (4, 4) if kind.startswith("qwen") else (6, 6)
    short, long = Row([3, 4], [grid], 5), Row([3, 4, 2], [grid, grid], 5)
    whole, part = prompt(kind, [long]), prompt(kind, [short])
    # The same first text and image stand in both; the text after the image is the shorter prompt's.
    length = part["input_ids"].shape[1]
    whole["input_ids"][:, :length] = part["input_ids"]
    whole["pixel_values"][: part["pixel_values"].shape[0]] = part["pixel_values"]
    with torch.no_grad():
        cache = model(**whole).past_key_values
        cache.crop(length - whole["input_ids"].shape[1])
        fresh = model(**part).past_key_values
    assert float((feed(model, cache, [7, 8]) - feed(model, fresh, [7, 8])).abs().max()) < TOLERANCE
    report = vtprune.report(cache)
    assert len(report.samples[0].images) == 1
    assert report.kv_tokens_per_layer == vtprune.report(fresh).kv_tokens_per_layer


@every_model
def test_a_second_turn_of_a_padded_batch_equals_each_row_alone(kind: str) -> None:
    model = vtprune.wrap(make(kind), EVERYWHERE)
    second = [Row([4], [], 21), Row([1], [], 22), Row([2], [], 23)]
    first, then = prompt(kind, ROWS[kind]), prompt(kind, second)
    mask = torch.cat([first["attention_mask"], then["attention_mask"]], dim=1)
    positions: dict[str, Any] = {}
    own: dict[str, Any] = {}
    if not kind.startswith("qwen"):
        both = (mask.cumsum(dim=1) - 1).clamp(min=0)
        own = {"position_ids": both[:, : first["input_ids"].shape[1]]}
        positions = {"position_ids": both[:, first["input_ids"].shape[1] :]}
    with torch.no_grad():
        cache = model(**first, **own).past_key_values
        out = model(input_ids=then["input_ids"], attention_mask=mask, **{PAST: cache}, **positions).logits
        for row, (one, two) in enumerate(zip(ROWS[kind], second, strict=True)):
            alone = model(**prompt(kind, [one])).past_key_values
            text = prompt(kind, [two])["input_ids"]
            expected = model(input_ids=text, **{PAST: alone}).logits[0]
            assert float((out[row, -text.shape[1] :] - expected).abs().max()) < TOLERANCE


@every_model
@pytest.mark.parametrize("change", ["repeat", "select", "reorder"])
def test_the_report_follows_the_caches_rows(kind: str, change: str) -> None:
    inputs = prompt(kind, ROWS[kind])
    model = vtprune.wrap(make(kind), EVERYWHERE)
    with torch.no_grad():
        cache = model(**inputs).past_key_values
    before = vtprune.report(cache)
    rows = {"repeat": [0, 0, 1, 1, 2, 2], "select": [2, 0], "reorder": [2, 0, 1]}[change]
    if change == "repeat":
        cache.batch_repeat_interleave(2)
    elif change == "select":
        cache.batch_select_indices(torch.tensor(rows))
    else:
        cache.reorder_cache(torch.tensor(rows))
    for report in (vtprune.report(cache), None):
        if report is None:
            feed(model, cache, [7], inputs["attention_mask"][rows])
            report = vtprune.report(cache)
        assert [sample.images for sample in report.samples] == [before.samples[row].images for row in rows]
        for layer, counts in enumerate(report.kv_tokens_per_layer):
            assert counts == [before.kv_tokens_per_layer[layer][row] + report.steps for row in rows]


@every_model
def test_a_copied_cache_reports_and_decodes_by_itself(kind: str) -> None:
    model = vtprune.wrap(make(kind), EVERYWHERE)
    with torch.no_grad():
        cache = model(**prompt(kind, ROWS[kind][:1])).past_key_values
    twin = copy.deepcopy(cache)
    first = feed(model, cache, [7, 8])
    assert vtprune.report(twin).kv_tokens_per_layer == [[n - 2 for n in layer] for layer in
                                                        vtprune.report(cache).kv_tokens_per_layer]  # fmt: skip
    assert torch.equal(feed(model, twin, [7, 8]), first)


def test_an_interrupted_forward_leaves_nothing_behind() -> None:
    kind = "llava-clip"
    inputs = prompt(kind, ROWS[kind][:1])
    model = vtprune.wrap(make(kind), vtprune.FlowCut(keep=6, stages=2))
    layer = model.model.language_model.layers[2].mlp

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with torch.no_grad():
        expected = model(**inputs).logits
        embeds = torch.randn(1, 12, 32)
        plain = model.model.language_model(inputs_embeds=embeds).last_hidden_state
        handle = layer.register_forward_pre_hook(stop)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                model(**inputs)
        handle.remove()
        gc.collect()
        assert not [one for one in gc.get_objects() if type(one) is DecoderRun]
        assert torch.equal(model.model.language_model(inputs_embeds=embeds).last_hidden_state, plain)
        assert torch.equal(model(**inputs).logits, expected)


def test_layers_with_sliding_windows_keep_their_own_mask() -> None:
    model = make("qwen2.5-vl")
    config = model.model.language_model.config
    config.layer_types = ["full_attention", "full_attention", *["sliding_attention"] * 3]
    config.sliding_window = 6
    model.model.language_model.has_sliding_layers = True
    inputs = prompt("qwen2.5-vl", ROWS["qwen2.5-vl"])
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
        plain = model(**inputs, **{PAST: DynamicCache()}).logits
        with vtprune.wrapped(model, "none"):
            assert torch.equal(model(**inputs, use_cache=False).logits, expected)
            assert torch.equal(model(**inputs, **{PAST: DynamicCache()}).logits, plain)


@every_model
def test_prompts_given_as_embeddings_are_pruned_too(kind: str) -> None:
    inputs = prompt(kind, ROWS[kind])
    model = vtprune.wrap(make(kind), "random", keep=5)
    positions = {} if kind.startswith("qwen") else {"position_ids": text_positions(inputs)}
    if kind.startswith("qwen"):
        ids, _ = inputs["input_ids"], None
        three, _ = model.model.get_rope_index(
            ids,
            mm_token_type_ids=inputs["mm_token_type_ids"],
            image_grid_thw=inputs["image_grid_thw"],
            attention_mask=inputs["attention_mask"],
        )
        positions = {"position_ids": three}
    with torch.no_grad():
        expected = model(**inputs, **positions).logits
        embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
        inputs.pop("mm_token_type_ids", None)
        actual = model(**inputs, inputs_embeds=embeds, **positions).logits
    assert torch.equal(actual, expected)


@every_model
def test_a_four_dimensional_mask_is_read_for_its_padding(kind: str) -> None:
    inputs = prompt(kind, ROWS[kind])
    model = vtprune.wrap(make(kind), "fopru", keep=5)
    positions = {} if kind.startswith("qwen") else {"position_ids": text_positions(inputs)}
    with torch.no_grad():
        logits = model(**inputs, **positions).logits
        expected = vtprune.report(model)
        mask = inputs.pop("attention_mask").bool()
        length = mask.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril() & mask[:, None, :]
        if kind.startswith("qwen"):
            return
        whole = (causal | torch.eye(length, dtype=torch.bool))[:, None]
        actual = model(**inputs, **positions, attention_mask=whole).logits
    report = vtprune.report(model)
    text = mask & (inputs["input_ids"] != IMAGE)
    assert float((actual - logits)[text].abs().max()) < TOLERANCE
    assert [sample.text_tokens for sample in report.samples] == [sample.text_tokens for sample in expected.samples]
    assert report.flops == expected.flops


@every_model
def test_flops_after_a_cached_prefix_of_text_count_the_attention_to_it(kind: str) -> None:
    from tests.flop_helper import _counter

    model = vtprune.wrap(make(kind, "eager"), "random", keep=4)
    prefix = prompt(kind, [Row([30], [], 3)])["input_ids"]
    inputs = prompt(kind, ROWS[kind][:1])
    with torch.no_grad():
        cache = model(input_ids=prefix).past_key_values
    measured = _counter(model, {**inputs, PAST: cache}).get_total_flops()
    assert vtprune.report(cache).flops == pytest.approx(measured, rel=0.01)


@every_model
def test_a_wrapped_model_cannot_be_copied_but_says_so(kind: str) -> None:
    model = vtprune.wrap(make(kind), "random", keep=4)
    with pytest.raises(vtprune.VTPruneError, match="unwrap"):
        copy.deepcopy(model)
    copy.deepcopy(vtprune.unwrap(model))


def test_a_users_own_override_survives_unwrapping() -> None:
    model = make("llava-clip")
    mine = model.model.get_image_features
    model.model.get_image_features = mine
    vtprune.unwrap(vtprune.wrap(model, "random", keep=4))
    assert model.model.get_image_features is mine


def test_features_of_another_pruner_are_refused() -> None:
    inputs = prompt("llava-clip", ROWS["llava-clip"][:1])
    pixels = inputs.pop("pixel_values")
    model = make("llava-clip")
    with torch.no_grad():
        with vtprune.wrapped(model, "flowcut", keep=5):
            encoded = model.model.get_image_features(pixels)
        with vtprune.wrapped(model, "random", keep=20), pytest.raises(vtprune.VTPruneError, match="pass pixel_values"):
            model(**inputs, mm_encoder_outputs={"image": encoded})


def test_a_decoder_without_a_known_cost_is_refused_when_wrapping() -> None:
    model = make("llava-clip")
    model.config.text_config.model_type = "opt"
    with pytest.raises(vtprune.UnsupportedModelError, match="opt"):
        vtprune.wrap(model, "random", keep=4)
    assert not hasattr(model, "_vtprune")
