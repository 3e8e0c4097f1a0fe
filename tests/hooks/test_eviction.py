"""What a cache that is cut head by head goes through: rows, copies, crops, turns, beams, threads, lists of methods."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import vtprune
from tests.models import IMAGE, MODELS, PAST, ROWS, Row, make, prompt
from tests.oracle import TOLERANCE, feed, run_wrapped
from vtprune.decoder.run import DecoderRun
from vtprune.hooks.eviction import Watch
from vtprune.method.pruner import Pruner

every_model = pytest.mark.parametrize("kind", MODELS)
METHODS = [vtprune.D2O(keep=0.3), vtprune.D2O(keep=0.4, text=True)]
every_method = pytest.mark.parametrize("method", METHODS, ids=["vision", "text"])
NO_MEDIA = {"eos_token_id": None, "pad_token_id": 0}


@torch.no_grad()
def filled(model: Any, inputs: dict[str, torch.Tensor]) -> Any:
    """The cache of a prefill."""
    return model(**inputs).past_key_values


def bytes_by_layer(cache: Any) -> list[int]:
    return [part.keys.numel() * part.keys.element_size() * 2 for part in cache.layers]


@every_model
@every_method
def test_the_cache_is_whole_after_the_prompt_and_cut_by_the_first_step(kind: str, method: vtprune.D2O) -> None:
    inputs = prompt(kind, ROWS[kind][:1])
    plain = make(kind)
    model = vtprune.wrap(make(kind), method)
    length, tokens = inputs["input_ids"].shape[1], int((inputs["input_ids"] == IMAGE).sum())
    entry = vtprune.kv_bytes(plain.config, 1, torch.float32) // 5
    cache, whole = filled(model, inputs), filled(plain, inputs)
    assert bytes_by_layer(cache) == [length * entry] * 5
    # The first step attends to everything.
    assert torch.equal(feed(model, cache, [7]), feed(plain, whole, [7]))
    first = bytes_by_layer(cache)
    assert [first[layer] for layer in (0, 1, 4)] == [(length + 1) * entry] * 3
    if method.text:
        assert first[2] + first[3] == 2 * round(0.4 * (length + 1)) * entry
    else:
        assert first[2] + first[3] == 2 * (length + 1 - tokens + round(0.3 * tokens)) * entry
    for step in range(2, 6):
        feed(model, cache, [step])
        grown = [0 if method.text and layer in (2, 3) else (step - 1) * entry for layer in range(5)]
        assert bytes_by_layer(cache) == [was + more for was, more in zip(first, grown, strict=True)]
        report = vtprune.report(cache)
        assert report.kv_bytes == report.kv_bytes_allocated == sum(bytes_by_layer(cache))
        assert [layer[0] * entry for layer in report.kv_tokens_per_layer] == bytes_by_layer(cache)
        assert report.kv_bytes_full == (length + step) * entry * 5
        assert report.kv_bytes_prefill == report.kv_bytes_prefill_full == length * entry * 5
        assert cache.get_seq_length() == length + step


@every_model
@pytest.mark.parametrize(
    "method", [*METHODS, vtprune.D2O(keep=0.3, variant="released")], ids=["vision", "text", "all"]
)
def test_layers_that_are_looked_at_together_are_cut_as_those_by_themselves(
    kind: str, method: Pruner, monkeypatch: pytest.MonkeyPatch
) -> None:
    together: list[int] = []
    look = Watch._look

    def counted(watch: Watch, run: DecoderRun) -> None:
        together.append(len(watch._waiting))
        look(watch, run)

    monkeypatch.setattr(Watch, "_look", counted)
    model, inputs = vtprune.wrap(make(kind), method), prompt(kind, ROWS[kind][:1])
    cache = filled(model, inputs)
    feed(model, cache, [7, 8])
    assert max(together) > 1
    together.clear()
    monkeypatch.setattr("vtprune.hooks.eviction.rows_at_once", lambda *_: 1)
    alone = filled(model, inputs)
    feed(model, alone, [7, 8])
    assert set(together) == {1}
    for one, two in zip(cache.layers, alone.layers, strict=True):
        torch.testing.assert_close(one.keys, two.keys)


def test_queries_alone_are_tapped_where_the_cache_has_the_keys() -> None:
    model = vtprune.wrap(make("llava-clip"), "d2o", keep=0.4)
    for index, layer in enumerate(model.model.language_model.layers):
        attention, watched = layer.self_attn, index in (2, 3)
        found = [bool(one._forward_hooks) for one in (attention.q_proj, attention.k_proj, attention.v_proj)]
        assert found == [watched, False, False]


@every_model
@every_method
@pytest.mark.parametrize("after", [0, 2], ids=["before the cut", "after it"])
def test_rows_may_be_reordered_repeated_and_dropped(kind: str, method: Pruner, after: int) -> None:
    inputs = prompt(kind, ROWS[kind])
    model = vtprune.wrap(make(kind), method)
    mask = inputs["attention_mask"]
    expected_cache = filled(model, inputs)
    expected = feed(model, expected_cache, [7, 8, 9, 3], mask)
    for change, rows in (("repeat", [0, 0, 1, 1, 2, 2]), ("select", [2, 0]), ("reorder", [2, 0, 1])):
        cache = filled(model, inputs)
        feed(model, cache, [7, 8][:after], mask) if after else None
        if change == "repeat":
            cache.batch_repeat_interleave(2)
        elif change == "select":
            cache.batch_select_indices(torch.tensor(rows))
        else:
            cache.reorder_cache(torch.tensor(rows))
        new = torch.cat([mask, mask.new_ones(len(mask), after)], dim=1)[rows]
        found = feed(model, cache, [7, 8, 9, 3][after:], new)
        assert float((found - expected[rows][:, after:]).abs().max()) < TOLERANCE
        report, whole = vtprune.report(cache), vtprune.report(expected_cache)
        assert [s.images for s in report.samples] == [whole.samples[row].images for row in rows]
        assert report.kv_tokens_per_layer == [[layer[row] for row in rows] for layer in whole.kv_tokens_per_layer]


@every_model
@every_method
@pytest.mark.parametrize("after", [0, 1], ids=["before the cut", "after it"])
def test_a_copied_cache_goes_on_by_itself(kind: str, method: Pruner, after: int) -> None:
    model = vtprune.wrap(make(kind), method)
    cache = filled(model, prompt(kind, ROWS[kind][:1]))
    if after:
        feed(model, cache, [5])
    twin = copy.deepcopy(cache)
    before = vtprune.report(twin).kv_tokens_per_layer
    first = feed(model, cache, [7, 8])
    assert vtprune.report(twin).kv_tokens_per_layer == before
    assert torch.equal(feed(model, twin, [7, 8]), first)


@every_model
def test_a_crop_that_would_undo_what_was_decided_is_refused_and_others_are_right(kind: str) -> None:
    model = vtprune.wrap(make(kind), METHODS[0])
    inputs = prompt(kind, ROWS[kind][:1])
    length = inputs["input_ids"].shape[1]
    start = int((inputs["input_ids"][0] == IMAGE).nonzero()[0])
    cache = filled(model, inputs)
    with pytest.raises(vtprune.VTPruneError, match=f"cropped to {length - 1} places"):
        cache.crop(-1)
    expected = feed(model, cache, [7, 8, 9])
    assert float((again(model, cache, -2, [8, 9]) - expected[:, 1:]).abs().max()) < TOLERANCE
    held = [layer.keys.clone() for layer in cache.layers]
    for places in (3, length + 3 - start - 1):
        with pytest.raises(vtprune.VTPruneError, match="cannot be cropped"):
            cache.crop(-places)
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, held, strict=True))
    # Below the image nothing of it is left, and another prompt may follow.
    cache.crop(start - length - 3)
    assert [layer.keys.shape[2] for layer in cache.layers] == [start] * 5
    with torch.no_grad():
        fresh = model(input_ids=inputs["input_ids"][:, :start]).past_key_values
    assert float((feed(model, cache, [7, 8]) - feed(model, fresh, [7, 8])).abs().max()) < TOLERANCE
    assert vtprune.report(cache).samples[0].images == []


def again(model: Any, cache: Any, places: int, tokens: list[int]) -> torch.Tensor:
    """The last tokens once more, after a crop."""
    cache.crop(places)
    return feed(model, cache, tokens)


@every_model
def test_with_running_eviction_only_an_empty_cache_can_be_reached_by_cropping(kind: str) -> None:
    model = vtprune.wrap(make(kind), METHODS[1])
    inputs = prompt(kind, ROWS[kind][:1])
    cache = filled(model, inputs)
    expected = feed(model, cache, [7, 8])
    for places in (1, 2, inputs["input_ids"].shape[1]):
        with pytest.raises(vtprune.VTPruneError, match="cannot be cropped"):
            cache.crop(-places)
    cache.crop(-cache.get_seq_length())
    with torch.no_grad():
        model(**inputs, **{PAST: cache})
    assert float((feed(model, cache, [7, 8]) - expected).abs().max()) < TOLERANCE


@every_model
@every_method
def test_interleaved_generations_keep_their_own_state(kind: str, method: Pruner) -> None:
    model = vtprune.wrap(make(kind), method)
    first, second = (prompt(kind, [row]) for row in ROWS[kind][:2])
    expected = feed(model, filled(model, first), [5, 6, 7])
    one, two = filled(model, first), filled(model, second)
    found = []
    for token in (5, 6, 7):
        found.append(feed(model, one, [token]))
        feed(model, two, [token + 1])
    assert torch.equal(torch.cat(found, dim=1), expected)


@every_model
def test_threads_on_one_model_do_not_mix(kind: str) -> None:
    model = vtprune.wrap(make(kind), METHODS[0])
    prompts = [prompt(kind, [row]) for row in ROWS[kind]]

    def answer(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return model.generate(**inputs, **NO_MEDIA, max_new_tokens=6, do_sample=False)

    expected = [answer(inputs) for inputs in prompts]
    found: list[Any] = [None] * 6
    workers = [
        threading.Thread(target=lambda job=job: found.__setitem__(job, answer(prompts[job % 3]))) for job in range(6)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(tokens, expected[job % 3]) for job, tokens in enumerate(found))


@every_model
@every_method
@pytest.mark.parametrize("options", [{"num_beams": 3, "num_return_sequences": 2}, {"num_return_sequences": 3}])
def test_beams_and_several_sequences_of_a_batch_are_those_of_each_prompt(
    kind: str, method: Pruner, options: dict[str, int]
) -> None:
    model = vtprune.wrap(make(kind), method)
    settings = {**options, **NO_MEDIA, "max_new_tokens": 5, "do_sample": "num_beams" not in options, "top_k": 1}
    if "num_beams" in options:
        del settings["top_k"]
    inputs = prompt(kind, ROWS[kind])
    together = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
    report = vtprune.report(model)
    count = options["num_return_sequences"]
    for index, row in enumerate(ROWS[kind]):
        own = prompt(kind, [row])
        alone = model.generate(**own, **settings)[:, own["input_ids"].shape[1] :]
        assert torch.equal(together[index * count : (index + 1) * count], alone)
    assert len(report.samples) == 3 * options.get("num_beams", count)


@every_model
@every_method
def test_a_later_image_is_read_densely_and_cut_at_the_step_after(kind: str, method: vtprune.D2O) -> None:
    second = [Row([2, 3], [(4, 3) if kind.startswith("qwen") else (6, 6)], 21), Row([4], [], 22)]
    model = vtprune.wrap(make(kind), method)
    first, then = prompt(kind, ROWS[kind][:2]), prompt(kind, second)
    logits, reports = play(kind, model, first, then)
    for row in range(2):
        own = prompt(kind, ROWS[kind][row : row + 1]), prompt(kind, second[row : row + 1])
        alone, _ = play(kind, model, *own)
        assert float((logits[row] - alone[0]).abs().max()) < TOLERANCE
    before, during, after = (report.samples[0].images for report in reports)
    if method.text:
        return
    held = [image[0].cached_per_head[2] for image in (before, during, after)]
    assert held[0] == held[1] == held[2]
    assert len(held[0][0]) < before[0].tokens
    tokens = during[1].tokens
    assert all(len(head) == tokens for layer in during[1].cached_per_head[2:4] for head in layer)
    assert sum(len(layer[0]) for layer in after[1].cached_per_head[2:4]) == 2 * round(0.3 * tokens)


@torch.no_grad()
def play(kind: str, model: Any, first: dict[str, Any], then: dict[str, Any]) -> tuple[torch.Tensor, list[Any]]:
    """Last logits of two decode steps after one prompt and two after another on the same cache, and the reports after
    the first ones, the second prompt, and the last ones."""
    ones = torch.ones_like(first["input_ids"])
    mask = first.get("attention_mask", ones)
    cache = filled(model, {**first, **places(kind, mask, mask.shape[1])})
    logits, reports = [], []
    for token in (7, 8):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        step = {"attention_mask": mask, **places(kind, mask, 1)}
        logits.append(model(input_ids=torch.full((len(mask), 1), token), **{PAST: cache}, **step).logits[:, -1])
    reports.append(vtprune.report(cache))
    mask = torch.cat([mask, then.get("attention_mask", torch.ones_like(then["input_ids"]))], dim=1)
    given = {**then, "attention_mask": mask, **places(kind, mask, then["input_ids"].shape[1])}
    logits.append(model(**given, **{PAST: cache}).logits[:, -1])
    reports.append(vtprune.report(cache))
    for token in (9, 5, 6):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        step = {"attention_mask": mask, **places(kind, mask, 1)}
        logits.append(model(input_ids=torch.full((len(mask), 1), token), **{PAST: cache}, **step).logits[:, -1])
    reports.append(vtprune.report(cache))
    return torch.stack(logits, dim=1), reports


def places(kind: str, mask: torch.Tensor, new: int) -> dict[str, torch.Tensor]:
    """The position ids that LLaVA has to be told where there is padding."""
    if kind.startswith("qwen"):
        return {}
    return {"position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -new:]}


@every_model
def test_images_that_wait_for_their_first_step_are_cut_together(kind: str) -> None:
    model = vtprune.wrap(make(kind), METHODS[0])
    cache = filled(model, prompt(kind, ROWS[kind][:1]))
    with torch.no_grad():
        model(**prompt(kind, [Row([2, 3], [(6, 6)], 21)]), **{PAST: cache})
        assert vtprune.report(cache).achieved_keep == 1.0
        feed(model, cache, [7])
    for image in vtprune.report(cache).samples[0].images:
        assert sum(len(layer[0]) for layer in image.cached_per_head[2:4]) == 2 * round(0.3 * image.tokens)


@every_model
@every_method
def test_assisted_decoding_is_refused_by_name(kind: str, method: Pruner) -> None:
    inputs = prompt(kind, ROWS[kind][:1])
    model = vtprune.wrap(make(kind), method)
    # A repeated pair of tokens gives the look-up something to propose.
    inputs["input_ids"][0, -4:] = torch.tensor([5, 6, 5, 6])
    for options in ({"assistant_model": make(kind)}, {"prompt_lookup_num_tokens": 2}):
        with pytest.raises(vtprune.VTPruneError, match="assisted decoding"):
            model.generate(**inputs, **NO_MEDIA, max_new_tokens=12, do_sample=False, **options)


@every_model
def test_assisted_decoding_goes_on_where_nothing_is_to_be_cut(kind: str) -> None:
    inputs = prompt(kind, ROWS[kind][:1])
    model = vtprune.wrap(make(kind), vtprune.D2O(keep=1.0))
    options = {**NO_MEDIA, "max_new_tokens": 8, "do_sample": False}
    assisted = model.generate(**inputs, **options, assistant_model=make(kind))
    assert torch.equal(assisted, model.generate(**inputs, **options))


@every_model
def test_caches_that_cannot_be_cut_are_refused_by_name(kind: str) -> None:
    inputs = prompt(kind, ROWS[kind][:1])
    model = vtprune.wrap(make(kind), METHODS[0])
    static = StaticCache(config=model.config.get_text_config(), max_cache_len=200)
    with pytest.raises(vtprune.UnsupportedCacheError, match="StaticCache"):
        model(**inputs, **{PAST: static})
    cut = filled(model, inputs)
    feed(model, cut, [5])
    vtprune.unwrap(model)
    with pytest.raises(vtprune.VTPruneError, match="wrapped with vtprune"):
        model(input_ids=torch.tensor([[5]]), **{PAST: cut})
    model.config.get_text_config().layer_types = ["full_attention"] * 4 + ["sliding_attention"]
    with pytest.raises(vtprune.UnsupportedModelError, match="sliding-window"):
        vtprune.wrap(model, "d2o")


@every_model
def test_the_users_own_cache_is_cut_in_place(kind: str) -> None:
    inputs = prompt(kind, ROWS[kind][:1])
    model = vtprune.wrap(make(kind), METHODS[0])
    expected = model.generate(**inputs, **NO_MEDIA, max_new_tokens=5, do_sample=False)
    cache = DynamicCache()
    assert torch.equal(
        model.generate(**inputs, **NO_MEDIA, max_new_tokens=5, do_sample=False, **{PAST: cache}), expected
    )
    assert cache.layers[2].keys.shape[2] < cache.layers[1].keys.shape[2]


@every_model
@pytest.mark.parametrize(
    "before",
    [
        vtprune.VisionZip(keep=0.5), vtprune.Random(keep=0.5), vtprune.FastV(ratio=0.3),
        vtprune.PyramidDrop(keep=0.7, layers=(1, 3)), vtprune.MustDrop(keep=0.6),
    ],
    ids=lambda one: one.name,
)  # fmt: skip
def test_what_other_methods_left_is_cut_to_keep_of_the_whole_image(kind: str, before: Pruner) -> None:
    model = vtprune.wrap(make(kind), [before, vtprune.D2O(keep=0.25)])
    inputs = prompt(kind, ROWS[kind])
    logits, first, cache = run_wrapped(kind, model, inputs)
    assert logits.isfinite().all()
    report = vtprune.report(cache)
    for sample, was in zip(report.samples, first.samples, strict=True):
        for image, full in zip(sample.images, was.images, strict=True):
            left = [len(layer) for layer in full.cached_per_layer[2:4]]
            budget = min(2 * max(1, round(0.25 * image.tokens)), sum(left))
            held = [layer or [kept] for layer, kept in zip(image.cached_per_head, image.cached_per_layer, strict=True)]
            assert sum(len(heads[0]) for heads in held[2:4]) == budget
            for heads, kept in zip(held, full.cached_per_layer, strict=True):
                assert all(set(head) <= set(kept) for head in heads)
    plain = vtprune.wrap(make(kind), before)
    prefill, _, _ = run_wrapped(kind, plain, inputs)
    length = inputs["input_ids"].shape[1]
    assert torch.equal(logits[:, : length + 1], prefill[:, : length + 1])


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([vtprune.D2O(keep=0.5), vtprune.FastV(keep=0.3)], "fastv acts inside the decoder, d2o only in the cache"),
        ([vtprune.D2O(keep=0.5), vtprune.D2O(keep=0.3)], "both cut the cache"),
        ([vtprune.Random(keep=0.2), vtprune.D2O(keep=0.3)], "nothing to do"),
    ],
)
def test_a_method_that_cuts_caches_comes_last_and_once(stages: list[Pruner], message: str) -> None:
    with pytest.raises(vtprune.VTPruneError, match=message):
        vtprune.wrap(make("llava-clip"), stages)


@pytest.mark.parametrize("kind", ["llava-clip", "llava-siglip"])
def test_renumbered_positions_go_on_after_the_cut(kind: str) -> None:
    inputs = prompt(kind, ROWS[kind])
    alone = run_wrapped(kind, vtprune.wrap(make(kind), METHODS[0]), inputs)[0]
    assert torch.equal(run_wrapped(kind, vtprune.wrap(make(kind), METHODS[0], positions="compact"), inputs)[0], alone)
    model = vtprune.wrap(make(kind), [vtprune.Random(keep=0.5), vtprune.D2O(keep=0.25)], positions="compact")
    options = {**NO_MEDIA, "max_new_tokens": 6, "do_sample": False, "output_logits": True}
    together = model.generate(**inputs, **options, return_dict_in_generate=True).logits
    for row, one in enumerate(ROWS[kind]):
        own = model.generate(**prompt(kind, [one]), **options, return_dict_in_generate=True).logits
        for ours, theirs in zip(together, own, strict=True):
            assert float((ours[row] - theirs[0]).abs().max()) < TOLERANCE
