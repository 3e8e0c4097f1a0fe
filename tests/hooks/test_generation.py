"""Generation on a wrapped model: beams, sampling, speculation, several turns, threads, and caches."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer

import vtprune
from tests.matrix import Drops
from tests.models import IMAGE, MODELS, PAST, ROWS, Row, make, prompt
from tests.oracle import TOLERANCE

EVERYWHERE = Drops(encoder=(0, 2), first=True, layers=(0, 2))
NO_MEDIA = {"suppress_tokens": [90, 91, 92, 93]}
every_model = pytest.mark.parametrize("kind", MODELS)


def _types(kind: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"mm_token_type_ids": (ids == IMAGE).long()} if kind.startswith("qwen") else {}


@every_model
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
        {"num_return_sequences": 3, "do_sample": True},
        {"do_sample": False},
    ],
    ids=["beams", "samples", "greedy"],
)
def test_decoding_from_the_cache_equals_recomputing_the_prompt(kind: str, options: dict[str, Any]) -> None:
    inputs = prompt(kind, ROWS[kind])
    model = vtprune.wrap(make(kind), EVERYWHERE)
    runs = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        runs.append(model.generate(**inputs, **options, **NO_MEDIA, max_new_tokens=6, use_cache=use_cache))
    assert torch.equal(*runs)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("kind", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
@torch.no_grad()
def test_text_alone_is_numbered_as_the_unpruned_model_numbers_it(kind: str, padding: str) -> None:
    inputs = prompt(kind, [Row([9], [], 4), Row([5], [], 5)], padding)
    found = []
    for wrap in (False, True):
        model = vtprune.wrap(make(kind), "random", keep=4) if wrap else make(kind)
        out, mask, logits = model(**inputs, use_cache=True), inputs["attention_mask"], []
        for token in (11, 12):
            mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
            step = {"input_ids": torch.full((2, 1), token), "attention_mask": mask, PAST: out.past_key_values}
            out = model(**step)
            logits.append(out.logits)
        found.append(torch.cat(logits))
    assert float((found[0] - found[1]).abs().max()) < TOLERANCE


@every_model
def test_the_report_has_the_rows_of_the_expanded_batch(kind: str) -> None:
    inputs = prompt(kind, ROWS[kind])
    model = vtprune.wrap(make(kind), EVERYWHERE)
    model(**inputs)
    alone = vtprune.report(model)
    model.generate(**inputs, **NO_MEDIA, max_new_tokens=5, num_beams=3, do_sample=False)
    report = vtprune.report(model)
    assert len(report.samples) == 9
    assert report.steps == 4
    for row, sample in enumerate(report.samples):
        assert [image.kept for image in sample.images] == [image.kept for image in alone.samples[row // 3].images]
    assert report.flops_breakdown.vision_tower == alone.flops_breakdown.vision_tower
    assert report.flops_breakdown.decoder == 3 * alone.flops_breakdown.decoder


@every_model
def test_assisted_decoding_gives_the_greedy_tokens(kind: str) -> None:
    inputs = prompt(kind, ROWS[kind][:1])
    model = vtprune.wrap(make(kind), EVERYWHERE)
    greedy = model.generate(**inputs, **NO_MEDIA, max_new_tokens=12, do_sample=False)
    looked_up = model.generate(**inputs, **NO_MEDIA, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3)
    assisted = model.generate(**inputs, **NO_MEDIA, max_new_tokens=12, do_sample=False, assistant_model=make(kind))
    assert torch.equal(looked_up, greedy)
    assert torch.equal(assisted, greedy)


@every_model
def test_later_turns_continue_the_cache_and_prune_new_images(kind: str) -> None:
    model = vtprune.wrap(make(kind), EVERYWHERE)
    options = {**NO_MEDIA, "max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True,
               "output_logits": True}  # fmt: skip
    first = prompt(kind, ROWS[kind][:1])
    cache = DynamicCache(config=model.config.get_text_config())
    out = model.generate(**first, **{PAST: cache}, **options)

    ids = torch.cat([out.sequences, torch.tensor([[11, 12, 13]])], dim=1)
    out = model.generate(input_ids=ids, **{PAST: cache}, **_types(kind, ids), **options)
    again = model.generate(**{**first, "input_ids": ids, **_types(kind, ids)}, **options)
    _agree(out, again)

    new = prompt(kind, [Row([0, 4], [(4, 5)] if kind.startswith("qwen") else [(6, 6)], seed=7)])
    ids = torch.cat([out.sequences, new.pop("input_ids")], dim=1)
    new.update(_types(kind, ids))
    out = model.generate(input_ids=ids, **{PAST: cache}, **new, **options)
    both = {"input_ids": ids, **_types(kind, ids)}
    for name in ("pixel_values", "image_grid_thw"):
        if name in first:
            both[name] = torch.cat([first[name], new[name]])
    again = model.generate(**both, **options)
    _agree(out, again)

    report = vtprune.report(cache)
    fresh = vtprune.report(model)
    assert [i.kept_per_layer for i in report.samples[0].images] == [i.kept_per_layer for i in fresh.samples[0].images]
    assert report.kv_tokens_per_layer == fresh.kv_tokens_per_layer
    assert report.flops < fresh.flops


def _agree(first: Any, second: Any) -> None:
    assert torch.equal(first.sequences, second.sequences)
    for ours, theirs in zip(first.logits, second.logits, strict=True):
        assert float((ours - theirs).abs().max()) < TOLERANCE


@every_model
def test_interleaved_generations_keep_their_own_state(kind: str) -> None:
    model = vtprune.wrap(make(kind), EVERYWHERE)
    first, second = (prompt(kind, [row]) for row in ROWS[kind][:2])
    token = torch.tensor([[5]])
    with torch.no_grad():
        expected = model(input_ids=token, **{PAST: model(**first).past_key_values}).logits
        cache = model(**first).past_key_values
        other = model(**second).past_key_values
        kept = vtprune.report(cache).samples[0].images[0].kept
        assert torch.equal(model(input_ids=token, **{PAST: cache}).logits, expected)
    assert vtprune.report(cache).steps == 1
    assert vtprune.report(other).steps == 0
    assert vtprune.report(cache).samples[0].images[0].kept == kept


@every_model
def test_threads_on_one_model_do_not_mix(kind: str) -> None:
    model = vtprune.wrap(make(kind), EVERYWHERE)
    prompts = [prompt(kind, [row]) for row in ROWS[kind]]

    def answer(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return model.generate(**inputs, **NO_MEDIA, max_new_tokens=8, do_sample=False)

    expected = [answer(inputs) for inputs in prompts]
    found: list[Any] = [None] * 9
    workers = [
        threading.Thread(target=lambda job=job: found.__setitem__(job, answer(prompts[job % 3]))) for job in range(9)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(tokens, expected[job % 3]) for job, tokens in enumerate(found))


@every_model
def test_cropping_the_cache_forgets_the_last_places(kind: str) -> None:
    model = vtprune.wrap(make(kind), EVERYWHERE)
    inputs = prompt(kind, ROWS[kind][:1])
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        cache = model(**inputs).past_key_values
        expected = model(input_ids=tokens[:, :1], **{PAST: cache}).logits
        model(input_ids=tokens[:, 1:], **{PAST: cache})
        cache.crop(-3)
        assert cache.get_seq_length() == inputs["input_ids"].shape[1]
        again = model(input_ids=tokens[:, :1], **{PAST: cache}).logits
        assert float((again - expected).abs().max()) < TOLERANCE


def _static(config: Any) -> Any:
    return StaticCache(config=config, max_cache_len=200)


def _sliding(config: Any) -> Any:
    cache = DynamicCache()
    cache.layers = [DynamicSlidingWindowLayer(sliding_window=8) for _ in range(config.num_hidden_layers)]
    return cache


class QuantizedLookalike(DynamicCache):
    """A cache class that is not the plain dynamic one, as quantised caches are."""


@every_model
@pytest.mark.parametrize(
    ("cache", "name"),
    [
        (_static, "StaticCache"),
        (_sliding, "DynamicSlidingWindowLayer"),
        (lambda config: QuantizedLookalike(), "Quant"),
    ],
    ids=["static", "sliding", "other"],
)
def test_caches_that_cannot_be_cut_are_refused_by_name(kind: str, cache: Any, name: str) -> None:
    model = vtprune.wrap(make(kind), "random", keep=4)
    given = cache(model.config.get_text_config())
    with pytest.raises(vtprune.UnsupportedCacheError, match=name):
        model(**prompt(kind, ROWS[kind][:1]), **{PAST: given})
    with torch.no_grad():
        assert model(**prompt(kind, ROWS[kind][:1])).logits.isfinite().all()


@every_model
def test_a_static_cache_works_where_nothing_is_dropped(kind: str) -> None:
    inputs = prompt(kind, ROWS[kind][:1])
    model = make(kind)
    expected = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    vtprune.wrap(model, "none")
    cache = _static(model.config.get_text_config())
    assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False, **{PAST: cache}), expected)


@every_model
def test_a_pruned_cache_is_refused_by_the_unwrapped_model(kind: str) -> None:
    model = vtprune.wrap(make(kind), "random", keep=4)
    cache = model(**prompt(kind, ROWS[kind][:1])).past_key_values
    vtprune.unwrap(model)
    with pytest.raises(vtprune.VTPruneError, match="wrapped with vtprune"):
        model(input_ids=torch.tensor([[5]]), **{PAST: cache})


@every_model
def test_features_encoded_ahead_of_time_are_pruned_too(kind: str) -> None:
    inputs = prompt(kind, ROWS[kind])
    model = vtprune.wrap(make(kind), "fopru", keep=5)
    with torch.no_grad():
        expected = model(**inputs).logits
        pixels = inputs.pop("pixel_values")
        grids = {"image_grid_thw": inputs["image_grid_thw"]} if "image_grid_thw" in inputs else {}
        encoded = model.model.get_image_features(pixels, **grids)
        model(**prompt(kind, ROWS[kind][:1]))
        actual = model(**inputs, mm_encoder_outputs={"image": encoded}).logits
    assert torch.equal(actual, expected)


@every_model
def test_features_from_elsewhere_are_refused(kind: str) -> None:
    inputs = prompt(kind, ROWS[kind][:1])
    grids = {"image_grid_thw": inputs["image_grid_thw"]} if "image_grid_thw" in inputs else {}
    encoded = make(kind).model.get_image_features(inputs.pop("pixel_values"), **grids)
    model = vtprune.wrap(make(kind), "random", keep=4)
    with pytest.raises(vtprune.VTPruneError, match="pass pixel_values"):
        model(**inputs, mm_encoder_outputs={"image": encoded})
