"""LazyLLM: what is left out waits, returns when a later step wants it, and is computed once at the most."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtprune
from tests.models import DECODER_LAYERS, IMAGE, MODELS, PAST, ROWS, TWO, Row, make, prompt
from tests.oracle import STEPS, TOLERANCE, added, compare, next_tokens, run_masked, run_wrapped
from tests.pruners.slow_lazyllm import SlowLazyLLM, steps, turn
from vtprune.report.report import ImageReport

every_model = pytest.mark.parametrize("kind", MODELS)
BOUNDARIES = (1, 3, 4)
NO_MEDIA = {"suppress_tokens": [90, 91, 92, 93]}


def _positions(kind: str, model: Any, inputs: dict[str, Tensor]) -> Tensor:
    length = inputs["input_ids"].shape[1]
    if not kind.startswith("qwen"):
        return torch.arange(length)[None]
    return model.model.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=(inputs["input_ids"] == IMAGE).long(),
        image_grid_thw=inputs.get("image_grid_thw"),
    )[0]


@torch.no_grad()
def _slow(kind: str, parts: list[dict[str, Tensor]], tokens: Tensor) -> SlowLazyLLM:
    """The slow reference for turns of one row each, and `tokens` (1, n) after them."""
    model = make(kind, "eager")
    ids = torch.cat([*(part["input_ids"] for part in parts), tokens], dim=1)
    media = [part for part in parts if "pixel_values" in part]
    inputs = {name: torch.cat([part[name] for part in media]) for name in ("pixel_values", "image_grid_thw")
              if media and name in media[0]}  # fmt: skip
    embeds = model.get_input_embeddings()(ids)[0].clone()
    places = (ids[0] == IMAGE).nonzero().flatten().tolist()
    images = []
    if media:
        grids = {name: value for name, value in inputs.items() if name == "image_grid_thw"}
        features = model.model.get_image_features(inputs["pixel_values"], **grids).pooler_output
        embeds[ids[0] == IMAGE] = torch.cat(list(features))
        for feature in features:
            images.append(places[: len(feature)])
            places = places[len(feature) :]
    return SlowLazyLLM(
        model,
        ids[0],
        embeds,
        _positions(kind, model, {**inputs, "input_ids": ids}),
        images=images,
        boundaries=BOUNDARIES,
        added=[plane[0] for plane in added(model, inputs, ids)],
    )


def _same_sets(slow: SlowLazyLLM, images: list[ImageReport]) -> int:
    """Asserts that the report names the sets of the reference; how many tokens returned."""
    returned = 0
    for own, image in zip(slow.images, images, strict=True):
        for number, step in enumerate(image.steps):
            forward = number + len(slow.attended) - len(image.steps)
            for layer in range(DECODER_LAYERS):
                attended = {own[token] for token in step.attended_per_layer[layer]}
                computed = {own[token] for token in step.computed_per_layer[layer]}
                assert attended == slow.attended[forward][layer] & set(own)
                assert computed == slow.computed[forward][layer] & set(own)
                assert step.attended_per_layer[layer] == sorted(step.attended_per_layer[layer])
                returned += len(computed)
    return returned


@every_model
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_prefill_and_steps_equal_a_token_by_token_reference(kind: str, attention: str, padding: str) -> None:
    model = vtprune.wrap(make(kind, attention), "lazyllm")
    inputs = prompt(kind, ROWS[kind], padding)
    logits, _, cache = run_wrapped(kind, model, inputs)
    report = vtprune.report(cache)
    for index, row in enumerate(ROWS[kind]):
        own = prompt(kind, [row])
        slow = _slow(kind, [own], next_tokens(len(ROWS[kind]))[index : index + 1])
        with torch.no_grad():
            expected = slow.feed(own["input_ids"].shape[1])
            after = torch.cat([slow.feed(1) for _ in range(STEPS)])
        mask = inputs["attention_mask"][index].bool()
        text = own["input_ids"][0] != IMAGE
        assert float((logits[index, : len(mask)][mask] - expected)[text].abs().max()) < TOLERANCE
        assert float((logits[index, len(mask) :] - after).abs().max()) < TOLERANCE
        for image, places in zip(report.samples[index].images, slow.images, strict=True):
            for layer, kept in enumerate(image.kept_per_layer):
                assert {places[token] for token in kept} == slow.attended[0][layer] & set(places)
            assert len(image.steps) == STEPS
        assert _same_sets(slow, report.samples[index].images) > 20


@every_model
def test_every_layer_computes_a_token_once_at_the_most(kind: str) -> None:
    model = vtprune.wrap(make(kind), "lazyllm", keep=0.4)
    _, _, cache = run_wrapped(kind, model, prompt(kind, ROWS[kind]))
    report = vtprune.report(cache)
    steps_with_returns = set()
    for row, sample in enumerate(report.samples):
        for layer in range(DECODER_LAYERS):
            held = 0
            for image in sample.images:
                computed = list(image.kept_per_layer[layer])
                for number, step in enumerate(image.steps):
                    computed += step.computed_per_layer[layer]
                    steps_with_returns |= {number} if step.computed_per_layer[layer] else set()
                    assert len(step.attended_per_layer[layer]) == len(image.kept_per_layer[layer])
                    assert set(step.attended_per_layer[layer]) <= set(computed)
                    if layer:
                        assert set(step.attended_per_layer[layer]) <= set(step.attended_per_layer[layer - 1])
                assert len(computed) == len(set(computed))
                held += len(computed)
            # Text, the steps' own tokens, and what was computed so far: nothing else is in the cache.
            assert report.kv_tokens_per_layer[layer][row] == held + sample.text_tokens + STEPS
    assert len(steps_with_returns) >= 3


@every_model
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_later_turns_of_text_and_images_equal_the_reference(kind: str, attention: str) -> None:
    model = vtprune.wrap(make(kind, attention), "lazyllm")
    first = prompt(kind, [ROWS[kind][2]])
    text = {"input_ids": torch.tensor([[11, 12, 13, 14]])}
    image = prompt(kind, [Row([0, 4], [(4, 5)] if kind.startswith("qwen") else [(6, 6)], seed=7)])
    tokens = next_tokens(1)[:, :4]
    ids = torch.cat([first["input_ids"], tokens[:, :2], text["input_ids"], image["input_ids"]], dim=1)
    slow = _slow(kind, [{**first}, {"input_ids": tokens[:, :2]}, text, image], tokens[:, 2:])
    with torch.no_grad():
        cache = turn(model, first).past_key_values
        found = [steps(model, cache, tokens[:, :2]), turn(model, text, cache).logits]
        own = {**image}
        if kind.startswith("qwen"):
            own["mm_token_type_ids"] = (image["input_ids"] == IMAGE).long()
        found += [turn(model, own, cache).logits, steps(model, cache, tokens[:, 2:])]
        lengths = [first["input_ids"].shape[1], 1, 1, 4, image["input_ids"].shape[1], 1, 1]
        expected = torch.cat([slow.feed(length) for length in lengths])[lengths[0] :]
    fed = torch.cat([ids[0, lengths[0] :], tokens[0, 2:]])
    assert float((torch.cat(found, dim=1)[0] - expected)[fed != IMAGE].abs().max()) < TOLERANCE
    images = vtprune.report(cache).samples[0].images
    assert [len(one.steps) for one in images] == [6] * (len(images) - 1) + [2]
    assert _same_sets(slow, images) > 20


@every_model
def test_an_image_after_a_turn_of_text_equals_the_reference(kind: str) -> None:
    model = vtprune.wrap(make(kind), "lazyllm")
    text = {"input_ids": torch.tensor([[3, 4, 5, 6]])}
    image = prompt(kind, [ROWS[kind][0]])
    tokens = next_tokens(1)
    slow = _slow(kind, [text, image], tokens)
    with torch.no_grad():
        cache = turn(model, text).past_key_values
        found = torch.cat([turn(model, image, cache).logits[:, -1:], steps(model, cache, tokens)], dim=1)[0]
        slow.feed(4)
        expected = [slow.feed(image["input_ids"].shape[1])[-1:], *(slow.feed(1) for _ in range(STEPS))]
    assert float((found - torch.cat(expected)).abs().max()) < TOLERANCE
    assert _same_sets(slow, vtprune.report(cache).samples[0].images) > 20


@every_model
def test_a_later_turn_of_a_padded_batch_equals_each_row_alone(kind: str) -> None:
    model = vtprune.wrap(make(kind), "lazyllm")
    rows = [Row([4], [], 21), Row([1], [], 22), Row([2], [], 23)]
    first, then = prompt(kind, ROWS[kind], "right"), prompt(kind, rows, "right")
    mask = torch.cat([first["attention_mask"], then["attention_mask"]], dim=1)
    own: list[dict[str, Tensor]] = [{}, {}]
    if not kind.startswith("qwen"):
        own = [{"position_ids": part} for part in (mask.cumsum(dim=1) - 1).clamp(min=0).tensor_split(
            [first["input_ids"].shape[1]], dim=1)]  # fmt: skip
    cache = turn(model, {**first, **own[0]}).past_key_values
    later = {"input_ids": then["input_ids"], "attention_mask": mask, **own[1]}
    logits = turn(model, later, cache).logits
    images = [sample.images for sample in vtprune.report(cache).samples]
    assert any(any(step.computed_per_layer) for row in images for image in row for step in image.steps)
    for index, (one, two) in enumerate(zip(ROWS[kind], rows, strict=True)):
        alone = turn(model, prompt(kind, [one])).past_key_values
        text = prompt(kind, [two])["input_ids"]
        expected = turn(model, {"input_ids": text}, alone).logits[0]
        assert float((logits[index, : text.shape[1]] - expected).abs().max()) < TOLERANCE
        assert vtprune.report(alone).samples[0].images == images[index]


@every_model
@pytest.mark.parametrize(("schedule", "layers"), [("entropy", (1, 3)), ("shifted_cosine", (1,))])
def test_tokens_return_under_other_schedules_too(kind: str, schedule: str, layers: tuple[int, ...]) -> None:
    model = vtprune.wrap(make(kind), "lazyllm", keep=0.5, schedule=schedule, layers=layers)
    inputs = prompt(kind, ROWS[kind])
    logits, _, cache = run_wrapped(kind, model, inputs)
    report = vtprune.report(cache)
    assert compare(logits, run_masked(kind, vtprune.unwrap(model), inputs, report), inputs) < TOLERANCE
    assert any(any(step.computed_per_layer) for step in report.samples[0].images[0].steps)


@every_model
def test_the_reference_notices_another_choice(kind: str) -> None:
    model = vtprune.wrap(make(kind), "lazyllm")
    inputs = prompt(kind, ROWS[kind])
    logits, _, cache = run_wrapped(kind, model, inputs)
    report = vtprune.report(cache)
    assert compare(logits, run_masked(kind, vtprune.unwrap(model), inputs, report), inputs) < TOLERANCE
    step = report.samples[0].images[0].steps[3]
    unused = next(token for token in range(12) if token not in step.attended_per_layer[-1])
    step.attended_per_layer[-1][0] = unused
    assert compare(logits, run_masked(kind, model, inputs, report), inputs) > 100 * TOLERANCE


@every_model
def test_hidden_states_keep_the_length_of_the_input_while_tokens_return(kind: str) -> None:
    model = vtprune.wrap(make(kind), "lazyllm")
    cache = turn(model, prompt(kind, ROWS[kind][:1])).past_key_values
    with torch.no_grad():
        out = model(input_ids=torch.tensor([[5, 6, 7]]), **{PAST: cache}, output_hidden_states=True)
    step = vtprune.report(cache).samples[0].images[0].steps[0]
    assert any(step.computed_per_layer)
    assert [states.shape[1] for states in out.hidden_states] == [3] * (DECODER_LAYERS + 1)
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)


@every_model
def test_without_a_cache_tokens_drop_as_in_the_prefill(kind: str) -> None:
    model = vtprune.wrap(make(kind), "lazyllm")
    inputs = prompt(kind, ROWS[kind])
    with torch.no_grad():
        cached = model(**inputs)
        kept = [image.kept_per_layer for sample in vtprune.report(model).samples for image in sample.images]
        assert torch.equal(model(**inputs, use_cache=False).logits, cached.logits)
    report = vtprune.report(model)
    assert [image.kept_per_layer for sample in report.samples for image in sample.images] == kept
    assert report.aux_bytes == 0


@every_model
def test_what_waits_is_counted_beside_the_cache(kind: str) -> None:
    model = vtprune.wrap(make(kind), "lazyllm")
    cache = turn(model, prompt(kind, ROWS[kind][:1])).past_key_values
    report = vtprune.report(cache)
    text = model.config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    counts = [len(kept) for kept in report.samples[0].images[0].kept_per_layer]
    waiting = counts[0] - counts[-1]
    planes = sum(values.nbytes for layer in cache.layers for name, values in layer.aux.items() if name == "planes")
    assert (planes > 0) is kind.startswith("qwen3-vl")
    assert report.aux_bytes == 4 * waiting * (text.hidden_size + 2 * head) + planes
    assert report.kv_bytes == report.kv_bytes_allocated
    # Nothing that returns leaves, and what was computed on the way and cut again comes on top.
    steps(model, cache, next_tokens(1))
    assert vtprune.report(cache).aux_bytes >= report.aux_bytes


@every_model
def test_after_stages_before_the_decoder_only_what_entered_returns(kind: str) -> None:
    model = vtprune.wrap(make(kind), [vtprune.Random(keep=12), vtprune.LazyLLM()])
    inputs = prompt(kind, ROWS[kind])
    logits, _, cache = run_wrapped(kind, model, inputs)
    report = vtprune.report(cache)
    assert compare(logits, run_masked(kind, vtprune.unwrap(model), inputs, report), inputs) < TOLERANCE
    images = [image for sample in report.samples for image in sample.images]
    assert any(any(step.computed_per_layer) for image in images for step in image.steps)
    for image in images:
        assert all(set(step.attended_per_layer[0]) == set(image.kept) for step in image.steps)


@every_model
@pytest.mark.parametrize("row", [Row([0, 5], [(6, 6)], 8), Row([4, 0], [(6, 6)], 9), TWO], ids=["start", "end", "two"])
def test_an_image_may_stand_anywhere(kind: str, row: Row) -> None:
    model = vtprune.wrap(make(kind), "lazyllm")
    inputs = prompt(kind, [row])
    logits, _, cache = run_wrapped(kind, model, inputs)
    report = vtprune.report(cache)
    assert compare(logits, run_masked(kind, vtprune.unwrap(model), inputs, report), inputs) < TOLERANCE


def test_an_image_of_one_token_stays() -> None:
    kind = "qwen2.5-vl"
    rows = [Row([3, 4], [(1, 1)], 5), Row([2, 3], [(3, 4)], 6), Row([6], [], 7)]
    model = vtprune.wrap(make(kind), "lazyllm")
    inputs = prompt(kind, rows)
    logits, _, cache = run_wrapped(kind, model, inputs)
    report = vtprune.report(cache)
    assert compare(logits, run_masked(kind, vtprune.unwrap(model), inputs, report), inputs) < TOLERANCE
    assert report.samples[0].images[0].steps[0].attended_per_layer == [[0]] * DECODER_LAYERS
    alone = prompt(kind, rows[:1])
    with vtprune.wrapped(model, "lazyllm"), torch.no_grad():
        cache = model(**alone).past_key_values
    assert vtprune.report(cache).aux_bytes == 0


def test_the_layers_are_those_of_the_paper_and_move_for_a_low_budget() -> None:
    pruner = vtprune.LazyLLM()
    assert pruner.places() == (9, 19, 28)
    ratios = pruner.ratios()
    assert [ratios[layer] for layer in (8, 9, 19, 28)] == pytest.approx([1, 0.7, 0.49, 0.343])
    assert vtprune.LazyLLM(ratio=0.5).ratios()[-1] == pytest.approx(0.125)
    assert pruner.places(0.2)[0] < 9
    assert vtprune.LazyLLM(layers=(4, 8)).places(0.3) == (4, 8)
